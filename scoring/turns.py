"""A number of places that threads take in the order of what they work on, not of their asking.

Owns the waiting alone.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """`count` places; of those who wait, the one with the lowest number is next."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: set[int] = set()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, number: int) -> Iterator[None]:
        """One place, held in the block. No two threads wait with the same number."""
        with self._changed:
            self._waiting.add(number)
            try:
                self._changed.wait_for(lambda: self._free > 0 and number == min(self._waiting))
                self._free -= 1
            finally:
                self._waiting.remove(number)
                self._changed.notify_all()  # there may be a place for the next one too
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
