"""The ONNX Runtime engines: cpu, cuda and TensorRT 10, on a graph from `export.py`.

Owns sessions, their options and what is bound where. A session that silently falls back to another provider is refused:
what runs is read back from it.
"""

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scoring.decision import describe_error
from scoring.engines.base import EngineUnavailable, Shapes, repeat_last, sizes_of
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
# The row count that is planned for before the first batch: 128 of 512, at 3/4 of whose rate it runs, and the largest that the
# longest texts leave whole.
_PARTS_FROM_END = 3
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
    which took image batches that alternated between 64 and 16 rows to 108 rows/s on an H100. One session plans before the
    first batch; a thread lets the others plan, and until they have, batches go through those that have, in parts.
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
        self._sessions = self._open_sessions()
        self._bound = {item.name for item in next(iter(self._sessions.values())).get_inputs()}
        # Row counts whose sessions have planned; replaced as a whole, since threads read it.
        self._planned: tuple[int, ...] = ()
        self._planner: threading.Thread | None = None
        self._is_closed = False

    def _open_sessions(self) -> "dict[int, onnxruntime.InferenceSession]":
        """By row count; 0 is any."""
        import onnxruntime

        def new_session() -> onnxruntime.InferenceSession:
            return _session(self._graph, onnxruntime.SessionOptions(), self.provider, self._options)

        if not self._is_planned:
            return {0: new_session()}
        # 2 s each.
        first, *others = self._shapes.rows
        sessions = {first: new_session()}
        with ThreadPoolExecutor(max_workers=max(1, len(others))) as pool:
            opened = [pool.submit(new_session) for _ in others]
        return sessions | {rows: session.result() for rows, session in zip(others, opened, strict=True)}

    def run(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """Flat tensors on the GPU -> logits there; nothing passes through the host, and the host does not wait."""
        import torch

        rows, planned = len(tensors[0]), self._planned
        if not planned or rows in planned:
            return self._run(tensors)
        # The least work, in the fewest parts.
        count = min(planned, key=lambda count: (-(-rows // count) * count, -count))
        parts = [[tensor[start : start + count] for tensor in tensors] for start in range(0, rows, count)]
        return torch.cat([self._run(_fill(part, count))[: len(part[0])] for part in parts])

    def _run(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """As `run`, of as many rows as a session plans for."""
        import torch

        # Not as CUDA graphs, which gave 29,300 rows/s instead of 27,700 alone: both jobs that replayed them were wrong (3 of 64
        # labels of the sample, by up to 0.39), though in one process not one row of 140 windows differed.
        rows = len(tensors[0])
        session = self._sessions[rows] if self._is_planned else self._sessions[0]
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
        """Be ready for a first batch; a thread plans for the other row counts.

        Each takes 2 s on an H100, and no two of them at once. Raises what ONNX Runtime raises where it has no kernels for the
        network.
        """
        if not self._is_planned:
            self._run_zeros(self._shapes.rows[-1])
            return
        # Parts of a large batch are no more work, and take no more memory, than the batch; padded to one they would.
        counts = list(self._shapes.rows)
        first = counts.pop(max(0, len(counts) - _PARTS_FROM_END))
        self._run_zeros(first)
        self._planned = (first,)
        self._planner = threading.Thread(target=self._plan, args=(counts[::-1],), name="plan", daemon=True)
        self._planner.start()

    def _plan(self, counts: Sequence[int]) -> None:
        for count in counts:
            if self._is_closed:
                return
            try:
                self._run_zeros(count)
            except Exception as error:
                # The counts that are planned do as well, less fast.
                logger.warning("engine: no batches of %d rows: %s", count, describe_error(error))
            else:
                self._planned = (*self._planned, count)

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""
        if self._planner is not None:
            self._planner.join()

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
        self._is_closed = True
        self.warm_up()
        self._sessions.clear()


def _fill(tensors: "list[torch.Tensor]", rows: int) -> "list[torch.Tensor]":
    """Tensors of fewer rows grown to `rows`, their last one repeated."""
    missing = rows - len(tensors[0])
    return [repeat_last(tensor, missing) for tensor in tensors] if missing else tensors


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
