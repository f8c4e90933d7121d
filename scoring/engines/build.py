"""Building engines: what each one needs is exported, rewritten and compiled once, through the cache.

Owns the request an engine is built for, the cache keys and the providers' preconditions. Which engine is used is
`engine.py`'s choice.
"""

import ctypes
import importlib.util
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scoring.decision import COMPILED, describe_error
from scoring.engines.base import Engine, EngineUnavailable, Shapes, num_rows
from scoring.engines.cache import EngineCache, Key
from scoring.export import EXPORT_VERSION, AttentionShape, Target, export_onnx, optimize_graph
from scoring.flat import BatchArrays, Precision, synthetic_arrays
from scoring.parity import Scores
from scoring.spec import FeatureSpec

if TYPE_CHECKING:
    from autogluon.multimodal import MultiModalPredictor


logger = logging.getLogger(__name__)

DEFAULT_CACHE = "~/.cache/multimodal-scorer"


@dataclass(frozen=True)
class EngineRequest:
    """What an engine is wanted for.

    `sample` gives micro-batches of the run's own rows, for the gate and the clock; `rows_left` what remains to be scored on
    this device (None: unknown, and any build pays).
    """

    load: "Callable[[], MultiModalPredictor]"
    """Gives the predictor to whoever needs it: importing AutoGluon takes 20 to 30 s, and an engine that is in the cache does
    without."""
    spec: FeatureSpec
    cache: EngineCache
    provider: str = "auto"
    precision: str = "auto"
    batch_rows: int = 256
    num_threads: int = 1
    sample: Callable[[], Sequence[BatchArrays]] | None = None
    timed: Callable[[], Sequence[BatchArrays]] | None = None
    """Micro-batches as the run will have them, for the clock (none: the sample's, which are smaller)."""
    reference: Callable[[], Scores] | None = None
    """Upstream's scores of the sample's rows, in its order; without it, or where it raises, the fp32 network's."""
    rows_left: int | None = None
    max_abs_diff: float = 0.005
    compile: Literal["auto", "always", "never"] = "auto"
    """Where no earlier run has left the compiled engine: beside the first one if it pays, waited for, or not at all."""
    provider_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """ONNX Runtime options by provider (`cuda`, `tensorrt`), over ours."""
    folder: Path | None = None
    """Where `load` finds the predictor, for a process of its own (None: it is in this process alone)."""

    @property
    def predictor(self) -> "MultiModalPredictor":
        """The predictor, loaded now if it was not before."""
        return self.load()

    @property
    def shapes(self) -> Shapes:
        return Shapes.of(self.spec, self.batch_rows)

    def head(self) -> "EngineRequest":
        """The same with the sample's first batch alone."""
        sample, reference = self.sample, self.reference
        if sample is None:
            return self
        rows = None if reference is None else lambda: reference()[: sum(map(num_rows, sample()[:1]))]
        return replace(self, sample=lambda: sample()[:1], reference=rows)


def load_libraries() -> None:
    """Import what engines need and wake the GPU, in a thread beside whatever else a process waits for: 5 s on an H100."""
    # Whoever needs what is missing says so.
    with suppress(ImportError):
        import torch

        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.zeros(1, device="cuda")
        import onnxruntime

        if on_gpu and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()


def has_gpu() -> bool:
    """Whether this process sees a GPU that torch can use."""
    import torch

    return bool(torch.cuda.is_available())


def synthetic_sample(request: EngineRequest) -> list[BatchArrays]:
    """Random valid batches, where no rows are at hand: one of every token step up to 256, at most a full batch of rows."""
    rows = min(request.batch_rows, 64)
    steps = [step for step in request.shapes.tokens if step <= 256] or [
        request.shapes.tokens[0] if request.shapes.tokens else 0
    ]
    return [synthetic_arrays(request.spec, rows=rows, tokens=tokens, seed=i) for i, tokens in enumerate(steps)]


def build_engine(request: EngineRequest, provider: str, precision: Precision) -> tuple[Engine, float]:
    """An engine, and the seconds it took. Raises EngineUnavailable with the reason."""
    start = time.perf_counter()
    engine = _BUILDERS[provider](request, precision)
    return engine, time.perf_counter() - start


