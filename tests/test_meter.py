"""The throughput line, on a clock that the test sets."""

from scoring.meter import Meter


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def batch(meter: Meter, clock: FakeClock, *, wait_s: float, busy_s: float, rows: int) -> str | None:
    clock.now += wait_s
    meter.start_batch()
    clock.now += busy_s
    return meter.end_batch(rows)


def test_a_line_every_window_with_lifetime_and_window_rates() -> None:
    clock = FakeClock()
    meter = Meter("3", "torch", clock)
    assert batch(meter, clock, wait_s=1, busy_s=3, rows=100) is None
    assert batch(meter, clock, wait_s=1, busy_s=4, rows=200) is None  # 9 s
    line = batch(meter, clock, wait_s=0, busy_s=1, rows=50)  # 10 s: 350 rows, 2 s waited
    assert line == "score actor=3 provider=torch rows=350 rows_per_s=35 window=35 wait_pct=20 stage_pct=0 batch=200"
    assert batch(meter, clock, wait_s=6, busy_s=2, rows=10) is None
    line = batch(meter, clock, wait_s=0, busy_s=12, rows=30)  # 30 s: 390 rows; the window: 40 rows in 20 s
    assert line == "score actor=3 provider=torch rows=390 rows_per_s=13 window=2 wait_pct=27 stage_pct=0 batch=200"
    assert batch(meter, clock, wait_s=0, busy_s=9.9, rows=1) is None


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
    meter.stage_s += 3
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
