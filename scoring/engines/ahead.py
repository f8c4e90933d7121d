"""The network compiled ahead of time (torch's AOTInductor): a file that any process runs without Python or AutoGluon.

Owns the trace, the file and the engine that runs it. Where files are made and kept is `compiled.py`'s.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scoring.decision import COMPILED
from scoring.engines.base import EngineUnavailable, Shapes
from scoring.engines.torch_engine import CUDA, GpuEngine, device_name
from scoring.export import traceable_len
from scoring.flat import ROWS, TOKENS, Precision, describe_inputs, flat_model, synthetic_arrays
from scoring.spec import FeatureSpec

if TYPE_CHECKING:
    import torch
    from autogluon.multimodal import MultiModalPredictor

AHEAD_VERSION = 2
"""Raised when the same predictor would compile to another file: part of its cache key."""

# torch compiles a program for each set of vector instructions and starts itself to load it, to choose the CPU's kernels and to
# compare what it finds with a file's: 57 of 156 s to compile on an H100's host, and most of the 66 to 85 s until a job had
# loaded its engine. A GPU's network has no kernel for the CPU.
_NO_PROBES = {"cpp.vec_isa_ok": False}
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
    import torch._inductor.config as inductor

    # Tensors of other sizes or types are refused; without it they would be read past their end.
    os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")
    with inductor.patch(_NO_PROBES):
        run: Any = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)

    def forward(tensors: "list[torch.Tensor]") -> "torch.Tensor":
        logits = run(*tensors)
        tensor: torch.Tensor = logits[0] if isinstance(logits, list | tuple) else logits
        return tensor

    return forward


class AheadEngine(GpuEngine):
    """The network as `compile_ahead` made it, loaded in a second; batches of any shape go through one and the same code."""

    provider = COMPILED

    def __init__(self, package: Path, spec: FeatureSpec, precision: Precision, shapes: Shapes) -> None:
        start = time.perf_counter()
        self.precision = precision
        self.device = device_name(CUDA)
        self._shapes = ahead_shapes(shapes)
        self._names = [item.name for item in describe_inputs(spec)]
        self._run = load_ahead(package)
        self.build_s = time.perf_counter() - start

    def run(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """Flat tensors of one of the engine's shapes, on the GPU -> logits there."""
        import torch

        with torch.inference_mode():
            return self._run(tensors)

    def close(self) -> None:
        """See `Engine.close`."""
        del self._run
