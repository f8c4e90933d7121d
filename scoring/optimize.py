"""What `optimize_for_inference` puts into a predictor: an engine that answers like its network.

Owns the module that takes the network's place and the way back from upstream's batches to named arrays. Which engine it is
is `engine.py`'s choice.
"""

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scoring.engines.base import Engine, num_rows
from scoring.flat import BatchArrays, Logits
from scoring.predictor import original_model
from scoring.spec import FeatureSpec, ImageModel

if TYPE_CHECKING:
    import torch
    from autogluon.multimodal import MultiModalPredictor

PROVIDERS = {
    "TensorrtExecutionProvider": "tensorrt",
    "CUDAExecutionProvider": "cuda",
    "CPUExecutionProvider": "cpu",
}
_REFIT = (
    "optimize_for_inference() changed this predictor for inference only, so that fit() cannot continue from it; reload it "
    "with MultiModalPredictor.load() and call fit() on that"
)


def install(
    predictor: "MultiModalPredictor", engine: Engine, spec: FeatureSpec, batch_rows: int, again: Callable[..., Any]
) -> None:
    """Let `predict`, `predict_proba` and `evaluate` use the engine, `batch_rows` at a time; `again` becomes the
    predictor's own method."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(_REFIT)

    predictor._learner._model = _engine_module(original_model(predictor), engine, spec, batch_rows)
    predictor.optimize_for_inference = again
    predictor.fit = refuse


def _engine_module(
    original: "torch.nn.Module", engine: Engine, spec: FeatureSpec, batch_rows: int
) -> "torch.nn.Module":
    import torch

    class EngineModule(torch.nn.Module):
        """Takes upstream's batch and returns logits as upstream's models do; its weights stay the original's."""

        def __init__(self) -> None:
            super().__init__()
            # Not registered as a submodule: nobody should move it to a GPU that the engine fills.
            self.__dict__["original"] = original
            self.prefix = str(original.prefix)
            self._engine = engine
            self._lock = threading.Lock()

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.__dict__["original"], name)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            """The original's weights: a predictor saved after this is the one that was fitted."""
            return self.__dict__["original"].state_dict(*args, **kwargs)

        def forward(self, batch: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
            # A predictor fitted on a GPU predicts under autocast, which the engine's own precision must not see: a compiled
            # network would be compiled again.
            with self._lock, torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
                logits = self._forward(named_arrays(batch, spec))
            found = torch.from_numpy(logits)
            return {self.prefix: {"logits": found.to(_device_of(batch))}}

        def _forward(self, arrays: BatchArrays) -> Logits:
            # realtime=True makes one batch of a frame of any length, and an engine is built for `batch_rows` at most.
            starts = range(0, num_rows(arrays), batch_rows)
            pieces = [{name: array[start : start + batch_rows] for name, array in arrays.items()} for start in starts]
            # A copy: an engine may overwrite its logits at the next call.
            return np.concatenate([np.array(self._engine.forward(piece)) for piece in pieces])

    return EngineModule()


def _device_of(batch: Mapping[str, Any]) -> "torch.device":
    first = next(iter(batch.values()))
    device: torch.device = (first[0] if isinstance(first, (tuple, list)) else first).device
    return device


def named_arrays(batch: Mapping[str, Any], spec: FeatureSpec) -> dict[str, npt.NDArray[Any]]:
    """Upstream's collated batch -> named arrays (see `flat.py`); normalised pixels become uint8 again, exactly."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    if spec.numerical_models and spec.numerical:
        arrays["numerical"] = _array(batch[f"{spec.numerical_models[0]}_numerical"], np.float32)
    if spec.categorical_models and spec.categorical:
        columns = batch[f"{spec.categorical_models[0]}_categorical"]
        arrays["categorical"] = np.stack([_array(column, np.int32) for column in columns], axis=1)
    for text_model in spec.text_models if spec.text else ():
        prefix = text_model.prefix
        for key, dtype in (("token_ids", np.int32), ("segment_ids", np.int32), ("valid_length", np.int64)):
            arrays[f"{prefix}:{key}"] = _array(batch[f"{prefix}_text_{key}"], dtype)
    for image_model in spec.image_models if spec.image else ():
        arrays |= _images(batch, image_model)
    return arrays


def _array(tensor: Any, dtype: Any) -> npt.NDArray[Any]:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=dtype)


def _images(batch: Mapping[str, Any], model: ImageModel) -> dict[str, npt.NDArray[Any]]:
    import torch

    images = batch[f"{model.prefix}_image"].float()
    mean = torch.tensor(model.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(model.std, device=images.device).view(3, 1, 1)
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2)
    # The collator pads with images that are 0 after normalising: no photograph is, in every value.
    is_padding = (images == 0).flatten(2).all(dim=2)
    return {
        f"{model.prefix}:pixels": np.ascontiguousarray(pixels.cpu().numpy()),
        f"{model.prefix}:valid_num": _array(batch[f"{model.prefix}_image_valid_num"], np.int64),
        f"{model.prefix}:image_num": _array((~is_padding).sum(dim=1), np.int64),
    }
