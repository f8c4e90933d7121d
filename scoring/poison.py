"""Poison rows: what an error says of the rows it came up with (`fault_of`), and splitting until it has its rows (`split`).

Knows neither tables nor processes, Ray or torch: `guard.py` and `forward.py` say what is called, and what becomes of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from scoring.errors import Reason, ScoringError
from scoring.storage import redact_text

Rows = npt.NDArray[np.intp]
Verdict = tuple[Reason, str]
T = TypeVar("T")

# After so many halvings it is not the batch that is too large.
MAX_HALVINGS = 4
_MESSAGE_CHARS = 300

_OUT_OF_MEMORY = (
    *("out of memory", "not enough memory", "can't allocate memory", "failed to allocate memory"),
    *("bad_alloc", "bad allocation", "alloc_failed"),
)
# After one of these every later call of the process fails, whatever its rows are.
_STICKY = (
    *("illegal memory access", "illegaladdress", "device-side assert", "errorassert", "launch failure"),
    *("launchfailure", "launch_failed", "misaligned address", "misalignedaddress", "illegal instruction"),
    *("hardware stack error", "invalid program counter", "uncorrectable", "launch timed out"),
)


@dataclass(frozen=True)
class Fault:
    """What was wrong with a call, without the error: that one keeps the arrays of every frame it came through."""

    reason: Reason
    message: str

    @property
    def is_memory(self) -> bool:
        return self.reason is Reason.OUT_OF_MEMORY


def fault_of(error: Exception) -> Fault:
    """What an error says of the rows. Raises it again where they are not to blame: a sticky one, or one raised on purpose."""
    if is_sticky(error) or isinstance(error, ScoringError):
        raise error
    return Fault(Reason.OUT_OF_MEMORY if _is_out_of_memory(error) else Reason.SCORE_ERROR, describe(error))


def describe(error: Exception) -> str:
    """The error in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return redact_text(text)[:_MESSAGE_CHARS].removesuffix(":")


def is_sticky(error: Exception) -> bool:
    """Whether the process's GPU context is lost, which only a new process mends."""
    text = str(error).lower()
    # A row's own text may stand in a message.
    return "cuda" in text and any(phrase in text for phrase in _STICKY)


def _is_out_of_memory(error: Exception) -> bool:
    # torch's class by name: feature workers do not import torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(phrase in text for phrase in _OUT_OF_MEMORY)


@dataclass
class Split(Generic[T]):
    """What came of the rows: values of those that went well, by call, and what is wrong with each of the others."""

    parts: list[tuple[Rows, T]] = field(default_factory=list)
    bad: dict[int, Verdict] = field(default_factory=dict)
    fits: int | None = None
    """The most rows at once that memory was found to hold, where a call with more ran out of it."""


def split(
    rows: Rows, score: Callable[[Rows], T], *, fault: Fault | None = None, max_rows: int | None = None
) -> Split[T]:
    """Score rows, in halves where a call raises, down to single ones.

    `fault`: a call with all of them has raised this already. `max_rows` are given at once at most. A row that raises costs
    at most 2 log2(rows) calls beside that first one. Raises what `fault_of` raises.
    """
    search = _Search(score, max_rows or len(rows))
    if fault is None:
        search.run(rows)
    else:
        search.halve(rows, fault)
    return search.found


class _Search(Generic[T]):
    def __init__(self, score: Callable[[Rows], T], max_rows: int) -> None:
        self._score = score
        self._max_rows = max_rows
        self.found: Split[T] = Split()

    def run(self, rows: Rows) -> bool:
        """Whether every call went well at once."""
        is_clean = True
        while len(rows):
            # The limit may sink on the way.
            piece, rows = rows[: self._max_rows], rows[self._max_rows :]
            fault = self._try(piece)
            if fault is not None:
                is_clean = False
                self.halve(piece, fault)
        return is_clean

    def _try(self, rows: Rows) -> Fault | None:
        try:
            values = self._score(rows)
        except Exception as error:
            return fault_of(error)
        self.found.parts.append((rows, values))
        return None

    def halve(self, rows: Rows, fault: Fault) -> None:
        """Do rows that raised together apart."""
        if len(rows) == 1:
            self.found.bad[int(rows[0])] = (fault.reason, fault.message)
            return
        first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        is_clean = self.run(first)
        if is_clean and not fault.is_memory and len(second) > 1:
            self.halve(second, fault)  # the first half was not it: no call is needed to know where it is
            return
        is_clean = self.run(second) and is_clean
        if is_clean and fault.is_memory:
            self._max_rows = self.found.fits = min(self._max_rows, len(second))
