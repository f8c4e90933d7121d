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
from scoring.spec import FeatureSpec, ImageModel, TextModel

Places = npt.NDArray[np.intp]


def micro_batches(
    table: pa.Table, spec: FeatureSpec, max_rows: int, shapes: Shapes | None
) -> Iterator[tuple[Places, dict[str, npt.NDArray[Any]]]]:
    """The rows of a features table as batches of at most `max_rows`: their places in the table, and their arrays.

    Rows of like length go together, since a batch is padded to its longest. With `shapes` a batch holds the rows of one
    token step only.
    """
    lengths = token_counts(table, spec)
    order = np.argsort(lengths, kind="stable")
    steps = np.array([shapes.fit(1, int(length))[1] for length in lengths[order]]) if shapes else np.zeros(len(order))
    start = 0
    while start < len(order):
        end = min(start + max_rows, int(np.searchsorted(steps, steps[start], side="right")))
        places = order[start:end]
        yield places, collate(table.take(pa.array(places)), spec)
        start = end


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
    width = max(1, int(image_num.max(initial=1)))
    pixels = np.zeros((table.num_rows, width, model.size, model.size, 3), dtype=np.uint8)
    for row, content in enumerate(table[feature_name(model.prefix, "pixels")]):
        if valid_num[row]:
            flat = np.frombuffer(content.as_buffer(), dtype=np.uint8)
            pixels[row, : valid_num[row]] = flat.reshape(-1, model.size, model.size, 3)
    return {
        f"{model.prefix}:pixels": pixels,
        f"{model.prefix}:valid_num": valid_num,
        f"{model.prefix}:image_num": image_num,
    }
