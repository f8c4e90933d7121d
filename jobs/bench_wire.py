"""What 8-bit pixels are worth: feature workers that ship fp32 ones, four times the bytes, and actors that take them back.

Owns that lever alone. The actors then go on as usual: it measures the way between the processes, not the copy to the GPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.pipeline import FeatureWorker, ScoringActor

_LEVELS = np.float32(255)
Values = npt.NDArray[Any]


def to_float32(table: pa.Table) -> pa.Table:
    """Every image's 8-bit pixels as fp32 from 0 to 1."""
    return _convert(table, np.uint8, lambda pixels: pixels.astype(np.float32) / _LEVELS)


def to_uint8(table: pa.Table) -> pa.Table:
    """What `to_float32` had been given, bit for bit."""
    return _convert(table, np.float32, lambda pixels: np.rint(pixels * _LEVELS).astype(np.uint8))


def _convert(table: pa.Table, kind: npt.DTypeLike, change: Callable[[Values], Values]) -> pa.Table:
    for place, name in enumerate(table.column_names):
        if name.endswith(":pixels"):
            chunks = [_convert_chunk(chunk, kind, change) for chunk in table[name].chunks]
            table = table.set_column(place, name, pa.chunked_array(chunks, pa.large_binary()))
    return table


def _convert_chunk(chunk: pa.Array, kind: npt.DTypeLike, change: Callable[[Values], Values]) -> pa.Array:
    """Large binaries of one kind of number -> of another, all at once."""
    _, offsets_buffer, data = chunk.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    bytes_ = np.frombuffer(data, dtype=np.uint8) if data is not None else np.empty(0, dtype=np.uint8)
    found = bytes_[offsets[0] : offsets[-1]].view(kind)
    changed = change(found)
    ends = (offsets - offsets[0]) // found.itemsize * changed.itemsize
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(changed)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(chunk), buffers)


class WideFeatureWorker(FeatureWorker):
    """A feature worker that ships fp32 pixels."""

    def __call__(self, table: pa.Table) -> pa.Table:
        return to_float32(super().__call__(table))


class NarrowingScoringActor(ScoringActor):
    """A scoring actor that is given fp32 pixels."""

    def __call__(self, table: pa.Table) -> pa.Table:
        return super().__call__(to_uint8(table))
