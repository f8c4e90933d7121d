"""ONNX Runtime's GPU engine, less the GPU: which sessions a batch goes through, and when they are planned for."""

from typing import Any

import pytest
import torch

from scoring.engines.base import Shapes
from scoring.engines.onnx_engine import OnnxGpuEngine, counts_that_pay
from scoring.engines.row_counts import PLANNED_AFTER_ROWS, choose_count, plan_first

COUNTS = (32, 64, 128, 256, 512)


class PlannedCounts(OnnxGpuEngine):
    """Its sessions note how many rows they are given and answer with the first input."""

    def __init__(self, rows_left: int | None = None, *, failing: int = 0) -> None:
        self.seen: list[int] = []
        self._failing = failing
        self._shapes = Shapes(COUNTS, (64,))
        self._is_planned, self._sessions, self._num_rows = True, {}, 0
        self._to_plan = counts_that_pay(COUNTS, rows_left)
        self._open(plan_first(COUNTS))

    def _open(self, count: int) -> Any:
        self._sessions[count] = None

    def _run(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        assert len(tensors[0]) in self._sessions
        self.seen.append(len(tensors[0]))
        return tensors[0].clone()

    def _run_zeros(self, rows: int) -> None:
        if rows == self._failing:
            raise RuntimeError("no room")
        self._run([torch.zeros(rows, 1)])


def parts(engine: PlannedCounts, rows: int) -> list[int]:
    """How many rows the sessions are given of a batch, whose logits must be its own."""
    batch = torch.arange(float(rows))[:, None]
    engine.seen.clear()
    torch.testing.assert_close(engine.run([batch, batch]), batch)
    return list(engine.seen)


def test_batches_of_a_count_without_a_plan_go_through_others_in_parts() -> None:
    engine = PlannedCounts()
    engine.start()
    assert engine.seen == [128], "a large batch in parts of it is no more work than whole, and takes no more memory"
    assert parts(engine, 512) == [128] * 4
    assert parts(engine, 256) == [128] * 2
    assert parts(engine, 64) == [128]
    assert parts(engine, 300) == [128] * 3
    assert choose_count(256, (128, 512)) == 128
    assert choose_count(512, COUNTS) == 512


def test_a_long_run_plans_for_large_batches_after_its_first_rows() -> None:
    assert counts_that_pay(COUNTS, None) == counts_that_pay(COUNTS, 400_000) == ()
    assert counts_that_pay(COUNTS, 10**7) == (512, 256)
    assert counts_that_pay((1, 2), 10**7) == (2,), "not what is planned for first"
    engine = PlannedCounts(600_000)
    first = PLANNED_AFTER_ROWS // 512
    assert [parts(engine, 512) for _ in range(first)] == [[128] * 4] * first, (
        "the first parts of scores are written before"
    )
    assert parts(engine, 512) == [512, 512], "zeros, then the batch"
    assert parts(engine, 256) == [128] * 2
    engine.close()


def test_warming_up_plans_for_what_most_batches_are_and_does_without_those_that_fail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = PlannedCounts(failing=256)
    engine.warm_up()
    assert engine.seen == [512]
    assert "no batches of 256 rows: RuntimeError: no room" in caplog.text
    assert parts(engine, 256) == [128] * 2
    assert parts(engine, 64) == [128]
    with pytest.raises(RuntimeError, match="no room"):
        PlannedCounts(failing=128).start()
