"""Casts of cells to the run's schema: numbers, categories, text, kept columns, and the rows that do not cast."""

from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from scoring.columns import (
    Identity,
    KeptColumn,
    ModelColumn,
    ReadSchema,
    Role,
    build_bad_block,
    build_block,
    mark_rows,
    plain_type,
)
from scoring.config import DEFAULT_NULL_VALUES
from scoring.errors import Reason, Stage

NUMBER = ModelColumn("x", "number", pa.float64())


def block_of(
    columns: dict[str, Any],
    *model: ModelColumn,
    kept: tuple[KeptColumn, ...] = (),
    as_text: bool = False,
    null_values: tuple[str, ...] = DEFAULT_NULL_VALUES,
) -> pa.Table:
    table = pa.table(columns)
    identity = Identity("/d/a.csv", 3, np.arange(10, 10 + table.num_rows, dtype=np.int64))
    schema = ReadSchema(model, kept, null_values)
    block = build_block(table, identity, schema, frozenset(table.column_names) if as_text else frozenset())
    block.validate(full=True)
    assert block.schema == schema.arrow
    return block


def cast(cells: pa.Array, role: Role, to: pa.DataType, *, as_text: bool = False, **options: Any) -> list[Any]:
    """The cells after the cast, the string "bad" for one that is number_invalid."""
    block = block_of({"x": cells}, ModelColumn("x", role, to), as_text=as_text, **options)
    reasons = block["reason"].to_pylist()
    assert set(reasons) <= {None, "number_invalid"}
    values = block["model:x"].to_pylist()
    assert all(value is None for value, reason in zip(values, reasons, strict=True) if reason)
    return ["bad" if reason else value for value, reason in zip(values, reasons, strict=True)]


def from_text(*cells: str | None, **options: Any) -> list[Any]:
    return cast(pa.array(cells, pa.string()), "number", pa.float64(), as_text=True, **options)


# --- numbers


@pytest.mark.parametrize(
    ("kind", "cells", "expected"),
    [
        *[(kind, [-7, None, 100], [-7.0, None, 100.0]) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())],
        *[(kind, [7, None, 200], [7.0, None, 200.0]) for kind in (pa.uint8(), pa.uint16(), pa.uint32())],
        (pa.uint64(), [2**64 - 1, 0], [1.8446744073709552e19, 0.0]),
        (pa.int64(), [2**53 + 1], [9007199254740992.0]),
        (pa.float16(), [np.float16(1.5), np.float16("nan"), np.float16("inf")], [1.5, None, "bad"]),
        (pa.float32(), [0.1, float("nan"), float("-inf"), None], [0.10000000149011612, None, "bad", None]),
        (pa.float64(), [0.1, float("nan"), float("inf"), None], [0.1, None, "bad", None]),
        (pa.decimal128(10, 2), [Decimal("-1.25"), None], [-1.25, None]),
        (pa.decimal256(50, 1), [Decimal("2.5")], [2.5]),
        (pa.bool_(), [True, False, None], [1.0, 0.0, None]),
        (pa.null(), [None, None], [None, None]),
        (pa.dictionary(pa.int8(), pa.int16()), [5, None, 6], [5.0, None, 6.0]),
        (pa.dictionary(pa.int32(), pa.string()), ["5", None, "six"], [5.0, None, "bad"]),
        (pa.large_string(), ["1.5", "x"], [1.5, "bad"]),
        (pa.string_view(), ["2", None], [2.0, None]),
    ],
)
def test_numbers_of_every_type(kind: pa.DataType, cells: list[Any], expected: list[Any]) -> None:
    assert cast(pa.array(cells, kind), "number", pa.float64()) == expected


def test_numbers_in_a_dictionary_of_large_strings() -> None:
    cells = pa.DictionaryArray.from_arrays(pa.array([1, None, 0], pa.int8()), pa.array(["x", "4"], pa.large_string()))
    assert cast(cells, "number", pa.float64()) == [4.0, None, "bad"]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        *[("1", 1.0), (" 2 ", 2.0), ("+3", 3.0), ("-4", -4.0), ("1e5", 1e5), ("1E-5", 1e-5), ("1e+2", 100.0)],
        *[(".5", 0.5), ("+.5", 0.5), ("5.", 5.0), ("00012", 12.0), ("\t7\u00a0", 7.0), ("1e-400", 0.0)],
        *[("0.1", 0.1), ("179769313486231570e291", 1.7976931348623157e308), ("9007199254740993", 9007199254740992.0)],
        *[("1_000", "bad"), ("1,000", "bad"), ("1,5", "bad"), ("0x10", "bad"), ("abc", "bad"), ("1e", "bad")],
        *[(".", "bad"), ("+-3", "bad"), ("++3", "bad"), ("1 2", "bad"), ("1\n2", "bad"), ("\u0663", "bad")],
        *[("inf", "bad"), ("-Infinity", "bad"), ("1e999", "bad"), ("-1e999", "bad"), ("1" * 400, "bad")],
        *[("True", "bad"), ("", None), ("   ", None), ("NaN", None), ("NULL", None), (None, None)],
    ],
)
def test_numbers_in_text(cell: str | None, expected: object) -> None:
    assert from_text(cell) == [expected]


