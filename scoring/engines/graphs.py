"""CUDA graphs of a network's forward: what a CPU launches in hundreds of calls a batch, launched in one.

Owns capture, its check and the buffers.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from scoring.streams import new_stream

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# What a replay may differ from a plain run by, as a share of the largest logit: kernels may add up in another order.
_TOLERANCE = 2e-3


class Graphs:
    """Replays `run`, flat tensors on the GPU -> logits there, by a graph a shape; a shape is captured when it first comes.

    Each graph is checked against a plain run of other rows. A shape that cannot be captured is run plainly, which is said.
    For one thread at a time.
    """

    def __init__(self, run: "Callable[[list[torch.Tensor]], torch.Tensor]") -> None:
        self._run = run
        # All captures: cuDNN plans each convolution for each thread, 2 to 3 s a row count (7 s the first) for the seed model on
        # an H100. Run by whichever of four threads scored, a compiled engine's first windows took 27 s.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="capture")
        self._stream = new_stream()
        self._pool: Any = None
        self._graphs: dict[tuple[tuple[int, ...], ...], _Graph | None] = {}
        # By place and shape: graphs run one after the other, and pixels of 512 rows are 77 MB.
        self._buffers: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}

    def __call__(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """Logits, valid until the next call."""
        import torch

        key = tuple(tuple(tensor.shape) for tensor in tensors)
        if key not in self._graphs:
            self._graphs[key] = self._thread.submit(self._capture, tensors, torch.cuda.current_stream()).result()
        graph = self._graphs[key]
        if graph is not None:
            return graph.replay(tensors)
        with torch.inference_mode():
            return self._run(tensors)

    def clear(self) -> None:
        """Free the graphs and their memory."""
        self._thread.shutdown()
        self._graphs.clear()
        self._buffers.clear()

    def _memory(self) -> Any:
        """The graphs' common memory; torch takes it back with the last of them."""
        import torch

        if not any(self._graphs.values()):
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def _capture(self, tensors: "list[torch.Tensor]", caller: "torch.cuda.Stream") -> "_Graph | None":
        """Captured and checked behind what `caller` has to do so far, which fills `tensors`."""
        import torch

        # Earlier windows are done and on their way first: the run that plans holds Python's one interpreter for seconds
        # (pytorch 197516), and their scores would wait for it.
        caller.synchronize()
        with torch.cuda.stream(caller):
            return self._capture_here(tensors)

    def _capture_here(self, tensors: "list[torch.Tensor]") -> "_Graph | None":
        import torch

        shape = tuple(tensors[0].shape[:1])
        # Not as inference tensors: torch.compile would compile anew for them.
        with torch.inference_mode(mode=False):
            inputs = [
                self._buffers.setdefault((place, tuple(tensor.shape)), torch.empty_like(tensor))
                for place, tensor in enumerate(tensors)
            ]
        try:
            graph = _Graph(self._run, inputs, tensors, self._stream, self._memory())
        except RuntimeError as error:
            logger.warning(
                "engine: a batch of %s cannot be captured as a CUDA graph, it runs without: %s", shape, error
            )
            return None
        # Rows in another order: a graph that had kept what it was captured with would differ.
        turned = [tensor.flip(0).contiguous() for tensor in tensors]
        with torch.inference_mode():
            wanted = self._run(turned).clone()
        found = graph.replay(turned)
        limit = _TOLERANCE * max(1e-3, float(wanted.nan_to_num(0.0, 0.0, 0.0).abs().max()))
        if not torch.allclose(wanted, found, rtol=0.0, atol=limit, equal_nan=True):
            worst = float((wanted - found).abs().max())
            logger.warning(
                "engine: the CUDA graph for batches of %s differs by %.1e from a plain run, they run without",
                *(shape, worst),
            )
            return None
        return graph


class _Graph:
    """One captured forward: inputs are copied into its buffers, logits stay in its own. Raises RuntimeError."""

    def __init__(
        self,
        run: Any,
        inputs: "list[torch.Tensor]",
        tensors: "list[torch.Tensor]",
        stream: "torch.cuda.Stream",
        pool: Any,
    ) -> None:
        import torch

        self._inputs = inputs
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            self._fill(tensors)
            for _ in range(2):  # cuBLAS and cuDNN make their workspaces at a first call, which cannot be captured
                run(inputs)
            stream.synchronize()
            # thread_local: what other threads do meanwhile (a reader's allocation) does not spoil the capture.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._logits = run(inputs)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def _fill(self, tensors: "list[torch.Tensor]") -> None:
        for buffer, tensor in zip(self._inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)

    def replay(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        import torch

        with torch.inference_mode():
            self._fill(tensors)
            self._graph.replay()
        logits: torch.Tensor = self._logits
        return logits
