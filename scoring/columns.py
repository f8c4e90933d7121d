"""The columns of a run: one arrow schema for every shard, and the casts that bring a file's cells to it.

Owns which columns are read and kept, their canonical types, and which cells do not cast. Files of one run may hold a
number as int32, as decimal or, in CSV, as text; blocks that travel together need one type. Does not open files (`shards`,
`source`) and does not apply the predictor's scalers or categories (`features`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from scoring.errors import Reason, Stage

MODEL_PREFIX = "model:"
KEEP_PREFIX = "keep:"
SOURCE_FILE = "source_file"
SOURCE_ROW = "source_row"
SHARD = "shard"
# What scored a row.
ENGINE_COLUMN = "engine"

IDENTITY_FIELDS = (
    pa.field(SOURCE_FILE, pa.string(), nullable=False),
    pa.field(SOURCE_ROW, pa.int64(), nullable=False),
    pa.field(SHARD, pa.int32(), nullable=False),
)
MARK_FIELDS = (pa.field("stage", pa.string()), pa.field("reason", pa.string()), pa.field("message", pa.string()))

Role = Literal["number", "category", "text", "image"]

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_MISSING_NUMBER = r"^(?i:[+-]?nan)?$"
_TRUE, _FALSE = ["True", "true", "TRUE", "1"], ["False", "false", "FALSE", "0"]
_SHOWN_CHARS = 80


@dataclass(frozen=True)
class ModelColumn:
    """A column the predictor reads and the arrow type its cells are cast to."""

    name: str
    role: Role
    type: pa.DataType


@dataclass(frozen=True)
class KeptColumn:
    """A column copied to the output, in the type that all files share (text where they do not)."""

    name: str
    type: pa.DataType


@dataclass(frozen=True)
class ReadSchema:
    """What a run reads. `null_values` are the CSV cells that mean missing, outside text columns."""

    model: tuple[ModelColumn, ...]
    kept: tuple[KeptColumn, ...]
    null_values: tuple[str, ...]

    @property
    def file_columns(self) -> tuple[str, ...]:
        """The columns to read from a file, each once."""
        return tuple(dict.fromkeys([column.name for column in self.model] + [column.name for column in self.kept]))

    @property
    def arrow(self) -> pa.Schema:
        """The schema of every block that leaves the source."""
        model = [pa.field(MODEL_PREFIX + column.name, column.type) for column in self.model]
        kept = [pa.field(KEEP_PREFIX + column.name, column.type) for column in self.kept]
        return pa.schema([*IDENTITY_FIELDS, *MARK_FIELDS, *model, *kept])


@dataclass(frozen=True)
class Identity:
    """Where a table's rows stand: their file, the shard's number and each row's index in the file, (n,) int64."""

    source_file: str
    shard: int
    rows: npt.NDArray[np.int64]


def build_block(table: pa.Table, identity: Identity, schema: ReadSchema, text_columns: frozenset[str]) -> pa.Table:
    """A file's cells -> one block of `schema.arrow`; a row with a cell that does not cast is marked number_invalid.

    `text_columns` are those read as text by us (CSV columns, Hive partition keys): `null_values` hold for them alone.
    A column that the file lacks (a kept one; model columns are checked before) is null.
    """
    num_rows = len(identity.rows)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        SOURCE_FILE: pa.repeat(pa.scalar(identity.source_file), num_rows),
        SOURCE_ROW: pa.array(identity.rows, pa.int64()),
        SHARD: pa.repeat(pa.scalar(identity.shard, pa.int32()), num_rows),
        **{field.name: pa.nulls(num_rows, field.type) for field in MARK_FIELDS},
    }
    bad: dict[int, tuple[Reason, str]] = {}
    for column in schema.model:
        cells = table[column.name]
        null_values = schema.null_values if column.name in text_columns else ()
        values, invalid = _cast_model(cells, column, null_values)
        columns[MODEL_PREFIX + column.name] = values
        for row in np.flatnonzero(invalid).tolist():
            bad.setdefault(row, (Reason.NUMBER_INVALID, _describe_cell(column, cells[row])))
    for kept in schema.kept:
        has_column = kept.name in table.column_names
        columns[KEEP_PREFIX + kept.name] = (
            _cast_kept(table[kept.name], kept.type) if has_column else pa.nulls(num_rows, kept.type)
        )
    block = pa.table(columns, schema=schema.arrow)
    return mark_rows(block, Stage.READ, bad)


def build_bad_block(identity: Identity, schema: ReadSchema, reason: Reason, messages: list[str]) -> pa.Table:
    """Rows that have an identity and nothing else: malformed records. Every other cell is null."""
    num_rows = len(identity.rows)
    columns = {field.name: pa.nulls(num_rows, field.type) for field in schema.arrow}
    columns[SOURCE_FILE] = pa.repeat(pa.scalar(identity.source_file), num_rows)
    columns[SOURCE_ROW] = pa.array(identity.rows, pa.int64())
    columns[SHARD] = pa.repeat(pa.scalar(identity.shard, pa.int32()), num_rows)
    block = pa.table(columns, schema=schema.arrow)
    return mark_rows(block, Stage.READ, {row: (reason, message) for row, message in enumerate(messages)})


