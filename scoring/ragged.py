"""Lists of different lengths, one a row, as one flat array and their lengths.

Owns that form alone: as Python's lists the tokens of a block took twice the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Ragged:
    """`values`, one row's after the other's, (total,), and how many each row has, (n,)."""

    values: Int32
    counts: Int64

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> "Ragged":
        counts = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return Ragged(np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(counts.sum())), counts)

    @property
    def starts(self) -> Int64:
        """Where each row's values begin."""
        return np.cumsum(self.counts) - self.counts

    def to_arrow(self) -> pa.ListArray:
        """A list of int32 a row."""
        offsets = np.zeros(len(self.counts) + 1, dtype=np.int32)
        np.cumsum(self.counts, out=offsets[1:])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(self.values))


def spans(starts: Int64, counts: Int64) -> Int64:
    """The places start, start + 1, ... of each row, `counts` of them, one row after the other."""
    ends = np.cumsum(counts)
    places: Int64 = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    return places
