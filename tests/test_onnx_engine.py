"""ONNX Runtime's GPU engine, less the GPU: which sessions a batch goes through while they are still being planned."""

import pytest
import torch

from scoring.engines.base import Shapes
from scoring.engines.onnx_engine import OnnxGpuEngine


class PlannedCounts(OnnxGpuEngine):
    """Its sessions note how many rows they are given and answer with the first input."""

    def __init__(self, *, failing: int = 0) -> None:
        self.seen: list[int] = []
        self._failing = failing
        self._shapes = Shapes((32, 64, 128, 256, 512), (64,))
        self._is_planned, self._is_closed = True, False
        self._planned, self._planner, self._sessions = (), None, {}

    def _run(self, tensors: list[torch.Tensor]) -> torch.Tensor:
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
    return engine.seen


def test_until_a_row_count_is_planned_its_batches_go_through_another_in_parts() -> None:
    engine = PlannedCounts()
    engine._planned = (128,)
    assert parts(engine, 512) == [128] * 4
    assert parts(engine, 256) == [128] * 2
    assert parts(engine, 128) == [128]
    assert parts(engine, 64) == [128]
    assert parts(engine, 300) == [128] * 3
    engine._planned = (128, 512)
    assert parts(engine, 512) == [512]
    assert parts(engine, 256) == [128] * 2


def test_one_count_is_planned_at_once_and_the_others_in_a_thread(caplog: pytest.LogCaptureFixture) -> None:
    engine = PlannedCounts(failing=256)
    engine.start()
    assert engine.seen[0] == 128, "a large batch in parts of it is no more work than whole, and takes no more memory"
    engine.warm_up()
    assert engine.seen == [128, 512, 64, 32]
    assert "no batches of 256 rows: RuntimeError: no room" in caplog.text
    assert parts(engine, 256) == [128] * 2
    assert parts(engine, 64) == [64]
    with pytest.raises(RuntimeError, match="no room"):
        PlannedCounts(failing=128).start()
    engine.close()