def _build_torch(request: EngineRequest, precision: Precision) -> Engine:
    from scoring.engines.torch_engine import TorchEngine

    return TorchEngine(request.predictor, request.spec, precision, use_gpu=has_gpu(), num_threads=request.num_threads)


def _build_cpu(request: EngineRequest, precision: Precision) -> Engine:
    from scoring.engines.onnx_engine import OnnxCpuEngine

    if precision != "fp32":
        raise EngineUnavailable("the cpu engine computes in fp32; set engine.precision=fp32 or auto")
    graph = build_graph(request, precision, "onnxruntime")
    return OnnxCpuEngine(graph, request.num_threads)


def _build_cuda(request: EngineRequest, precision: Precision) -> Engine:
    from scoring.engines.onnx_engine import OnnxGpuEngine, cuda_options

    _need_gpu("cuda")
    graph = build_graph(request, precision, "onnxruntime")
    for options in cuda_options(precision, request.rows_left):
        engine = OnnxGpuEngine(
            graph,
            request.spec,
            precision,
            request.shapes,
            provider="cuda",
            options={**options, **request.provider_options.get("cuda", {})},
            rows_left=request.rows_left,
        )
        try:
            engine.start()  # kernels are looked for at a session's first batch
        except Exception as error:
            engine.close()
            reason = describe_error(error)
            logger.warning("engine: cuda-%s does not run with %s: %s", precision, options, reason)
        else:
            return engine
    raise EngineUnavailable(f"ONNX Runtime's CUDA provider does not run this network: {reason}")


def _build_tensorrt(request: EngineRequest, precision: Precision) -> Engine:
    """TensorRT 10 through ONNX Runtime where its library loads, else TensorRT for RTX where the GPU is one it runs on."""
    _need_gpu("tensorrt")
    missing = _missing_tensorrt()
    if missing is None:
        return _build_tensorrt10(request, precision)
    try:
        return _build_rtx(request, precision)
    except EngineUnavailable as error:
        raise EngineUnavailable(f"TensorRT 10: {missing}; {error}") from error


def _need_gpu(provider: str) -> None:
    if not has_gpu():
        raise EngineUnavailable(f"no GPU is visible to this process, and {provider} needs one")


