"""Reading one shard: its rows as blocks of the run's schema, each row with its identity.

Owns parquet row groups and CSV records, malformed ones included. `source.py` gives this to Ray; nothing here imports it.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from scoring.columns import Identity, ReadSchema, build_bad_block, build_block
from scoring.config import CsvConfig
from scoring.errors import InputError, Reason
from scoring.shards import Shard, open_csv_text
from scoring.storage import open_input

# One CSV record must fit into a block ("straddling object straddles two block boundaries"); images in base64 are long.
_CSV_BLOCK_BYTES = 32 * 2**20
_SHOWN_CHARS = 200


def read_shard(shard: Shard, schema: ReadSchema, csv_config: CsvConfig, block_rows: int) -> Iterator[pa.Table]:
    """The shard's rows in order, in blocks of at most `block_rows`. Raises InputError naming the file."""
    try:
        if shard.file.format == "parquet":
            yield from _read_parquet(shard, schema, block_rows)
        else:
            yield from _read_csv(shard, schema, csv_config, block_rows)
    except (OSError, ValueError, pa.ArrowException, EOFError) as error:
        raise InputError(f"{shard.file.source_file}: cannot be read: {error}; restore or remove the file") from error


def _read_parquet(shard: Shard, schema: ReadSchema, block_rows: int) -> Iterator[pa.Table]:
    if not shard.num_rows:
        return
    wanted = [name for name in schema.file_columns if name in shard.file.columns]
    row = shard.first_row
    with open_input(shard.file.uri) as stream, pq.ParquetFile(stream) as parquet:
        batches = parquet.iter_batches(block_rows, row_groups=list(shard.row_groups), columns=wanted, use_threads=False)
        for batch in batches:
            rows = np.arange(row, row + batch.num_rows, dtype=np.int64)
            yield _block(pa.Table.from_batches([batch]), rows, shard, schema)
            row += batch.num_rows
    read = row - shard.first_row
    if read != shard.num_rows:
        raise InputError(
            f"{shard.file.source_file}: {read} rows read, its footer says {shard.num_rows}; rewrite the file"
        )


def _block(table: pa.Table, rows: npt.NDArray[np.int64], shard: Shard, schema: ReadSchema) -> pa.Table:
    names = schema.file_columns
    for key in shard.file.partition:
        if key in names and key not in shard.file.columns:
            value = pa.scalar(shard.file.partition[key], pa.string())
            table = table.append_column(key, pa.repeat(value, len(rows)))
    as_text = frozenset(name for name in names if shard.file.is_text(name))
    return build_block(table, Identity(shard.file.source_file, shard.index, rows), schema, as_text)


def _read_csv(shard: Shard, schema: ReadSchema, config: CsvConfig, block_rows: int) -> Iterator[pa.Table]:
    """Blocks of good records, and of malformed ones once their place is passed.

    The parser runs ahead of the batches it hands out, so a malformed record may be known before its turn: records are
    numbered by skipping the numbers of the malformed ones.
    """
    malformed: dict[int, str] = {}
    wanted = [name for name in schema.file_columns if name in shard.file.columns]
    num_columns = len(shard.file.columns)

    def note_malformed(record: pacsv.InvalidRow) -> str:
        # Numbers count the header as 1 and blank lines not at all (tried with pyarrow 24).
        malformed[record.number - 2] = (
            f"{record.actual_columns} cells where the header has {num_columns}: {record.text[:_SHOWN_CHARS]!r}"
        )
        return "skip"

    next_row = 0
    with open_csv_text(shard.file.uri) as stream:
        reader = pacsv.open_csv(
            stream,
            read_options=pacsv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES, encoding=config.encoding),
            parse_options=pacsv.ParseOptions(
                delimiter=config.delimiter, newlines_in_values=True, invalid_row_handler=note_malformed
            ),
            # As bytes: checked as text below, row by row, where one bad byte would fail the file.
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(shard.file.columns, pa.binary()),
                include_columns=wanted,
                strings_can_be_null=False,
            ),
        )
        for batch in reader:
            rows, next_row = _number_rows(next_row, batch.num_rows, malformed)
            yield from _csv_blocks(pa.Table.from_batches([batch]), rows, shard, schema, block_rows)
    if malformed:
        order = sorted(malformed)
        identity = Identity(shard.file.source_file, shard.index, np.array(order, dtype=np.int64))
        yield build_bad_block(identity, schema, Reason.ROW_MALFORMED, [malformed[row] for row in order])


def _number_rows(start: int, count: int, malformed: dict[int, str]) -> tuple[npt.NDArray[np.int64], int]:
    """The next `count` record numbers from `start` that are not malformed, and where to go on."""
    numbers = itertools.islice((row for row in itertools.count(start) if row not in malformed), count)
    rows = np.fromiter(numbers, dtype=np.int64, count=count)
    return rows, int(rows[-1]) + 1 if count else start


def _csv_blocks(
    table: pa.Table, rows: npt.NDArray[np.int64], shard: Shard, schema: ReadSchema, block_rows: int
) -> Iterator[pa.Table]:
    for offset in range(0, table.num_rows, block_rows):
        piece, piece_rows = table.slice(offset, block_rows), rows[offset : offset + block_rows]
        undecodable: dict[int, str] = {}
        columns = {name: _decode_cells(piece[name], name, undecodable) for name in piece.column_names}
        good = np.array([i not in undecodable for i in range(len(piece_rows))], dtype=np.bool_)
        text = pa.table(columns) if columns else piece
        yield _block(text.filter(pa.array(good)), piece_rows[good], shard, schema)
        if undecodable:
            identity = Identity(shard.file.source_file, shard.index, piece_rows[~good])
            yield build_bad_block(identity, schema, Reason.ROW_MALFORMED, [undecodable[i] for i in sorted(undecodable)])


def _decode_cells(cells: pa.ChunkedArray, name: str, undecodable: dict[int, str]) -> pa.ChunkedArray | pa.Array:
    try:
        return cells.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array(
            [_decode_cell(cell, i, name, undecodable) for i, cell in enumerate(cells.to_pylist())], pa.string()
        )


def _decode_cell(cell: bytes, row: int, name: str, undecodable: dict[int, str]) -> str | None:
    try:
        return cell.decode("utf-8")
    except UnicodeDecodeError as error:
        undecodable.setdefault(
            row, f"column {name!r} is not input.csv.encoding text: {error.reason} at byte {error.start}: {cell[:40]!r}"
        )
        return None
