"""The throughput line, on a clock that the test sets."""

import logging

import pytest

from scoring.meter import Meter


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def batch(meter: Meter, clock: FakeClock, *, wait_s: float, busy_s: float, rows: int) -> None:
    clock.now += wait_s
    with meter.batch(rows):
        clock.now += busy_s


def test_a_line_every_window_with_lifetime_and_window_rates(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="scoring.meter")
    clock = FakeClock()
    meter = Meter("3", "torch", clock)
    batch(meter, clock, wait_s=1, busy_s=3, rows=100)
    batch(meter, clock, wait_s=1, busy_s=4, rows=200)  # 9 s
    assert caplog.messages == []
    batch(meter, clock, wait_s=0, busy_s=1, rows=50)  # 10 s: 350 rows, 2 s waited
    assert caplog.messages == [
        "score actor=3 provider=torch rows=350 rows_per_s=35 window=35 wait_pct=20 stage_pct=0 batch=200"
    ]
    caplog.clear()
    batch(meter, clock, wait_s=6, busy_s=2, rows=10)
    assert caplog.messages == []
    batch(meter, clock, wait_s=0, busy_s=12, rows=30)  # 30 s: 390 rows; the window: 40 rows in 20 s
    assert caplog.messages == [
        "score actor=3 provider=torch rows=390 rows_per_s=13 window=2 wait_pct=27 stage_pct=0 batch=200"
    ]
    caplog.clear()
    batch(meter, clock, wait_s=0, busy_s=9.9, rows=1)
    assert caplog.messages == []


def test_batches_that_overlap_leave_no_wait_between_them() -> None:
    clock = FakeClock()
    meter = Meter("0", "cuda", clock)
    clock.now += 2
    with meter.batch(8):
        clock.now += 1
        with meter.batch(8):
            clock.now += 1
        assert " rows=8 " in meter.describe()
        clock.now += 4
        assert " wait_pct=25 " in meter.describe()
    assert (meter.num_rows, meter.wait_s) == (16, 2.0)


def test_a_batch_that_raises_has_no_rows_and_leaves_nothing_in_flight() -> None:
    clock = FakeClock()
    meter = Meter("0", "cuda", clock)

    def fail() -> None:
        with meter.batch(8):
            clock.now += 1
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    clock.now += 1
    assert " rows=0 " in meter.describe()
    assert " wait_pct=50 " in meter.describe()


def test_idle_time_at_the_end_counts_as_waiting() -> None:
    clock = FakeClock()
    meter = Meter("0", "torch", clock)
    batch(meter, clock, wait_s=0, busy_s=2, rows=8)
    clock.now += 6
    assert (
        meter.describe() == "score actor=0 provider=torch rows=8 rows_per_s=1 window=1 wait_pct=75 stage_pct=0 batch=8"
    )
    assert (meter.num_rows, meter.wait_s) == (8, 0.0)


def test_staging_runs_beside_the_forward_and_has_its_own_share() -> None:
    clock = FakeClock()
    meter = Meter("0", "torch", clock)
    batch(meter, clock, wait_s=0, busy_s=4, rows=8)
    with meter.batch(0, stage_s=3):
        pass
    assert " wait_pct=0 stage_pct=75 " in meter.describe()


def test_an_actor_that_never_scored_has_a_line() -> None:
    clock = FakeClock()
    meter = Meter("0", "torch", clock)
    assert (
        meter.describe() == "score actor=0 provider=torch rows=0 rows_per_s=0 window=0 wait_pct=0 stage_pct=0 batch=0"
    )
    clock.now += 5
    assert (
        meter.describe() == "score actor=0 provider=torch rows=0 rows_per_s=0 window=0 wait_pct=100 stage_pct=0 batch=0"
    )
