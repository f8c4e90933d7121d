"""The predictor's network with flat inputs: named arrays in, logits out, in fp32 or fp16.

Owns the names, dtypes and free axes of the inputs and how they become what upstream's models take. It is what
`export.py` traces and what the torch engine runs, so that every engine computes one and the same function. Named arrays
of a batch of n rows: `numerical` (n, columns) float32; `categorical` (n, columns) int32; for a text model's prefix
`<prefix>:token_ids` and `:segment_ids` (n, tokens) int32, `:valid_length` (n,) int64; for an image model's
`<prefix>:pixels` (n, images, size, size, 3) uint8, `:valid_num` and `:image_num` (n,) int64, the images that are real,
and the real and blank ones together (the rest of the axis is padding).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from scoring.spec import FeatureSpec, ImageModel

if TYPE_CHECKING:
    import torch
    from autogluon.multimodal import MultiModalPredictor

Precision = Literal["fp16", "fp32"]
BatchArrays = Mapping[str, npt.NDArray[Any]]
Logits = npt.NDArray[np.float32]

ROWS, TOKENS = "rows", "tokens"


@dataclass(frozen=True)
class Input:
    """One named array: numpy dtype and shape, where a text names a free axis (rows, tokens, images of a model)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def describe_inputs(spec: FeatureSpec) -> tuple[Input, ...]:
    """The named arrays that a predictor's network takes, in the order of its flat arguments."""
    inputs = []
    if spec.numerical_models and spec.numerical:
        inputs.append(Input("numerical", "float32", (ROWS, len(spec.numerical))))
    if spec.categorical_models and spec.categorical:
        inputs.append(Input("categorical", "int32", (ROWS, len(spec.categorical))))
    for text_model in spec.text_models if spec.text else ():
        inputs += [
            Input(f"{text_model.prefix}:token_ids", "int32", (ROWS, TOKENS)),
            Input(f"{text_model.prefix}:segment_ids", "int32", (ROWS, TOKENS)),
            Input(f"{text_model.prefix}:valid_length", "int64", (ROWS,)),
        ]
    for image_model in spec.image_models if spec.image else ():
        prefix, size = image_model.prefix, image_model.size
        inputs += [
            Input(f"{prefix}:pixels", "uint8", (ROWS, f"{prefix}:images", size, size, 3)),
            Input(f"{prefix}:valid_num", "int64", (ROWS,)),
            Input(f"{prefix}:image_num", "int64", (ROWS,)),
        ]
    return tuple(inputs)


