"""Export: a predictor's whole network as ONNX, with flat inputs and logits alone.

Owns the trace and what makes a graph fast for one kind of engine: fused attention for ONNX Runtime, half precision with
float32 islands. The inputs are `flat.py`'s; what runs a graph is `engines/`'s. Upstream's own export fails for every fusion
model in AutoGluon 1.6.3 and freezes the batch of `ft_transformer` at 2.
"""

import builtins
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scoring.flat import ROWS, Precision, describe_inputs, flat_model, synthetic_arrays
from scoring.spec import FeatureSpec

if TYPE_CHECKING:
    import onnx
    from autogluon.multimodal import MultiModalPredictor

logger = logging.getLogger(__name__)

EXPORT_VERSION = 3
"""Raised when the same predictor would export to another graph: part of every cache key."""

# 17 is the first with LayerNormalization; TensorRT 10, TensorRT for RTX and ONNX Runtime's fusions all take it.
_OPSET = 17
# A protobuf ends at 2 GiB; beyond this the weights go into a file of their own.
_EXTERNAL_BYTES = 2**31 - 2**26
# Sums of squares and exponentials overflow at 65,504 in half; TensorRT computes them in the type it is given.
_TENSORRT_FLOAT32 = ("LayerNormalization", "Softmax", "Pow", "ReduceMean", "ReduceSum", "Sqrt", "Exp", "Reciprocal")

_RGB = 3

Target = Literal["onnxruntime", "tensorrt"]


def export_onnx(predictor: "MultiModalPredictor", spec: FeatureSpec, path: Path) -> None:
    """Trace the network in fp32 and write it to `path` (weights beside it above 2 GiB).

    Rows, tokens and images a row stay free. Raises whatever the trace raises for a model that cannot be exported.
    """
    import torch

    model = flat_model(predictor, spec, "fp32", for_export=True)
    inputs = describe_inputs(spec)
    # Three rows and odd sizes: a size of 1 would be traced as one that broadcasts.
    tokens = min([17, *(text_model.max_len for text_model in spec.text_models)])
    arrays = synthetic_arrays(spec, rows=3, tokens=tokens)
    free = {item.name: {axis: size for axis, size in enumerate(item.shape) if isinstance(size, str)} for item in inputs}
    with torch.no_grad(), traceable_len():
        torch.onnx.export(
            model,
            tuple(torch.from_numpy(arrays[item.name]) for item in inputs),
            str(path),
            input_names=[item.name for item in inputs],
            output_names=["logits"],
            dynamic_axes={**free, "logits": {0: ROWS}},
            opset_version=_OPSET,
            # The graph of torch's newer exporter has other patterns, in which no attention is fused.
            dynamo=False,
        )


@contextmanager
def traceable_len() -> Iterator[None]:
    """Let `len(tensor)` in upstream's transformer be traced: as built in, it freezes the number of rows."""
    import torch
    from autogluon.multimodal.models import custom_transformer

    def traceable(value: Any) -> Any:
        return value.shape[0] if isinstance(value, torch.Tensor) else builtins.len(value)

    custom_transformer.len = traceable
    try:
        yield
    finally:
        del custom_transformer.len


@dataclass(frozen=True)
class AttentionShape:
    """Heads and width of the text model, which the optimizer cannot read from a graph with free axes; 0 if unknown."""

    num_heads: int = 0
    hidden_size: int = 0

    @staticmethod
    def of(predictor: "MultiModalPredictor") -> "AttentionShape":
        """The shape that all of a predictor's text models share; where they differ, attention stays unfused."""
        configs = [module.config for module in predictor._learner._model.modules() if _is_text_model(module)]
        shapes = {
            AttentionShape(getattr(config, "num_attention_heads", 0), getattr(config, "hidden_size", 0))
            for config in configs
        }
        return shapes.pop() if len(shapes) == 1 else AttentionShape()


def _is_text_model(module: Any) -> bool:
    from autogluon.multimodal.models.hf_text import HFAutoModelForTextPrediction

    return isinstance(module, HFAutoModelForTextPrediction)