def _missing_tensorrt() -> str | None:
    library = "libnvinfer.so.10"
    spec = importlib.util.find_spec("tensorrt_libs")
    places = [str(Path(place) / library) for place in (spec.submodule_search_locations or ())] if spec else []
    for place in (*places, library):
        try:
            ctypes.CDLL(place, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return None
    return f"{library} does not load; install multimodal-scorer[tensorrt] (from NVIDIA's index)"


def _build_tensorrt10(request: EngineRequest, precision: Precision) -> Engine:
    from scoring.engines.onnx_engine import OnnxGpuEngine, tensorrt_options

    graph = build_graph(request, precision, "tensorrt")
    # ONNX Runtime names cache files after the graph's structure: two models of one shape would share an engine. A folder a
    # key, filled under the lock of its entry.
    key = _tensorrt_key(request, precision, "tensorrt10", package_version("tensorrt-cu13-libs"), gpu_name())

    def build(folder: Path) -> None:
        options = {
            **tensorrt_options(graph, request.spec, request.shapes, folder),
            **request.provider_options.get("tensorrt", {}),
        }
        engine = OnnxGpuEngine(graph, request.spec, precision, request.shapes, provider="tensorrt", options=options)
        for arrays in synthetic_sample(request)[:1]:
            engine.forward(arrays)
        engine.close()

    folder = request.cache.get(key, build)
    options = {
        **tensorrt_options(graph, request.spec, request.shapes, folder),
        **request.provider_options.get("tensorrt", {}),
    }
    return OnnxGpuEngine(graph, request.spec, precision, request.shapes, provider="tensorrt", options=options)


def _build_rtx(request: EngineRequest, precision: Precision) -> Engine:
    import torch

    from scoring.engines.rtx_engine import CAPABILITIES, RtxEngine

    # An engine for a GPU that is not supported is built for one that is, and refused when it is read, with TensorRT's own
    # words.
    own = "SM{}{}".format(*torch.cuda.get_device_capability(0))
    plan = build_rtx_ahead(request, precision, own if own in CAPABILITIES else "SM89")
    return RtxEngine(plan, request.spec, precision, request.shapes)


def build_rtx_ahead(request: EngineRequest, precision: Precision, capability: str) -> Path:
    """TensorRT for RTX's engine for a GPU generation (`SM89`), built on any machine: 2 to 6 s on two cores.

    Raises EngineUnavailable when the package is missing or the graph is not one that it takes.
    """
    from scoring.engines.rtx_engine import bindings, build_rtx

    bindings()
    graph = build_graph(request, precision, "tensorrt")
    key = _tensorrt_key(request, precision, "rtx", package_version("tensorrt-rtx-cu13-libs"), capability)
    folder = request.cache.get(
        key, lambda place: build_rtx(graph, request.spec, request.shapes, capability, place / "engine.plan")
    )
    return folder / "engine.plan"


def _build_compiled(request: EngineRequest, precision: Precision) -> Engine:
    from scoring.engines.compiled import build_compiled

    _need_gpu(COMPILED)
    return build_compiled(request, precision)


_BUILDERS: Mapping[str, Callable[[EngineRequest, Precision], Engine]] = {
    "torch": _build_torch,
    "cpu": _build_cpu,
    "cuda": _build_cuda,
    "tensorrt": _build_tensorrt,
    COMPILED: _build_compiled,
}


def build_graph(request: EngineRequest, precision: Precision, runs_on: Target) -> Path:
    """The exported graph in its form for one kind of engine, from the cache or made now."""
    export_parts = _export_parts(request)

    def build(folder: Path) -> None:
        exported = request.cache.get(
            Key("export", export_parts),
            lambda place: export_onnx(request.predictor, request.spec, place / "model.onnx"),
        )
        attention = AttentionShape.of(request.predictor)
        optimize_graph(exported / "model.onnx", folder / "model.onnx", precision, runs_on, attention)

    return request.cache.get(_graph_key(request, precision, runs_on), build) / "model.onnx"


def is_exported(request: EngineRequest, provider: str, precision: Precision) -> bool:
    """Whether this engine's graph is in the cache: then building it does not touch the predictor."""
    return provider in ("cuda", "cpu") and request.cache.find(_graph_key(request, precision, "onnxruntime")) is not None


def _graph_key(request: EngineRequest, precision: Precision, runs_on: Target) -> Key:
    parts = {"precision": precision, "runs_on": runs_on, "optimizer": _onnxruntime_version()}
    return Key("graph", {**_export_parts(request), **parts})


def _export_parts(request: EngineRequest) -> dict[str, str]:
    parts = {"weights": request.spec.weights, "export": str(EXPORT_VERSION), "onnx": package_version("onnx")}
    return {**parts, **library_versions()}


def library_versions() -> dict[str, str]:
    """The libraries that a network is made of."""
    return {name: package_version(name) for name in ("torch", "transformers", "timm", "autogluon.multimodal")}


def versions() -> dict[str, str]:
    """What an engine's rate depends on beside its network: the form of our graphs and the libraries that run them."""
    return {"export": str(EXPORT_VERSION), "onnxruntime": _onnxruntime_version(), **library_versions()}


def _tensorrt_key(request: EngineRequest, precision: Precision, kind: str, library: str, device: str) -> Key:
    return Key(
        kind,
        {
            "weights": request.spec.weights,
            "export": str(EXPORT_VERSION),
            "precision": precision,
            "library": library,
            "onnxruntime": _onnxruntime_version(),
            "device": device,
            "shapes": json.dumps([request.shapes.rows, request.shapes.tokens]),
        },
    )


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _onnxruntime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def gpu_name() -> str:
    """The GPU's product name and compute capability."""
    import torch

    return "{} {}.{}".format(torch.cuda.get_device_name(0), *torch.cuda.get_device_capability(0))
