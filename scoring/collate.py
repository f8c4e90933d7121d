"""Rows of features to an engine's named arrays, in micro-batches of like length.

Owns order, grouping and padding; the names are `flat.py`'s. No model inside.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from scoring.engines.base import Shapes
from scoring.features import CATEGORICAL, FEATURE_PREFIX, NUMERICAL, feature_name
from scoring.flat import BatchArrays
from scoring.spec import FeatureSpec, ImageModel, TextModel

Places = npt.NDArray[np.intp]

# What rows of images are large by.
_PICTURES = (":pixels", ":form", ":sizes")


def micro_batches(
    table: pa.Table,
    spec: FeatureSpec,
    max_rows: int,
    shapes: Shapes | None,
    max_tokens: int | None = None,
) -> Iterator[tuple[Places, dict[str, npt.NDArray[Any]]]]:
    """The rows of a features table as batches of at most `max_rows`: their places in the table, and their arrays.

    Rows of like length go together, since a batch is padded to its longest. `max_tokens` bounds rows x padded tokens.
    """
    lengths = token_counts(table, spec)
    order = np.argsort(lengths, kind="stable")
    # Taken once: a batch at a time, with all columns and of as many chunks as the table has, 8,192 rows took 39 ms of a core,
    # so 18. Images are copied when their batch is due.
    pictures = table.select([name for name in table.column_names if name.endswith(_PICTURES)])
    names = [name for name in table.column_names if name.startswith(FEATURE_PREFIX) and not name.endswith(_PICTURES)]
    ordered = table.select(names).combine_chunks().take(pa.array(order))
    for start, end in cut(lengths[order], max_rows, shapes, max_tokens):
        places = order[start:end]
        rows = ordered.slice(start, end - start)
        for name in pictures.column_names:
            rows = rows.append_column(name, pictures[name].take(pa.array(places)))
        yield places, collate(rows, spec)


def cut(
    lengths: npt.NDArray[np.int64], max_rows: int, shapes: Shapes | None, max_tokens: int | None
) -> Iterator[tuple[int, int]]:
    """Ascending lengths -> [start, end) of each batch: as many rows as `max_rows` and `max_tokens` allow.

    With shapes, a batch that the budget limits has one of their row counts. Full batches of mixed lengths beat small ones of
    one length: on an H100 a row's image costs as much as 250 tokens, and 128 rows run at 3/4 of the rate of 512.
    """
    start = 0
    while start < len(lengths):
        rows = min(max_rows, len(lengths) - start)
        if max_tokens and not _fits(lengths, start, rows, shapes, max_tokens):
            counts = [count for count in shapes.rows if count < rows] if shapes else range(1, rows)
            fitting = [count for count in counts if _fits(lengths, start, count, shapes, max_tokens)]
            # Fewer rows than the smallest shape would be padded to it.
            rows = fitting[-1] if fitting else min(rows, shapes.rows[0] if shapes else 1)
        yield start, start + rows
        start += rows


def _fits(lengths: npt.NDArray[np.int64], start: int, rows: int, shapes: Shapes | None, max_tokens: int) -> bool:
    longest = int(lengths[start + rows - 1])
    padded_rows, tokens = shapes.fit(rows, longest) if shapes else (rows, longest)
    return padded_rows * tokens <= max_tokens


def token_counts(table: pa.Table, spec: FeatureSpec) -> npt.NDArray[np.int64]:
    """Tokens of each row, of the longest of its text models; 0 without text."""
    lengths = np.zeros(table.num_rows, dtype=np.int64)
    for model in spec.text_models if spec.text else ():
        counts = pc.list_value_length(table[feature_name(model.prefix, "token_ids")]).to_numpy()
        lengths = np.maximum(lengths, counts)
    return lengths


def collate(table: pa.Table, spec: FeatureSpec) -> dict[str, npt.NDArray[Any]]:
    """Rows of features -> named arrays, padded to the longest row."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in (NUMERICAL, CATEGORICAL):
        if name in table.column_names:
            column = table[name].combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=False)
            arrays[name.removeprefix(FEATURE_PREFIX)] = flat.reshape(table.num_rows, column.type.list_size)
    for text_model in spec.text_models if spec.text else ():
        arrays |= _token_arrays(table, text_model)
    for image_model in spec.image_models if spec.image else ():
        arrays |= _image_arrays(table, image_model)
    return arrays


def without_images(table: pa.Table) -> pa.Table:
    """A features table less its image bytes, the large part of it; how many images a row has stays."""
    return table.drop_columns([name for name in table.column_names if name.endswith(_PICTURES)])


def image_places(arrays: BatchArrays, model: ImageModel) -> int:
    """Images a row of a batch, padding included."""
    return max(1, int(arrays[f"{model.prefix}:image_num"].max(initial=1)))


def _token_arrays(table: pa.Table, model: TextModel) -> dict[str, npt.NDArray[Any]]:
    token_ids = table[feature_name(model.prefix, "token_ids")].combine_chunks()
    segment_ids = table[feature_name(model.prefix, "segment_ids")].combine_chunks()
    return {
        f"{model.prefix}:token_ids": pad_lists(token_ids, model.pad_id),
        f"{model.prefix}:segment_ids": pad_lists(segment_ids, 0),
        f"{model.prefix}:valid_length": pc.list_value_length(token_ids).to_numpy().astype(np.int64),
    }


def pad_lists(lists: pa.ListArray, pad_value: int) -> npt.NDArray[np.int32]:
    """Lists of int32 -> (n, longest) int32, padded at the end."""
    lengths = pc.list_value_length(lists).to_numpy()
    width = int(lengths.max(initial=0))
    padded = np.full((len(lists), width), pad_value, dtype=np.int32)
    padded[np.arange(width)[None, :] < lengths[:, None]] = lists.flatten().to_numpy()
    return padded


def _image_arrays(table: pa.Table, model: ImageModel) -> dict[str, npt.NDArray[Any]]:
    valid_num = table[feature_name(model.prefix, "valid_num")].to_numpy().astype(np.int64)
    image_num = valid_num + table[feature_name(model.prefix, "zero_num")].to_numpy().astype(np.int64)
    numbers = {f"{model.prefix}:valid_num": valid_num, f"{model.prefix}:image_num": image_num}
    if feature_name(model.prefix, "pixels") not in table.column_names:
        return numbers
    width = max(1, int(image_num.max(initial=1)))
    pixels = np.zeros((table.num_rows, width, model.size, model.size, 3), dtype=np.uint8)
    for row, content in enumerate(table[feature_name(model.prefix, "pixels")]):
        if valid_num[row]:
            flat = np.frombuffer(content.as_buffer(), dtype=np.uint8)
            pixels[row, : valid_num[row]] = flat.reshape(-1, model.size, model.size, 3)
    return {f"{model.prefix}:pixels": pixels, **numbers}