def synthetic_arrays(spec: FeatureSpec, *, rows: int, tokens: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Random arrays of a valid batch: codes and token ids in range, scaled numbers, texts of every length up to `tokens`."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for item in describe_inputs(spec):
        if item.name == "numerical":
            arrays[item.name] = rng.normal(size=(rows, len(spec.numerical))).astype(np.float32)
        elif item.name == "categorical":
            sizes = [len(column.values) for column in spec.categorical]
            arrays[item.name] = np.stack([rng.integers(0, max(1, n), rows) for n in sizes], axis=1).astype(np.int32)
    for text_model in spec.text_models if spec.text else ():
        vocabulary = _vocabulary(text_model.tokenizer_json)
        lengths = rng.integers(min(2, tokens), tokens + 1, rows)
        lengths[0] = tokens
        ids = rng.integers(0, vocabulary, (rows, tokens))
        ids[np.arange(tokens)[None, :] >= lengths[:, None]] = text_model.pad_id
        arrays[f"{text_model.prefix}:token_ids"] = ids.astype(np.int32)
        arrays[f"{text_model.prefix}:segment_ids"] = np.zeros((rows, tokens), dtype=np.int32)
        arrays[f"{text_model.prefix}:valid_length"] = lengths.astype(np.int64)
    for image_model in spec.image_models if spec.image else ():
        images = max(1, len(spec.image))
        valid = rng.integers(0, images + 1, rows)
        valid[0] = images
        shape = (rows, images, image_model.size, image_model.size, 3)
        arrays[f"{image_model.prefix}:pixels"] = _natural_pixels(rng, shape)
        arrays[f"{image_model.prefix}:valid_num"] = valid.astype(np.int64)
        arrays[f"{image_model.prefix}:image_num"] = np.full(rows, images, dtype=np.int64)
    return arrays


@cache
def _vocabulary(tokenizer_json: str) -> int:
    from tokenizers import Tokenizer

    return int(Tokenizer.from_str(tokenizer_json).get_vocab_size())


def _natural_pixels(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Blocks of colour with some noise: pure noise leaves a convolution nothing to see."""
    rows, images, size, _, channels = shape
    cells = rng.integers(0, 256, (rows, images, 8, 8, channels), dtype=np.int16)
    repeat = -(-size // 8)
    large = cells.repeat(repeat, axis=2).repeat(repeat, axis=3)[:, :, :size, :size]
    noise = rng.integers(-16, 17, (1, images, size, size, channels), dtype=np.int16)
    pixels: npt.NDArray[np.uint8] = np.clip(large + noise, 0, 255).astype(np.uint8)
    return pixels


def flat_model(
    predictor: "MultiModalPredictor", spec: FeatureSpec, precision: Precision, *, for_export: bool = False
) -> "torch.nn.Module":
    """A copy of the predictor's network on the CPU: flat tensors (see `describe_inputs`) -> logits (n, k) float32.

    The learner's `_model_postprocess_fn` is not in it (see `outputs.py`). `for_export` spells attention out: ONNX Runtime's
    optimizer finds every attention layer then (12 of 12 in ELECTRA), and none of torch's fused ones. It also leaves padding
    images as they are where the model masks their features: the mask over the pixels is 0.3 GB of traffic for 512 rows.
    """
    import torch
    from autogluon.multimodal.models.utils import run_model

    dtype = torch.float16 if precision == "fp16" else torch.float32
    names = [item.name for item in describe_inputs(spec)]
    masked_later = {
        module.prefix
        for module in predictor._learner._model.modules()
        if getattr(module, "mix_choice", None) == "all_logits"
    }

    class FlatModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(predictor._learner._model).to("cpu").eval()
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            self.model.to(dtype)
            # (x / 255 - mean) / std as one product and one sum, in float32 whatever the model's precision.
            for image_model in spec.image_models:
                mean, std = np.array(image_model.mean), np.array(image_model.std)
                for name, values in (("scale", 1 / (255 * std)), ("shift", -mean / std)):
                    constant = torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
                    self.register_buffer(f"{image_model.prefix}_{name}", constant)

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            arrays = dict(zip(names, tensors, strict=True))
            output = run_model(self.model, self.upstream_batch(arrays))
            logits: torch.Tensor = output[self.model.prefix]["logits"]
            return logits.float()

        def upstream_batch(self, arrays: dict[str, torch.Tensor]) -> dict[str, Any]:
            """Named arrays -> the keys, dtypes and shapes that upstream's collators give a model."""
            batch: dict[str, Any] = {}
            for prefix in spec.numerical_models if "numerical" in arrays else ():
                batch[f"{prefix}_numerical"] = arrays["numerical"].to(dtype)
            for prefix in spec.categorical_models if "categorical" in arrays else ():
                batch[f"{prefix}_categorical"] = tuple(arrays["categorical"].unbind(1))
            for text_model in spec.text_models if spec.text else ():
                for key in ("token_ids", "segment_ids", "valid_length"):
                    batch[f"{text_model.prefix}_text_{key}"] = arrays[f"{text_model.prefix}:{key}"]
            for image_model in spec.image_models if spec.image else ():
                batch |= self._images(image_model, arrays)
            return batch

        def _images(self, image_model: ImageModel, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            prefix = image_model.prefix
            # Cast first: TensorRT takes uint8 into a cast and nothing else.
            pixels = arrays[f"{prefix}:pixels"].to(torch.float32)
            scale, shift = getattr(self, f"{prefix}_scale"), getattr(self, f"{prefix}_shift")
            # Upstream divides by this number: as an integer it would lift half features to float32.
            valid_num = arrays[f"{prefix}:valid_num"].to(dtype)
            if for_export and prefix in masked_later:
                # One image axis when they are turned: where the convolutions want channels last, nothing is turned at all
                # (`export.py` joins the two). On an H100 turning 512 images took 1.0 ms of 17.5.
                rows, places, height, width, channels = pixels.shape
                flat = pixels.reshape(rows * places, height, width, channels) * scale.view(3) + shift.view(3)
                images = flat.to(dtype).permute(0, 3, 1, 2).reshape(rows, places, channels, height, width)
                return {f"{prefix}_image": images, f"{prefix}_image_valid_num": valid_num}
            images = (pixels.permute(0, 1, 4, 2, 3) * scale + shift).to(dtype)
            num_images = arrays[f"{prefix}:image_num"]
            padding = torch.arange(pixels.shape[1], device=num_images.device)[None, :] >= num_images[:, None]
            # Padding is 0 after normalising, a blank image is 0 before it (PadCollator; process_one_sample).
            images = images.masked_fill(padding[:, :, None, None, None], 0.0)
            return {f"{prefix}_image": images, f"{prefix}_image_valid_num": valid_num}

    model = FlatModel()
    modules: list[Any] = list(model.modules()) if for_export else []
    for module in modules:
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("eager")
        # timm decides once, when a model is made, whether its attention uses torch's fused kernel.
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model.eval()
