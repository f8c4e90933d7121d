"""The torch engines: the predictor's own network, eager (fp32 is the reference) or compiled with CUDA graphs.

Owns devices and copies to them. `CompiledEngine` is compiled once for free row and token counts and captures
one CUDA graph a shape: a compile a shape took 19 to 29 s, twelve of them five minutes; a capture takes under a second.
"""

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scoring.engines.base import EngineUnavailable, Shapes, alike, num_rows, num_tokens, pad_arrays
from scoring.engines.graphs import Graphs
from scoring.flat import ROWS, TOKENS, BatchArrays, Logits, Precision, describe_inputs, flat_model, synthetic_arrays
from scoring.spec import FeatureSpec

if TYPE_CHECKING:
    import torch
    from autogluon.multimodal import MultiModalPredictor

logger = logging.getLogger(__name__)

CUDA = "cuda:0"
# MKL reads it at its first product, and then adds up alike wherever a row stands: with AVX2 50 of 320 rows still differed
# between batches without it, though they were padded alike (`alike`); with AVX-512 none did.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def to_tensor(array: "npt.NDArray[Any] | torch.Tensor", device: str) -> "torch.Tensor":
    """A host array on `device`; to a GPU through pinned memory, without waiting for the copy. A tensor is there already."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
    # Arrow's buffers are read-only, which torch warns about; the large arrays (pixels) are ours and not copied.
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor.pin_memory().to(device, non_blocking=True) if device != "cpu" else tensor


def device_name(device: str) -> str:
    """The GPU's product name, or cpu."""
    import torch

    return torch.cuda.get_device_name(0) if device != "cpu" else "cpu"


def submit_padded(
    run: "Callable[[list[torch.Tensor]], torch.Tensor]", names: Sequence[str], shapes: Shapes, arrays: BatchArrays
) -> "torch.Tensor":
    """A host batch through `run` on the GPU, padded to one of `shapes`; logits of its own rows, on the GPU."""
    rows = num_rows(arrays)
    padded = pad_arrays(arrays, *shapes.fit(rows, num_tokens(arrays)))
    # A copy: a CUDA graph writes its next logits to the same place.
    return run([to_tensor(padded[name], CUDA) for name in names])[:rows].clone()


class GpuEngine(ABC):
    """What engines that run on the GPU share: padding, the way there and the way back."""

    _names: Sequence[str]
    _shapes: Shapes

    @abstractmethod
    def run(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """Flat tensors of one of the engine's shapes, on the GPU -> logits there."""

    def submit(self, arrays: BatchArrays) -> "torch.Tensor":
        """See `Engine.submit`."""
        return submit_padded(self.run, self._names, self._shapes, arrays)

    def forward(self, arrays: BatchArrays) -> Logits:
        """See `Engine.forward`."""
        logits: Logits = self.submit(arrays).cpu().numpy()
        return logits

    def warm_up(self) -> None:  # noqa: B027 -- most have nothing to wait for
        """See `Engine.warm_up`."""


class TorchEngine:
    """The network in eager torch. In fp32, with TF32 off, its arithmetic is the reference's.

    On the CPU a row has the same logits, bit for bit, in every batch: a run that goes on after a kill cuts others.
    """

    provider = "torch"

    def __init__(
        self,
        predictor: "MultiModalPredictor",
        spec: FeatureSpec,
        precision: Precision,
        *,
        use_gpu: bool,
        num_threads: int,
    ) -> None:
        import torch

        self.precision = precision
        self._device = CUDA if use_gpu else "cpu"
        if use_gpu:
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        else:
            if precision == "fp16":
                raise EngineUnavailable("torch computes in fp16 on a GPU alone; set engine.precision=fp32")
            torch.set_num_threads(num_threads)
        self.device = device_name(self._device)
        self._names = [item.name for item in describe_inputs(spec)]
        self._max_tokens = {model.prefix: model.max_len for model in spec.text_models}
        self._model = flat_model(predictor, spec, precision).to(self._device)

    def submit(self, arrays: BatchArrays) -> "torch.Tensor":
        """See `Engine.submit`."""
        if self._device != "cpu":
            return self._run_named(arrays)
        import torch

        places, logits = [], []
        for rows, group in alike(arrays, self._max_tokens):
            places.append(rows)
            logits.append(self._run_named(group)[: len(rows)])
        return torch.cat(logits)[np.argsort(np.concatenate(places))]

    def _run_named(self, arrays: BatchArrays) -> "torch.Tensor":
        return self.run([to_tensor(arrays[name], self._device) for name in self._names])

    def forward(self, arrays: BatchArrays) -> Logits:
        """See `Engine.forward`."""
        logits: Logits = self.submit(arrays).cpu().numpy()
        return logits

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""

    def run(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """Flat tensors on the engine's device -> logits there."""
        import torch

        with torch.inference_mode():
            logits: torch.Tensor = self._model(*tensors)
        return logits

    def close(self) -> None:
        """See `Engine.close`."""
        del self._model


class CompiledEngine(GpuEngine):
    """The network in half or single precision, compiled; each shape of `shapes` replays its own CUDA graph.

    Construction compiles (about a minute; seconds where inductor's cache has it) and may be done in a thread. Capture
    happens at a shape's first batch, in the thread that scores.
    """

    provider = "torch-compiled"

    def __init__(
        self, predictor: "MultiModalPredictor", spec: FeatureSpec, precision: Precision, shapes: Shapes
    ) -> None:
        import torch

        start = time.perf_counter()
        self.precision = precision
        self.device = device_name(CUDA)
        self._shapes = shapes
        self._names = [item.name for item in describe_inputs(spec)]
        self._model = flat_model(predictor, spec, precision).to(CUDA)
        # Convolutions in half want it.
        self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._compiled = torch.compile(self._model)
        self._graphs = Graphs(lambda tensors: self._compiled(*tensors))
        arrays = synthetic_arrays(spec, rows=shapes.rows[-1], tokens=shapes.tokens[-1] if shapes.tokens else 0)
        tensors = [to_tensor(arrays[name], CUDA) for name in self._names]
        # Rows and tokens alone are free: with dynamic=True the pixels' height and width would be too (30 % slower).
        for item, tensor in zip(describe_inputs(spec), tensors, strict=True):
            for axis, size in enumerate(item.shape):
                if size in (ROWS, TOKENS):
                    torch._dynamo.mark_dynamic(tensor, axis)
        with torch.inference_mode():
            self._compiled(*tensors)
        torch.cuda.synchronize()
        self.build_s = time.perf_counter() - start

    def run(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """Flat tensors of one of the engine's shapes, on the GPU -> logits there, valid until the next call."""
        return self._graphs(tensors)

    def close(self) -> None:
        """See `Engine.close`."""
        self._graphs.clear()
        del self._compiled, self._model