def test_negative_zero_keeps_its_sign() -> None:
    assert np.signbit(from_text("-0")[0])


def test_empty_and_nan_are_missing_whatever_the_null_values() -> None:
    assert from_text("", " ", "nan", "-NaN", "NA", null_values=("-",)) == [None, None, None, None, "bad"]
    assert cast(pa.array(["", "NaN", "NULL"]), "number", pa.float64()) == [None, None, "bad"]


def test_null_values_can_be_named() -> None:
    assert from_text("missing", "7", null_values=("missing",)) == [None, 7.0]


def test_number_invalid_names_column_and_cell() -> None:
    long = "y" * 100
    block = block_of({"x": pa.array(["1", "n/a?", long])}, NUMBER, as_text=True)
    assert block["stage"].to_pylist() == [None, "read", "read"]
    assert block["message"].to_pylist() == [
        None,
        "column 'x': 'n/a?' is not a finite number",
        f"column 'x': '{'y' * 80}...' is not a finite number",
    ]


def test_a_row_with_two_bad_cells_tells_the_first() -> None:
    columns = {"x": pa.array(["1", "a"]), "y": pa.array(["b", "c"])}
    block = block_of(columns, NUMBER, ModelColumn("y", "number", pa.float64()), as_text=True)
    assert block["message"].to_pylist() == [
        "column 'y': 'b' is not a finite number",
        "column 'x': 'a' is not a finite number",
    ]
    assert block["model:x"].to_pylist() == [1.0, None]


# --- categories, text, images


def test_number_categories_are_one_value_however_written() -> None:
    cells = pa.array(["1", "1.0", " 1", "01", "x", "", "NA"])
    assert cast(cells, "category", pa.float64(), as_text=True) == [1.0, 1.0, 1.0, 1.0, "bad", None, None]
    assert cast(pa.array([1, None], pa.int8()), "category", pa.float64()) == [1.0, None]


def test_bool_categories_as_pandas_spells_them() -> None:
    cells = pa.array(["True", "true", "TRUE", "1", "False", "false", "FALSE", "0", "NA", None, "yes", "2"])
    expected = [True, True, True, True, False, False, False, False, None, None, "bad", "bad"]
    assert cast(cells, "category", pa.bool_(), as_text=True) == expected
    assert cast(pa.array([True, None, False]), "category", pa.bool_()) == [True, None, False]
    block = block_of({"x": pa.array(["yes"])}, ModelColumn("x", "category", pa.bool_()), as_text=True)
    assert block["message"].to_pylist() == ["column 'x': 'yes' is not true or false"]


def test_string_categories_keep_their_spelling() -> None:
    cells = pa.array(["1", "1.0", " a", "", "None", None])
    assert cast(cells, "category", pa.string(), as_text=True) == ["1", "1.0", " a", None, None, None]
    assert cast(cells, "category", pa.string()) == ["1", "1.0", " a", "", "None", None]
    assert cast(cells, "category", pa.string(), as_text=True, null_values=("",)) == [
        "1",
        "1.0",
        " a",
        None,
        "None",
        None,
    ]
    assert cast(cells.dictionary_encode(), "category", pa.string())[:2] == ["1", "1.0"]


def test_null_strings_are_words_in_text_columns() -> None:
    cells = pa.array(["NA", "None", "", None, "null"])
    assert cast(cells, "text", pa.string(), as_text=True) == ["NA", "None", "", "", "null"]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (pa.array([5, None], pa.int32()), ["5", ""]),
        (pa.array([1.0, float("nan"), 0.1]), ["1.0", "", "0.1"]),
        (pa.array([True, False]), ["True", "False"]),
        (pa.array([Decimal("1.50")], pa.decimal128(5, 2)), ["1.50"]),
        (pa.array([0], pa.date32()), ["1970-01-01"]),
        (pa.array([None, None], pa.null()), ["", ""]),
        (pa.array(["a", None]).dictionary_encode(), ["a", ""]),
        (pa.array(["a", None], pa.large_string()), ["a", ""]),
    ],
)
def test_text_is_the_value_written_out(cells: pa.Array, expected: list[str]) -> None:
    assert cast(cells, "text", pa.string()) == expected