def optimize_graph(
    source: Path, target: Path, precision: Precision, runs_on: Target, attention: AttentionShape
) -> None:
    """Rewrite an exported graph for one kind of engine: fused for ONNX Runtime, plain for TensorRT; fp16 or fp32."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.onnx_model import OnnxModel
    from onnxruntime.transformers.optimizer import optimize_model

    # Its modules are loaded under bare names and tell every node they fuse at INFO.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("fusion_", "onnx_model", "optimizer", "onnx_utils")):
            logging.getLogger(name).setLevel(logging.WARNING)
    if runs_on == "onnxruntime":
        options = FusionOptions("bert")
        # Only attention in a text model needs it, and for a Swin it is 95 % of two minutes.
        options.enable_shape_inference = attention.num_heads > 0
        # opt_level 0: fusions alone. The session makes its own rewrites for the provider it runs on.
        graph = optimize_model(
            str(source),
            model_type="bert",
            num_heads=attention.num_heads,
            hidden_size=attention.hidden_size,
            opt_level=0,
            use_gpu=False,
            optimization_options=options,
        )
    else:
        graph = OnnxModel(_load(source))
    if precision == "fp16":
        # TensorRT fuses the scaling of pixels and does it in float32, as our own forward does, outside upstream's model.
        # ONNX Runtime runs it node by node, and in float32 that is 3 GB of traffic for 512 images. The names are the
        # exported graph's, since a fused node has a new one.
        is_plain = runs_on == "tensorrt"
        graph.convert_float_to_float16(
            keep_io_types=True,
            op_block_list=_blocked_ops(_TENSORRT_FLOAT32 if is_plain else ()),
            node_block_list=[name for name in _node_names(source) if is_plain and not name.startswith("/model")],
            disable_shape_infer=_is_large(graph.model),
        )
    _drop_repeated_casts(graph.model)
    _join_turned_images(graph.model)
    graph.save_model_to_file(str(target), use_external_data_format=_is_large(graph.model))


def _drop_repeated_casts(model: "onnx.ModelProto") -> None:
    """Keep one of the equal casts that the fp16 converter adds where two float32 islands read one value."""
    seen: set[str] = set()
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.output[0] in seen:
            model.graph.node.remove(node)
        seen.add(node.output[0])


def _join_turned_images(model: "onnx.ModelProto") -> None:
    """Give a first convolution the turned images themselves, without the reshapes to images a row and back in between.

    Only then does ONNX Runtime see that turning to channels first and its own turning back cancel.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    channels = {tensor.name: tensor.dims[1] for tensor in model.graph.initializer if len(tensor.dims) == 4}
    for node in model.graph.node:
        if node.op_type != "Conv" or channels.get(node.input[1]) != _RGB:
            continue
        source = producers.get(node.input[0])
        while source is not None and source.op_type == "Reshape":
            source = producers.get(source.input[0])
        if source is not None and source.op_type == "Transpose" and list(source.attribute[0].ints) == [0, 3, 1, 2]:
            node.input[0] = source.output[0]


def _node_names(path: Path) -> list[str]:
    import onnx

    return [node.name for node in onnx.load(str(path), load_external_data=False).graph.node]


def _load(path: Path) -> "onnx.ModelProto":
    import onnx

    return onnx.load(str(path))


def _is_large(model: "onnx.ModelProto") -> bool:
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    return weights > _EXTERNAL_BYTES


def _blocked_ops(extra: tuple[str, ...]) -> list[str]:
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST

    return [*DEFAULT_OP_BLOCK_LIST, *extra]


def count_fused(path: Path) -> dict[str, int]:
    """How many layers ONNX Runtime's optimizer fused, by kind."""
    kinds = ("Attention", "MultiHeadAttention", "SkipLayerNormalization", "BiasGelu", "EmbedLayerNormalization")
    import onnx

    ops = [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]
    return {kind: ops.count(kind) for kind in kinds if kind in ops}
