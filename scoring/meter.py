"""Throughput of one scoring actor: rows and seconds, over its life and over the last window.

Owns the arithmetic and the log line. The clock is passed in, so that tests can set it. Knows nothing of models or Ray.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

WINDOW_S = 10.0


@dataclass
class Meter:
    """Counts batches of one actor, from any thread. `wait` is the time without a batch in the forward: high means starved, not
    slow. `stage` is the time spent on decoding, copying and padding, beside the forward of the batches before."""

    actor: str
    provider: str
    clock: Clock = time.perf_counter
    num_rows: int = 0
    wait_s: float = 0.0
    stage_s: float = 0.0
    _started: float = field(init=False)
    _window_started: float = field(init=False)
    _window_rows: int = 0
    _in_flight: int = 0
    _last_end: float = field(init=False)
    _last_batch: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._started = self._window_started = self._last_end = self.clock()

    @contextmanager
    def batch(self, num_rows: int, stage_s: float = 0.0) -> Iterator[None]:
        """Around a batch in the forward, which may overlap others. Its rows count when it does not raise.

        Logs a line when a window of WINDOW_S is over.
        """
        with self._lock:
            if not self._in_flight:
                self.wait_s += self.clock() - self._last_end
            self._in_flight += 1
            self.stage_s += stage_s
        scored = 0
        try:
            yield
            scored = num_rows
        finally:
            line = self._end(scored)
            if line is not None:
                logger.info(line)

    def _end(self, num_rows: int) -> str | None:
        with self._lock:
            self._in_flight -= 1
            self._last_end = self.clock()
            self.num_rows += num_rows
            self._window_rows += num_rows
            self._last_batch = max(self._last_batch, num_rows)
            if self._last_end - self._window_started < WINDOW_S:
                return None
            line = self.describe()
            self._window_started, self._window_rows = self._last_end, 0
            return line

    def describe(self) -> str:
        """The throughput line: rows/s over the actor's life and in the current window, share of time waiting."""
        now = self.clock()
        lifetime = max(now - self._started, 1e-9)
        window = max(now - self._window_started, 1e-9)
        # Idle since the last batch counts as waiting, up to the moment of asking.
        waited = self.wait_s + (0.0 if self._in_flight else now - self._last_end)
        return (
            f"score actor={self.actor} provider={self.provider} rows={self.num_rows} "
            f"rows_per_s={self.num_rows / lifetime:.0f} window={self._window_rows / window:.0f} "
            f"wait_pct={100 * waited / lifetime:.0f} stage_pct={100 * self.stage_s / lifetime:.0f} batch={self._last_batch}"
        )
