"""The ONNX Runtime engines: cpu, cuda and TensorRT 10, on a graph from `export.py`.

Owns sessions, their options and what is bound where. A session that silently falls back to another provider is refused:
what runs is read back from it.
"""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scoring.decision import describe_error
from scoring.engines.base import EngineUnavailable, Shapes, sizes_of
from scoring.engines.row_counts import PLANNED_AFTER_ROWS, plan_first, run_in_parts
from scoring.engines.torch_engine import CUDA, GpuEngine, device_name
from scoring.flat import BatchArrays, Logits, Precision, describe_inputs
from scoring.spec import FeatureSpec
from scoring.streams import new_stream

if TYPE_CHECKING:
    import onnxruntime
    import torch

logger = logging.getLogger(__name__)

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# 11 s a row count, four of them, against a twelfth of 35 us a row.
_FUSED_PAYS_ROWS = 15_000_000
# Planning for batches of 512 rows pays from so many rows on (3.4 s, for about 9 us a row on an H100), and for 256 later. Smaller
# batches are odd ends.
_PAYS_ROWS = (500_000, 7_000_000)
# Two TensorRT workspaces of upstream's 2 GiB starve long texts; the builder takes what it needs of this much.
_TENSORRT_WORKSPACE = 8 * 2**30


class OnnxCpuEngine:
    """ONNX Runtime on the CPU, in fp32."""

    provider = "cpu"
    precision: Precision = "fp32"
    device = "cpu"

    def __init__(self, graph: Path, num_threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # Threads that spin while they wait starve the feature workers on the other cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = _session(graph, options, "cpu", {})
        # An input that the network ignores (segment ids in DeBERTa) is not in its graph.
        self._names = [item.name for item in self._session.get_inputs()]

    def forward(self, arrays: BatchArrays) -> Logits:
        """See `Engine.forward`."""
        # No padding for equal bits (compare `alike`): ONNX Runtime's own kernels add up a row's values in one order, whatever
        # the rows and the padding beside them. Not one of 3,800 padded batches and 450 cuts of a table gave another logit.
        feed = {name: np.ascontiguousarray(arrays[name]) for name in self._names}
        logits: Logits = self._session.run(None, feed)[0]
        return logits

    def submit(self, arrays: BatchArrays) -> Logits:
        """See `Engine.submit`."""
        return self.forward(arrays)

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""

    def close(self) -> None:
        """See `Engine.close`."""
        del self._session


class OnnxGpuEngine(GpuEngine):
    """ONNX Runtime with its CUDA or TensorRT provider; inputs and logits stay on the GPU between host copies.

    With images each row count has a session of its own: ONNX Runtime plans every convolution anew when the count changes,
    which took image batches that alternated between 64 and 16 rows to 108 rows/s on an H100. Planning takes 2 s a count, and what
    runs beside it hardly moves: one count is planned before the first batch, others after the first rows, if they pay.
    Batches of a count without a plan go through the sessions of others, in parts.
    """

    def __init__(
        self,
        graph: Path,
        spec: FeatureSpec,
        precision: Precision,
        shapes: Shapes,
        *,
        provider: str,
        options: Mapping[str, Any],
        rows_left: int | None = None,
    ) -> None:
        import onnxruntime

        self.provider = provider
        self.precision = precision
        self.device = device_name(CUDA)
        self._graph = graph
        self._inputs = describe_inputs(spec)
        self._names = [item.name for item in self._inputs]
        self._width = max(1, len(spec.class_labels))
        self._is_planned = bool(spec.image_models) and provider == "cuda"
        self._shapes = shapes
        self._images = {f"{model.prefix}:images": max(1, len(spec.image)) for model in spec.image_models}
        # A stream of its own that the session shares with us: their order needs no host to wait.
        self._stream = new_stream()
        self._options = {**options, "user_compute_stream": str(self._stream.cuda_stream)}
        self._run_options = onnxruntime.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # By row count; 0 is any.
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}
        self._to_plan = counts_that_pay(shapes.rows, rows_left) if self._is_planned else ()
        self._num_rows = 0
        first = self._open(plan_first(shapes.rows) if self._is_planned else 0)
        self._bound = {item.name for item in first.get_inputs()}

    def _open(self, count: int) -> "onnxruntime.InferenceSession":
        import onnxruntime

        session = _session(self._graph, onnxruntime.SessionOptions(), self.provider, self._options)
        self._sessions[count] = session
        return session

    def run(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """Flat tensors on the GPU -> logits there; nothing passes through the host, and the host does not wait."""
        rows = len(tensors[0])
        if self._to_plan and self._num_rows >= PLANNED_AFTER_ROWS:
            counts, self._to_plan = self._to_plan, ()
            self._plan(counts)
        self._num_rows += rows
        return run_in_parts(self._run, tensors, self._sessions) if self._is_planned else self._run(tensors)

    def _run(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """As `run`, of as many rows as a session plans for."""
        import torch

        # Not as CUDA graphs, which gave 29,300 rows/s instead of 27,700 alone: both jobs that replayed them were wrong (3 of 64
        # labels of the sample, by up to 0.39), though in one process not one row of 140 windows differed.
        rows = len(tensors[0])
        session = self._sessions[rows if self._is_planned else 0]
        binding = session.io_binding()
        for item, tensor in zip(self._inputs, tensors, strict=True):
            if item.name in self._bound:
                binding.bind_input(item.name, "cuda", 0, np.dtype(item.dtype), list(tensor.shape), tensor.data_ptr())
        logits = torch.empty((rows, self._width), dtype=torch.float32, device=CUDA)
        binding.bind_output("logits", "cuda", 0, np.float32, list(logits.shape), logits.data_ptr())
        # The tensors are the caller's stream's: the session starts after it, and it goes on after the session.
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        session.run_with_iobinding(binding, self._run_options)
        caller.wait_stream(self._stream)
        return logits

    def start(self) -> None:
        """Look for kernels before the first batch. Raises what ONNX Runtime raises where it has none for the network."""
        self._run_zeros(next(iter(self._sessions)) or self._shapes.rows[-1])

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""
        if self._is_planned:
            self._to_plan = ()
            counts = counts_that_pay(self._shapes.rows, max(_PAYS_ROWS))
            self._plan([count for count in counts if count not in self._sessions])

    def _plan(self, counts: Sequence[int]) -> None:
        start = time.perf_counter()
        for count in counts:
            try:
                self._open(count)
                self._run_zeros(count)
            except Exception as error:
                self._sessions.pop(count, None)
                logger.warning(
                    "engine: no batches of %d rows: %s; they go through others in parts, less fast",
                    *(count, describe_error(error)),
                    exc_info=True,
                )
        seconds = time.perf_counter() - start
        logger.info("engine: batches of %s rows have a plan now, %.1f s", sorted(self._sessions), seconds)

    def _run_zeros(self, rows: int) -> None:
        import torch

        tokens = min(self._shapes.tokens, default=0)
        tensors = [
            torch.zeros(
                sizes_of(item, rows, tokens, self._images),
                dtype=torch.from_numpy(np.empty(0, dtype=item.dtype)).dtype,
                device=CUDA,
            )
            for item in self._inputs
        ]
        self._run(tensors)
        torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """See `Engine.close`."""
        self._to_plan = ()
        self._sessions.clear()


def counts_that_pay(counts: Sequence[int], rows_left: int | None) -> tuple[int, ...]:
    """What else to plan for in a run of so many rows (None: not known, nothing)."""
    others = [count for count in reversed(counts) if count != plan_first(counts)]
    return tuple(count for count, rows in zip(others, _PAYS_ROWS, strict=False) if (rows_left or 0) >= rows)


def cuda_options(precision: Precision, rows_left: int | None) -> tuple[dict[str, Any], ...]:
    """The CUDA provider's options, the best first; what comes after is for networks that it has no kernels for.

    No TF32 in fp32. In fp16 convolutions may take channels last and add their bias themselves: 31,200 rows/s instead of
    28,600 on an H100, but cuDNN compiles those kernels for every row count anew, 14 s instead of 3, so `rows_left` must be
    many (None: not known, and the rate counts).
    """
    plain = {
        "device_id": 0,
        "use_tf32": "0" if precision == "fp32" else "1",
        # As fast as an exhaustive search for MobileNet's (28,400 and 28,600 rows/s), and found at once.
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
    }
    if precision == "fp32" or (rows_left is not None and rows_left < _FUSED_PAYS_ROWS):
        return (plain,)
    return {**plain, "prefer_nhwc": "1", "fuse_conv_bias": "1"}, plain


def tensorrt_options(graph: Path, spec: FeatureSpec, shapes: Shapes, cache: Path) -> dict[str, Any]:
    """The TensorRT provider's options: one explicit profile over all shapes, engine and timing cache in `cache`."""
    import onnx

    names = {item.name for item in onnx.load(str(graph), load_external_data=False).graph.input}
    low, best, high = (_profile(spec, shapes, place, names) for place in (0, -2, -1))
    return {
        "device_id": 0,
        "trt_max_workspace_size": _TENSORRT_WORKSPACE,
        # The graph is half already, with float32 where half overflows.
        "trt_fp16_enable": True,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache),
        "trt_profile_min_shapes": low,
        "trt_profile_opt_shapes": best,
        "trt_profile_max_shapes": high,
    }


def _profile(spec: FeatureSpec, shapes: Shapes, place: int, names: Collection[str]) -> str:
    rows, tokens = _at(shapes.rows, place), _at(shapes.tokens, place)
    images = {f"{model.prefix}:images": max(1, len(spec.image) * model.max_images) for model in spec.image_models}
    sizes = {item.name: sizes_of(item, rows, tokens, images) for item in describe_inputs(spec) if item.name in names}
    return ",".join(f"{name}:{'x'.join(map(str, size))}" for name, size in sizes.items())


def _at(steps: tuple[int, ...], place: int) -> int:
    return steps[max(place, -len(steps))] if steps else 0


def _session(
    graph: Path, options: "onnxruntime.SessionOptions", provider: str, provider_options: Mapping[str, Any]
) -> "onnxruntime.InferenceSession":
    """A session on that provider. Raises EngineUnavailable when ONNX Runtime would use another one."""
    import onnxruntime

    # Its warnings (unused initialisers, nodes on the CPU) are about the graph, not about the run.
    options.log_severity_level = 3
    name = _PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise EngineUnavailable(f"this onnxruntime has no {name}; install onnxruntime-gpu")
    if provider != "cpu":
        onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(str(graph), options, providers=[(name, dict(provider_options))])
    except Exception as error:
        # ONNX Runtime raises a class of its own a status code; each means that this session cannot be had.
        raise EngineUnavailable(f"{name} refuses the graph: {error}") from error
    if session.get_providers()[0] != name:
        raise EngineUnavailable(f"{name} did not load (ONNX Runtime fell back to {session.get_providers()[0]})")
    session.disable_fallback()
    return session
