"""From logits to what is written: probabilities and labels by upstream's own functions.

Owns the post-processing that comes after a network, whatever engine ran it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.flat import Logits
from scoring.spec import FeatureSpec, Scalar

if TYPE_CHECKING:
    from autogluon.multimodal import MultiModalPredictor


def score_fields(spec: FeatureSpec) -> list[pa.Field]:
    """The columns a scored row gains: `proba_<class>` float32 in class order, and `prediction`."""
    probabilities = [pa.field(f"proba_{label}", pa.float32()) for label in spec.class_labels]
    return [*probabilities, pa.field("prediction", prediction_type(spec))]


def prediction_type(spec: FeatureSpec) -> pa.DataType:
    """float32 for regression, else the type of the class labels (text where they mix)."""
    if spec.is_regression:
        return pa.float32()
    kinds = {type(label) for label in spec.class_labels}
    types: dict[type, pa.DataType] = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return types[kinds.pop()] if len(kinds) == 1 else pa.string()


class Outputs:
    """A predictor's post-processing: its sigmoid where it was trained with one, softmax, label encoder and scaler."""

    def __init__(self, predictor: "MultiModalPredictor", spec: FeatureSpec) -> None:
        self._learner = predictor._learner
        self._spec = spec

    def columns(self, logits: Logits) -> list[list[Any] | npt.NDArray[Any]]:
        """Finite logits (n, classes) -> the values of `score_fields`."""
        if not len(logits):
            return [[] for _ in score_fields(self._spec)]
        logits = self._postprocess(logits)
        predicted = self._learner._df_preprocessor.transform_prediction(y_pred=logits)
        if self._spec.is_regression:
            return [np.asarray(predicted, dtype=np.float32).reshape(-1)]
        probabilities = self._probabilities(logits)
        as_text = prediction_type(self._spec) == pa.string()
        labels: list[Scalar] = np.asarray(predicted).tolist()
        columns: list[list[Any] | npt.NDArray[Any]] = [probabilities[:, i] for i in range(probabilities.shape[1])]
        return [*columns, [str(label) for label in labels] if as_text else labels]

    def comparable(self, logits: Logits) -> npt.NDArray[np.float32]:
        """Logits -> what differences are measured in: probabilities (n, classes), or standard deviations of the label."""
        logits = self._postprocess(logits)
        if not self._spec.is_regression:
            return self._probabilities(logits)
        predicted = self._learner._df_preprocessor.transform_prediction(y_pred=logits)
        unit = float(self._learner._df_preprocessor.label_scaler.scale_[0])
        return np.asarray(predicted, dtype=np.float32).reshape(-1, 1) / np.float32(unit)

    def _probabilities(self, logits: Logits) -> npt.NDArray[np.float32]:
        from autogluon.multimodal.utils.misc import logits_to_prob

        return np.asarray(logits_to_prob(logits), dtype=np.float32)

    def _postprocess(self, logits: Logits) -> Logits:
        apply = self._learner._model_postprocess_fn
        if not apply:
            return logits
        import torch

        prefix = self._learner._model.prefix
        done: Logits = apply({prefix: {"logits": torch.from_numpy(logits)}})[prefix]["logits"].numpy()
        return done
