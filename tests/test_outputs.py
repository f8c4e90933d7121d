"""From logits to scores where no predictor of the zoo goes: other label scalers, a sigmoid. `upstream.py` has the zoo's own."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from scoring.outputs import Outputs
from scoring.predictor import _label_scaler
from scoring.spec import FeatureSpec

SPEC = FeatureSpec("y", "regression", (), (), (), (), (), (), (), (), (), False)
LABELS = np.random.default_rng(0).lognormal(3, 2, size=(500, 1))
LOGITS = np.random.default_rng(1).normal(size=(300, 1)).astype(np.float32)


@pytest.mark.parametrize(
    "scaler",
    [
        StandardScaler(),
        StandardScaler(with_mean=False),
        StandardScaler(with_std=False),
        StandardScaler(with_mean=False, with_std=False),
        MinMaxScaler(),
    ],
    ids=str,
)
def test_a_label_is_unscaled_to_the_bits_that_its_scaler_gives(scaler: Any) -> None:
    scaler.fit(LABELS)
    outputs = Outputs(replace(SPEC, label_scaler=_label_scaler(scaler)))
    (found,) = outputs.columns(LOGITS)
    wanted = scaler.inverse_transform(LOGITS.copy())[:, 0]
    assert wanted.dtype == np.float32
    assert (np.asarray(found) == wanted).all()


@pytest.mark.parametrize(
    ("scaler", "unit"), [(StandardScaler(), LABELS.std()), (MinMaxScaler(), np.ptp(LABELS))], ids=str
)
def test_differences_are_measured_in_the_labels_own_spread(scaler: Any, unit: float) -> None:
    outputs = Outputs(replace(SPEC, label_scaler=_label_scaler(scaler.fit(LABELS))))
    found = outputs.comparable(LOGITS)
    wanted = scaler.inverse_transform(LOGITS.astype(np.float64)) / unit
    assert found.shape == (300, 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_sigmoid_comes_before_the_scaler() -> None:
    scaler = StandardScaler().fit(LABELS)
    outputs = Outputs(replace(SPEC, label_scaler=_label_scaler(scaler), has_sigmoid=True))
    (found,) = outputs.columns(LOGITS)
    wanted = scaler.inverse_transform(1 / (1 + np.exp(-LOGITS.astype(np.float64))))[:, 0]
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5)
