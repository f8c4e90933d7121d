"""The network compiled ahead of time (torch's AOTInductor): a file that any process runs without Python or AutoGluon.

Owns the trace, the file and the engine that runs it. Where files are made and kept is `compiled.py`'s.
"""

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from scoring.decision import COMPILED
from scoring.engines.base import EngineUnavailable, Shapes
from scoring.engines.graphs import Graphs
from scoring.engines.row_counts import PLANNED_AFTER_ROWS, plan_first, run_in_parts
from scoring.engines.torch_engine import CUDA, GpuEngine, device_name
from scoring.export import traceable_len
from scoring.flat import ROWS, TOKENS, Precision, describe_inputs, flat_model, synthetic_arrays
from scoring.spec import FeatureSpec

if TYPE_CHECKING:
    import torch
    from autogluon.multimodal import MultiModalPredictor

AHEAD_VERSION = 3
"""Raised when the same predictor would compile to another file: part of its cache key."""

# torch compiles a program for each set of vector instructions and starts itself to load it, to choose the CPU's kernels: 57 of
# 156 s to compile on an H100's host. A GPU's network has no kernel for the CPU.
_NO_PROBES = {"cpp.vec_isa_ok": False}
_MODEL = "model"  # torch's name for the one network in a file
# Kernels are tuned for batches of this many tokens, as most texts have.
_USUAL_TOKENS = 128


def ahead_shapes(shapes: Shapes) -> Shapes:
    """Those of `shapes` that a network compiled ahead takes: torch's trace sees one row as one that broadcasts."""
    return Shapes(tuple(sorted({max(2, rows) for rows in shapes.rows})), shapes.tokens)


def compile_ahead(
    predictor: "MultiModalPredictor", spec: FeatureSpec, precision: Precision, shapes: Shapes, path: Path, device: str
) -> None:
    """Compile the network for `device` into `path` (.pt2), for any rows and tokens of `shapes`.

    Takes a compiler (g++) and, for a GPU, CUDA's headers. Raises EngineUnavailable for a network with a free number of images
    a row, and whatever torch raises for one that it cannot trace or compile.
    """
    import torch
    import torch._inductor.config as inductor

    if any(model.max_images * len(spec.image) > 1 for model in spec.image_models):
        raise EngineUnavailable("rows may have several images, in a number that is not compiled ahead")
    model = flat_model(predictor, spec, precision).to(device)
    if device != "cpu":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions in half want it
    tokens = min(_USUAL_TOKENS, shapes.tokens[-1]) if shapes.tokens else 0
    arrays = synthetic_arrays(spec, rows=shapes.rows[-1], tokens=tokens)
    inputs = describe_inputs(spec)
    steps = {ROWS: shapes.rows, TOKENS: shapes.tokens}
    # One size alone is not free.
    free = {
        name: torch.export.Dim(name, min=sizes[0], max=sizes[-1]) for name, sizes in steps.items() if len(sizes) > 1
    }
    axes = tuple({axis: free[size] for axis, size in enumerate(item.shape) if size in free} for item in inputs)
    with torch.no_grad(), traceable_len(), inductor.patch(_NO_PROBES):
        exported = torch.export.export(
            model,
            tuple(torch.from_numpy(arrays[item.name]).to(device) for item in inputs),
            # One argument, `*tensors`.
            dynamic_shapes=(axes,),
            strict=False,
        )
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))


def load_ahead(path: Path) -> "Callable[[list[torch.Tensor]], torch.Tensor]":
    """Flat tensors of one of the shapes -> logits, both on the device it was compiled for. Not for several threads."""
    import torch

    # Tensors of other sizes or types are refused; without it they would be read past their end.
    os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")
    share_cxx_library()
    # What torch._inductor.aoti_load_package ends in. That imports inductor first (5 s) and probes the CPU, to compare it with
    # a file's: with the probes a job on an H100's host had loaded its engine after 66 to 85 s.
    package = torch._C._aoti.AOTIModelPackageLoader(str(path), _MODEL, True, 1, -1)

    def forward(tensors: "list[torch.Tensor]") -> "torch.Tensor":
        logits: torch.Tensor = package.run(tensors)[0]
        return logits

    return forward


def share_cxx_library() -> None:
    """Let what is loaded from now on use the C++ library that torch uses, also where it has one of its own.

    A compiler without the shared one puts its own into what it compiles. With two in a process the first regular expression
    ended it (SIGSEGV in AOTInductor's own code, on an H100's host).
    """
    with suppress(OSError):  # another platform's, of another name
        ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)


class AheadEngine(GpuEngine):
    """The network as `compile_ahead` made it, loaded in seconds; each shape replays its own CUDA graph.

    Launched plainly it holds Python's one interpreter for 4 to 7 ms a batch, which takes 8 ms on an H100: the threads that
    decode the next ones want it too. With images two row counts are run, the second one after the first rows: with all five
    first scores came 36.7 to 38.6 s after the command, 30.8 s on cuda, which does as this.
    """

    provider = COMPILED

    def __init__(self, package: Path, spec: FeatureSpec, precision: Precision, shapes: Shapes) -> None:
        start = time.perf_counter()
        self.precision = precision
        self.device = device_name(CUDA)
        self._shapes = ahead_shapes(shapes)
        self._names = [item.name for item in describe_inputs(spec)]
        self._graphs = Graphs(load_ahead(package))
        self._num_rows = 0
        self._counts = (plan_first(self._shapes.rows),) if spec.image_models else self._shapes.rows
        self.build_s = time.perf_counter() - start

    def run(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """Flat tensors of one of the engine's shapes, on the GPU -> logits there, valid until the next call."""
        if self._num_rows >= PLANNED_AFTER_ROWS:
            self.warm_up()
        rows = len(tensors[0])
        self._num_rows += rows
        if rows in self._counts:
            return self._graphs(tensors)
        return run_in_parts(lambda part: self._graphs(part).clone(), tensors, self._counts)

    def warm_up(self) -> None:
        """See `Engine.warm_up`: from here on the largest batches are run as they are."""
        self._counts = tuple(sorted({*self._counts, self._shapes.rows[-1]}))

    def close(self) -> None:
        """See `Engine.close`."""
        self._graphs.clear()