def mark_rows(table: pa.Table, stage: Stage, bad: Mapping[int, tuple[Reason, str]]) -> pa.Table:
    """Give rows their stage, reason and message; a row that already has a reason keeps its first one."""
    if not bad:
        return table
    marks = {name: table[name].to_pylist() for name in ("stage", "reason", "message")}
    for row, (reason, message) in bad.items():
        if marks["reason"][row] is None:
            marks["stage"][row], marks["reason"][row], marks["message"][row] = stage.value, reason.value, message
    for name, values in marks.items():
        table = table.set_column(
            table.column_names.index(name), pa.field(name, pa.string()), pa.array(values, pa.string())
        )
    return table


def _cast_model(
    cells: pa.ChunkedArray, column: ModelColumn, null_values: tuple[str, ...]
) -> tuple[pa.Array | pa.ChunkedArray, npt.NDArray[np.bool_]]:
    cells = plain(cells)
    nothing_bad = np.zeros(len(cells), dtype=np.bool_)
    if column.role == "text":
        return write_cells(cells), nothing_bad
    if null_values and pt.is_string(cells.type):
        missing = pc.is_in(cells, value_set=pa.array(null_values, pa.string()))
        cells = pc.if_else(missing, pa.scalar(None, pa.string()), cells)
    if column.type == cells.type and not pt.is_floating(cells.type):
        return cells, nothing_bad
    if pt.is_null(cells.type):
        return pa.nulls(len(cells), column.type), nothing_bad
    if column.role == "image":
        return cells.cast(column.type), nothing_bad
    if pt.is_boolean(column.type):
        return parse_bools(cells)
    if pt.is_floating(column.type):
        return parse_numbers(cells)
    return write_cells(cells, null=None), nothing_bad


def parse_numbers(cells: pa.ChunkedArray) -> tuple[pa.ChunkedArray, npt.NDArray[np.bool_]]:
    """Numbers or text -> (float64 with nulls for missing and NaN, mask of the cells that are no finite number)."""
    if pt.is_string(cells.type):
        trimmed = pc.utf8_trim_whitespace(cells)
        is_number = pc.match_substring_regex(trimmed, _NUMBER)
        invalid = pc.fill_null(pc.invert(is_number), False)
        # Empty cells and NaN are missing values in every file, not only where CSV's null strings hold.
        missing = pc.fill_null(pc.match_substring_regex(trimmed, _MISSING_NUMBER), False)
        invalid = pc.and_not(invalid, missing)
        unsigned = pc.replace_substring_regex(trimmed, r"^\+", "")
        numbers = pc.if_else(is_number, unsigned, pa.scalar(None, pa.string())).cast(pa.float64())
    else:
        numbers = cells.cast(pa.float64(), safe=False)
        invalid = pa.array(np.zeros(len(cells), dtype=np.bool_))
    infinite = pc.fill_null(pc.is_inf(numbers), False)
    unusable = pc.or_(infinite, pc.fill_null(pc.is_nan(numbers), False))
    values = pc.if_else(unusable, pa.scalar(None, pa.float64()), numbers)
    return values, pc.or_(invalid, infinite).to_numpy().astype(np.bool_)


def parse_bools(cells: pa.ChunkedArray) -> tuple[pa.ChunkedArray, npt.NDArray[np.bool_]]:
    """Text -> (bool with nulls, mask of the cells that are neither true nor false as pandas spells them)."""
    is_true = pc.is_in(cells, value_set=pa.array(_TRUE))
    is_false = pc.is_in(cells, value_set=pa.array(_FALSE))
    known = pc.or_(is_true, is_false)
    values = pc.if_else(known, is_true, pa.scalar(None, pa.bool_()))
    return values, pc.and_(pc.invert(known), pc.is_valid(cells)).to_numpy().astype(np.bool_)


def write_cells(cells: pa.ChunkedArray, null: str | None = "") -> pa.ChunkedArray | pa.Array:
    """Cells as upstream writes them out: str() of the value, `null` for a missing one."""
    if pt.is_string(cells.type):
        return cells if null is None else pc.fill_null(cells, null)
    values = [null if value is None or value != value else str(value) for value in cells.to_pylist()]
    return pa.array(values, pa.string())


def plain(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Undo dictionary and large encodings, so that one type stands for one meaning."""
    return cells.cast(plain_type(cells.type)) if plain_type(cells.type) != cells.type else cells


def plain_type(data_type: pa.DataType) -> pa.DataType:
    """The arrow type a column is handled as: dictionaries decoded, large and view types made plain."""
    if pt.is_dictionary(data_type):
        return plain_type(data_type.value_type)
    if pt.is_large_string(data_type) or pt.is_string_view(data_type):
        return pa.string()
    if pt.is_large_binary(data_type) or pt.is_fixed_size_binary(data_type) or pt.is_binary_view(data_type):
        return pa.binary()
    if pt.is_list(data_type) or pt.is_large_list(data_type):
        return pa.list_(plain_type(data_type.value_type))
    return data_type


def _cast_kept(cells: pa.ChunkedArray, data_type: pa.DataType) -> pa.ChunkedArray | pa.Array:
    cells = plain(cells)
    if cells.type == data_type:
        return cells
    if pt.is_string(data_type):
        return write_cells(cells, null=None)
    return cells.cast(data_type)


def _describe_cell(column: ModelColumn, cell: pa.Scalar) -> str:
    shown = str(cell.as_py())
    if len(shown) > _SHOWN_CHARS:
        shown = shown[:_SHOWN_CHARS] + "..."
    wanted = "true or false" if pt.is_boolean(column.type) else "a finite number"
    return f"column {column.name!r}: {shown!r} is not {wanted}"
