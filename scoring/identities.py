"""Rows as `source_file` and `source_row` name them: by file, in runs, and as a few bits that tell most sets apart.

Owns the arithmetic alone.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.columns import SOURCE_FILE, SOURCE_ROW

_BUCKETS = 128
_REGION_BITS = 12


@dataclass(frozen=True)
class FileRows:
    """A table's rows of one file: their places in the table, their numbers in the file, and the runs of consecutive numbers
    (runs, 2), first and last, ascending."""

    places: npt.NDArray[np.intp]
    numbers: npt.NDArray[np.int64]
    runs: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Identities:
    """A table's rows by file."""

    num_rows: int
    files: dict[str, FileRows]

    @staticmethod
    def of(table: pa.Table) -> "Identities":
        encoded = table[SOURCE_FILE].combine_chunks().dictionary_encode()
        names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        rows = table[SOURCE_ROW].to_numpy()
        files = {}
        for code, name in enumerate(names):
            places = np.flatnonzero(codes == code)
            numbers = rows[places]
            files[name] = FileRows(places, numbers, _runs(numbers))
        return Identities(table.num_rows, files)

    def runs(self) -> dict[str, list[list[int]]]:
        """Each file's runs, as plain numbers."""
        return {name: rows.runs.tolist() for name, rows in self.files.items()}

    def buckets(self) -> int:
        """A bit set for the regions of files that the rows lie in: rows in common, bits in common."""
        bits = 0
        for name, rows in self.files.items():
            start = zlib.crc32(name.encode())
            for first, last in (rows.runs >> _REGION_BITS).tolist():
                for region in range(first, min(last, first + _BUCKETS) + 1):
                    bits |= 1 << (start + region) % _BUCKETS
        return bits


def _runs(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    steps = np.diff(numbers)
    if (steps < 1).any():
        numbers = np.unique(numbers)
        steps = np.diff(numbers)
    breaks = np.flatnonzero(steps != 1)
    runs = np.empty((len(breaks) + 1, 2), dtype=np.int64)
    runs[0, 0], runs[1:, 0] = numbers[0], numbers[breaks + 1]
    runs[:-1, 1], runs[-1, 1] = numbers[breaks], numbers[-1]
    return runs


def contains(runs: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the rows lie in one of the runs."""
    firsts, lasts = runs.T
    run = np.searchsorted(firsts, rows, side="right") - 1
    inside: npt.NDArray[np.bool_] = (run >= 0) & (rows <= lasts[run])
    return inside
