"""TensorRT for RTX, through its own API: an engine built ahead of time, on any machine, for one GPU generation.

Owns build and execution. It runs on compute capability 8.0, 8.6, 8.9 and 12.x (A100, A10, L4, L40S, RTX) and refuses 9.0
(H100, H200) when it reads an engine. Building needs no GPU: 6 s on two cores for the seed model.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scoring.engines.base import EngineUnavailable, Shapes, sizes_of
from scoring.engines.torch_engine import CUDA, GpuEngine, device_name
from scoring.flat import Precision, describe_inputs
from scoring.spec import FeatureSpec

if TYPE_CHECKING:
    import torch

CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120")
"""What an engine can be built for, as TensorRT for RTX names it."""


def bindings() -> Any:
    """The `tensorrt_rtx` module. Raises EngineUnavailable when it is not installed."""
    try:
        import tensorrt_rtx
    except ImportError:
        try:
            import tensorrt_rtx_bindings as tensorrt_rtx
        except ImportError as error:
            raise EngineUnavailable(
                "TensorRT for RTX is not installed; install multimodal-scorer[tensorrt-rtx]"
            ) from error
    return tensorrt_rtx


def build_rtx(graph: Path, spec: FeatureSpec, shapes: Shapes, capability: str, target: Path) -> None:
    """Build the engine of a graph for one capability (`SM89`) with the batcher's profile, and write it to `target`.

    Raises EngineUnavailable with the parser's own words when the graph is not one that TensorRT takes.
    """
    trt = bindings()
    messages = _Messages(trt)
    builder = trt.Builder(messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages.logger)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineUnavailable(f"TensorRT for RTX cannot parse {graph.name}: {errors}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    images = {f"{model.prefix}:images": max(1, len(spec.image) * model.max_images) for model in spec.image_models}
    known = {network.get_input(i).name for i in range(network.num_inputs)}
    for item in describe_inputs(spec):
        if item.name in known:
            rows, tokens = shapes.rows, shapes.tokens or (0,)
            sizes = [
                sizes_of(item, count, length, images)
                for count, length in ((1, tokens[0]), (rows[-1], tokens[len(tokens) // 2]), (rows[-1], tokens[-1]))
            ]
            profile.set_shape(item.name, *sizes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineUnavailable(f"TensorRT for RTX cannot build {graph.name} for {capability}: {messages}")
    target.write_bytes(bytes(plan))


class _Messages:
    """Collects what TensorRT logs as an error: its calls return None and say why only there."""

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        errors = self.errors

        class Logger(trt.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR:
                    errors.append(message)

        self.logger = Logger()

    def __str__(self) -> str:
        return "; ".join(self.errors[-3:]) or "no reason given"


class RtxEngine(GpuEngine):
    """Runs an engine that `build_rtx` wrote."""

    provider = "tensorrt"

    def __init__(self, plan: Path, spec: FeatureSpec, precision: Precision, shapes: Shapes) -> None:
        trt = bindings()
        messages = _Messages(trt)
        self.precision = precision
        self.device = device_name(CUDA)
        self._shapes = shapes
        self._inputs = describe_inputs(spec)
        self._names = [item.name for item in self._inputs]
        self._width = max(1, len(spec.class_labels))
        self._runtime = trt.Runtime(messages.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise EngineUnavailable(f"TensorRT for RTX does not run on this {self.device}: {messages}")
        self._context = self._engine.create_execution_context()
        self._bound = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}

    def run(self, tensors: "list[torch.Tensor]") -> "torch.Tensor":
        """Flat tensors on the GPU -> logits there."""
        import torch

        logits = torch.empty((len(tensors[0]), self._width), dtype=torch.float32, device=CUDA)
        for item, tensor in zip(self._inputs, tensors, strict=True):
            if item.name in self._bound:
                self._context.set_input_shape(item.name, tuple(tensor.shape))
                self._context.set_tensor_address(item.name, tensor.data_ptr())
        self._context.set_tensor_address("logits", logits.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT for RTX: execute_async_v3 failed")
        return logits

    def close(self) -> None:
        """See `Engine.close`."""
        del self._context, self._engine, self._runtime
