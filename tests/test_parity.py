"""The gate's figures and verdicts on made-up scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoring import gate as gate_module
from scoring.engines.build import EngineRequest
from scoring.engines.cache import EngineCache
from scoring.gate import Gate
from scoring.parity import compare
from tests.pixels import SPEC


def never() -> Any:
    raise AssertionError("no predictor is needed")


REFERENCE = np.array([[0.9, 0.1], [0.504, 0.496], [0.2, 0.8]], dtype=np.float32)


def test_equal_scores_pass() -> None:
    parity = compare(REFERENCE, REFERENCE.copy())
    assert parity.failure(1e-12) is None
    assert (parity.rows, parity.max_abs_diff, parity.top1_agreement) == (3, 0.0, 1.0)


def test_a_difference_over_the_limit_is_refused_with_its_size() -> None:
    found = REFERENCE + np.float32(0.006)
    assert "6.00e-03 on 3 rows, limit 0.005" in str(compare(REFERENCE, found).failure(0.005))
    assert compare(REFERENCE, found).failure(0.007) is None


def test_a_label_may_flip_where_the_reference_hardly_prefers_it() -> None:
    found = REFERENCE.copy()
    found[1] = [0.499, 0.501]
    parity = compare(REFERENCE, found)
    assert parity.label_flips == 0
    assert parity.top1_agreement == pytest.approx(2 / 3)
    assert parity.failure(0.01) is None


def test_a_label_that_flips_against_a_clear_reference_is_refused() -> None:
    found = REFERENCE.copy()
    found[2] = [0.51, 0.49]
    assert "1 of 3 labels differ" in str(compare(REFERENCE, found).failure(0.5))


def test_scores_that_are_not_finite_are_refused_and_not_averaged() -> None:
    found = REFERENCE.copy()
    found[0] = np.nan
    parity = compare(REFERENCE, found)
    assert (parity.non_finite, parity.max_abs_diff) == (1, 0.0)
    assert "1 of 3 rows have scores that are not finite" in str(parity.failure(0.5))


def test_rows_that_the_reference_cannot_score_are_left_out() -> None:
    reference = REFERENCE.copy()
    reference[0] = np.inf
    assert compare(reference, REFERENCE).rows == 2


def test_regression_has_no_labels_to_flip() -> None:
    parity = compare(np.array([[1.0], [2.0]], dtype=np.float32), np.array([[1.001], [2.0]], dtype=np.float32))
    assert parity.label_flips == 0
    assert parity.max_abs_diff == pytest.approx(0.001, abs=1e-6)


def test_engines_that_differ_in_the_run_are_told_apart_wherever_their_logits_lie(tmp_path: Path) -> None:
    gate = Gate(EngineRequest(never, SPEC, EngineCache(str(tmp_path)), max_abs_diff=0.005))
    wanted = np.array([[0.0, 0.0], [2.0, -2.0], [np.nan, 1.0]], dtype=np.float32)
    # A probability of 0.5 moves by 0.0095, twice the limit is 0.01.
    near, far = wanted + np.array([0.038, 0], dtype=np.float32), wanted + np.array([0.045, 0], dtype=np.float32)
    assert gate.difference(wanted, near) is None
    assert gate.difference(torch.from_numpy(wanted), torch.from_numpy(near)) is None
    told = gate.difference(wanted, torch.from_numpy(far))
    assert told == "0 of 2 rows are not finite, the others differ by up to 1.12e-02, limit 0.01"
    near[1] = np.inf
    assert "1 of 2 rows are not finite" in str(gate.difference(wanted, near))


def test_the_rate_that_is_kept_is_that_of_an_engine_with_all_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A takeover times the first engine as it is: nothing more is prepared for one that is about to go."""
    monkeypatch.setattr(gate_module, "_TIMED_S", 0.01)
    seen: list[str] = []

    class Warming:
        provider, precision, device = "cpu", "fp32", "cpu"

        def warm_up(self) -> None:
            seen.append("warms up")

        def forward(self, arrays: Any) -> Any:
            seen.append("scores")
            return np.zeros((len(next(iter(arrays.values()))), 2), dtype=np.float32)

    batch = {"image:pixels": np.zeros((4, 1, 8, 8, 3), dtype=np.uint8)}
    request = EngineRequest(never, SPEC, EngineCache(str(tmp_path)), sample=lambda: [batch], provider="cpu")
    gate = Gate(request)
    engine: Any = Warming()
    assert gate.time(engine) > 0
    assert "warms up" not in seen
    rate = gate.rows_per_s(engine)
    assert seen.count("warms up") == 1
    assert seen.index("warms up") < len(seen) - 1
    seen.clear()
    assert gate.rows_per_s(engine) == rate
    assert not seen, "an earlier run's figure"