def test_images_keep_their_kind_and_lose_null_strings() -> None:
    assert cast(pa.array(["a.jpg", "NA", ""]), "image", pa.string(), as_text=True) == ["a.jpg", None, None]
    assert cast(pa.array([b"\xff\xd8", None], pa.large_binary()), "image", pa.binary()) == [b"\xff\xd8", None]
    several = pa.array([["a.jpg", None], None, []], pa.large_list(pa.large_string()))
    assert cast(several, "image", pa.list_(pa.string())) == [["a.jpg", None], None, []]
    assert cast(pa.nulls(2), "image", pa.binary()) == [None, None]


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.large_binary(), pa.binary()),
        (pa.binary_view(), pa.binary()),
        (pa.binary(4), pa.binary()),
        (pa.dictionary(pa.int8(), pa.large_string()), pa.string()),
        (pa.large_list(pa.large_binary()), pa.list_(pa.binary())),
        (pa.list_(pa.dictionary(pa.int8(), pa.string())), pa.list_(pa.string())),
        (pa.int8(), pa.int8()),
        (pa.timestamp("ns"), pa.timestamp("ns")),
    ],
)
def test_plain_type(kind: pa.DataType, plain: pa.DataType) -> None:
    assert plain_type(kind) == plain


# --- kept columns, identity, marks


def test_kept_columns_take_the_type_of_the_run() -> None:
    kept = (
        KeptColumn("i", pa.int64()),
        KeptColumn("f", pa.float64()),
        KeptColumn("t", pa.string()),
        KeptColumn("gone", pa.int32()),
        KeptColumn("x", pa.string()),
    )
    columns = {
        "x": pa.array(["1", "NA"]),
        "i": pa.array([1, None], pa.int8()),
        "f": pa.array([2, 3], pa.int32()),
        "t": pa.array([1.5, None]),
    }
    block = block_of(columns, NUMBER, kept=kept, as_text=True)
    assert block["keep:i"].to_pylist() == [1, None]
    assert block["keep:f"].to_pylist() == [2.0, 3.0]
    assert block["keep:t"].to_pylist() == ["1.5", None]
    assert block["keep:gone"].to_pylist() == [None, None]
    assert block["keep:x"].to_pylist() == ["1", "NA"]
    assert block["model:x"].to_pylist() == [1.0, None]


def test_kept_text_is_kept_as_it_stands_in_the_file() -> None:
    kept = (KeptColumn("t", pa.string()), KeptColumn("d", pa.string()))
    columns = {"x": pa.array(["1", "2", "3"]), "t": pa.array(["", "NA", " a "]), "d": pa.array([[1, 2], None, []])}
    block = block_of(columns, NUMBER, kept=kept, as_text=True)
    assert block["keep:t"].to_pylist() == ["", "NA", " a "]
    assert block["keep:d"].to_pylist() == ["[1, 2]", None, "[]"]


def test_every_row_carries_file_row_and_shard() -> None:
    block = block_of({"x": pa.array([1.0, 2.0])}, NUMBER)
    assert block.select(["source_file", "source_row", "shard"]).to_pylist() == [
        {"source_file": "/d/a.csv", "source_row": 10, "shard": 3},
        {"source_file": "/d/a.csv", "source_row": 11, "shard": 3},
    ]
    assert block["reason"].to_pylist() == [None, None]


def test_no_rows_still_have_the_schema() -> None:
    assert block_of({"x": pa.array([], pa.string())}, NUMBER, as_text=True).num_rows == 0


def test_bad_block_has_identities_and_messages_alone() -> None:
    schema = ReadSchema((NUMBER,), (KeptColumn("t", pa.string()),), ())
    identity = Identity("/d/a.csv", 2, np.array([4, 9], dtype=np.int64))
    block = build_bad_block(identity, schema, Reason.ROW_MALFORMED, ["one", "two"])
    assert block.schema == schema.arrow
    shared = {"source_file": "/d/a.csv", "shard": 2, "stage": "read", "reason": "row_malformed"}
    nothing = {"model:x": None, "keep:t": None}
    assert block.to_pylist() == [
        {**shared, "source_row": 4, "message": "one", **nothing},
        {**shared, "source_row": 9, "message": "two", **nothing},
    ]


def test_mark_rows_keeps_the_first_reason() -> None:
    block = block_of({"x": pa.array(["1", "a", "2"])}, NUMBER, as_text=True)
    later = (Reason.IMAGE_MISSING, "gone")
    marked = mark_rows(block, Stage.FEATURES, {1: later, 2: later})
    assert marked.select(["stage", "reason", "message"]).to_pylist() == [
        {"stage": None, "reason": None, "message": None},
        {"stage": "read", "reason": "number_invalid", "message": "column 'x': 'a' is not a finite number"},
        {"stage": "features", "reason": "image_missing", "message": "gone"},
    ]
    assert marked.schema == block.schema
    assert mark_rows(block, Stage.SCORE, {}) is block
