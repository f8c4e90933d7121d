"""From logits to what is written: probabilities and labels, to the last bit as upstream's functions make them.

Owns the post-processing that comes after a network, whatever engine ran it; `tests/upstream.py` holds it to AutoGluon's own.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.flat import Logits
from scoring.spec import FeatureSpec


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
    """A predictor's post-processing: its sigmoid where it was trained with one, softmax, class labels and label scaler."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._spec = spec

    def columns(self, logits: Logits) -> list[list[Any] | npt.NDArray[Any]]:
        """Finite logits (n, classes) -> the values of `score_fields`."""
        if not len(logits):
            return [[] for _ in score_fields(self._spec)]
        logits = self._postprocess(logits)
        if self._spec.is_regression:
            return [self._label(logits)]
        probabilities = self._probabilities(logits)
        labels = [self._spec.class_labels[place] for place in logits.argmax(axis=1).tolist()]
        as_text = prediction_type(self._spec) == pa.string()
        columns: list[list[Any] | npt.NDArray[Any]] = [probabilities[:, i] for i in range(probabilities.shape[1])]
        return [*columns, [str(label) for label in labels] if as_text else labels]

    def comparable(self, logits: Logits) -> npt.NDArray[np.float32]:
        """Logits -> what differences are measured in: probabilities (n, classes), or the label's `unit` (n, 1)."""
        logits = self._postprocess(logits)
        if self._spec.label_scaler is None:
            return self._probabilities(logits)
        return self._label(logits).reshape(-1, 1) / np.float32(self._spec.label_scaler.unit)

    def _probabilities(self, logits: Logits) -> npt.NDArray[np.float32]:
        from scipy.special import softmax

        return np.asarray(softmax(logits, axis=1), dtype=np.float32)

    def _label(self, logits: Logits) -> npt.NDArray[np.float32]:
        """Scaled values (n, 1) -> the label's own (n,), in the scaler's order and, as there, rounded to float32 at each step."""
        values, scaler = np.array(logits, dtype=np.float32).reshape(-1), self._spec.label_scaler
        assert scaler is not None, "a regression's spec has one"
        # Arrays, as the scaler's are: numpy would compute with a plain number in float32 throughout.
        scale, offset = np.array([scaler.scale or 1.0]), np.array([scaler.offset or 0.0])
        if scaler.kind == "minmax":
            values -= offset
            values /= scale
        else:
            values *= scale
            values += offset
        return values

    def _postprocess(self, logits: Logits) -> Logits:
        if not self._spec.has_sigmoid:
            return logits
        import torch

        done: Logits = torch.sigmoid(torch.from_numpy(logits)).numpy()
        return done
