"""Engines: what runs the forward pass, how one is chosen, and the decision that says why.

Owns the small interface (named arrays in, logits out) and the torch engine. Collating rows into arrays and turning
logits into probabilities is `scorer.py`'s.

Named arrays of a batch of n rows: `numerical` (n, columns) float32; `categorical` (n, columns) int32; for a text model's
prefix `<prefix>:token_ids` and `:segment_ids` (n, tokens) int32, `:valid_length` (n,) int64; for an image model's
`<prefix>:pixels` (n, images, size, size, 3) uint8, `:valid_num` and `:image_num` (n,) int64, the images that are real,
and the real and blank ones together (the rest of the axis is padding).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from scoring.spec import FeatureSpec

if TYPE_CHECKING:
    import torch
    from autogluon.multimodal import MultiModalPredictor

BatchArrays = Mapping[str, npt.NDArray[Any]]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EngineDecision:
    """Which engine a run uses and why; stored in the manifest."""

    provider: str
    precision: str
    device: str
    reason: str

    @property
    def name(self) -> str:
        return f"{self.provider}-{self.precision}-{self.device}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


class Engine(Protocol):
    """Runs a predictor's model on named arrays."""

    decision: EngineDecision

    def forward(self, arrays: BatchArrays) -> Logits:
        """Logits (n, classes) or (n, 1) of a batch, float32 on the host, rows in order."""

    def close(self) -> None:
        """Free the model's memory; the engine is not used again."""


class TorchEngine:
    """The predictor's own torch model, eager, in fp32 with TF32 off: the reference arithmetic."""

    def __init__(self, predictor: "MultiModalPredictor", spec: FeatureSpec, num_threads: int) -> None:
        import torch

        has_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda" if has_gpu else "cpu")
        if has_gpu:
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        else:
            torch.set_num_threads(num_threads)
        self._spec = spec
        self._learner = predictor._learner
        self._model = self._learner._model.to(self._device).eval()
        self._scales = {
            model.prefix: (self._channels(model.mean), self._channels(model.std)) for model in spec.image_models
        }
        device = torch.cuda.get_device_name(0) if has_gpu else "cpu"
        reason = "a GPU is visible" if has_gpu else "no GPU is visible to this actor"
        self.decision = EngineDecision("torch", "fp32", device, reason)

    def _channels(self, values: tuple[float, ...]) -> "torch.Tensor":
        import torch

        return torch.tensor(values, dtype=torch.float32, device=self._device).view(1, 1, len(values), 1, 1)

    def forward(self, arrays: BatchArrays) -> Logits:
        """See `Engine.forward`."""
        import torch
        from autogluon.multimodal.models.utils import run_model

        with torch.inference_mode():
            output = run_model(self._model, self._upstream_batch(arrays))
            if self._learner._model_postprocess_fn:
                output = self._learner._model_postprocess_fn(output)
            logits = output[self._model.prefix]["logits"]
        result: Logits = logits.float().cpu().numpy()
        return result

    def _upstream_batch(self, arrays: BatchArrays) -> dict[str, Any]:
        """Named arrays -> the keys, dtypes and shapes that upstream's collators give a model."""
        batch: dict[str, Any] = {}
        for prefix in self._spec.numerical_models if "numerical" in arrays else ():
            batch[f"{prefix}_numerical"] = self._tensor(arrays["numerical"])
        for prefix in self._spec.categorical_models if "categorical" in arrays else ():
            batch[f"{prefix}_categorical"] = tuple(self._tensor(arrays["categorical"]).unbind(1))
        for text_model in self._spec.text_models if self._spec.text else ():
            for key in ("token_ids", "segment_ids", "valid_length"):
                batch[f"{text_model.prefix}_text_{key}"] = self._tensor(arrays[f"{text_model.prefix}:{key}"])
        for image_model in self._spec.image_models if self._spec.image else ():
            batch |= self._images(image_model.prefix, arrays)
        return batch

    def _images(self, prefix: str, arrays: BatchArrays) -> dict[str, "torch.Tensor"]:
        import torch

        mean, std = self._scales[prefix]
        pixels = self._tensor(arrays[f"{prefix}:pixels"]).permute(0, 1, 4, 2, 3)
        images = pixels.to(torch.float32).div_(255).sub_(mean).div_(std)
        num_images = self._tensor(arrays[f"{prefix}:image_num"])
        padding = torch.arange(images.shape[1], device=self._device)[None, :] >= num_images[:, None]
        # Padding is 0 after normalising, a blank image is 0 before it (PadCollator; process_one_sample).
        images.masked_fill_(padding[:, :, None, None, None], 0.0)
        return {f"{prefix}_image": images, f"{prefix}_image_valid_num": self._tensor(arrays[f"{prefix}:valid_num"])}

    def _tensor(self, array: npt.NDArray[Any]) -> "torch.Tensor":
        import torch

        # Arrow's buffers are read-only, which torch warns about; the large arrays (pixels) are ours and not copied.
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self._device)

    def close(self) -> None:
        """See `Engine.close`."""
        self._model.to("cpu")
