"""Reading one shard: its rows as blocks of the run's schema, each row with its identity.

Owns identities, malformed rows and rows that a broken file loses. CSV text is `csv_records.py`'s; `source.py` gives this to
Ray; nothing here imports it.
"""

import itertools
import logging
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from scoring.columns import Identity, ReadSchema, build_bad_block, build_block, plain, plain_type
from scoring.config import CsvConfig
from scoring.csv_records import BAD_BYTES, CsvRecords, show_text
from scoring.errors import Reason
from scoring.opening import FILE_ERRORS, ChangedFileError, describe, open_for_arrow
from scoring.shards import Shard, SourceFile, footer_digest

logger = logging.getLogger(__name__)

_SHOWN_CELL_CHARS = 40

# What a cell raises that Python has no value for, like the year 300000; ArrowInvalid is a ValueError.
_CELL_ERRORS = (ValueError, OverflowError)


class UnreadableFileError(Exception):
    """A CSV file that cannot be read to its end. `rows_read` rows came before; how many are lost nobody knows."""

    def __init__(self, source_file: str, reason: str, rows_read: int) -> None:
        # All arguments, or the error would not survive its way from a worker to the driver.
        super().__init__(source_file, reason, rows_read)
        self.source_file = source_file
        self.reason = reason
        self.rows_read = rows_read

    def __str__(self) -> str:
        return f"{self.source_file}: cannot be read after {self.rows_read} rows: {self.reason}"


def read_shard(shard: Shard, schema: ReadSchema, csv_config: CsvConfig, block_rows: int) -> Iterator[pa.Table]:
    """The shard's rows in order, in blocks of at most `block_rows`; only malformed CSV records may come late, or together.

    Of a parquet file every row that the plan counts is there: those that cannot be read are marked file_unreadable. A CSV
    file that breaks off raises UnreadableFileError after its last whole record; the rows before are numbered from 0
    without a gap.
    """
    if shard.file.format == "parquet":
        yield from _read_parquet(shard, schema, block_rows)
    else:
        yield from _read_csv(shard, schema, csv_config, block_rows)


# --- parquet


@dataclass(frozen=True)
class _Span:
    """Row groups read together, and the rows of the file that they hold: [start, end)."""

    row_groups: tuple[int, ...]
    start: int
    end: int


def _read_parquet(shard: Shard, schema: ReadSchema, block_rows: int) -> Iterator[pa.Table]:
    if not shard.num_rows:
        return
    whole = _Span(shard.row_groups, shard.first_row, shard.first_row + shard.num_rows)
    with ExitStack() as stack:
        try:
            parquet = stack.enter_context(_open_parquet(shard.file))
        except FILE_ERRORS as error:
            yield from _lost_rows(whole.start, whole.end, error, shard, schema, block_rows)
            return
        row, failure = yield from _read_span(parquet, whole, whole.start, shard, schema, block_rows)
        if failure is None:
            return
        # Blocks may span row groups, so they are read together, and one at a time only from where that breaks.
        for span in _group_spans(shard, whole.end) if len(shard.row_groups) > 1 else ():
            if row < span.end:
                row, cause = yield from _read_span(parquet, span, row, shard, schema, block_rows)
                if cause is not None:
                    yield from _lost_rows(row, span.end, cause, shard, schema, block_rows)
                    row = span.end
        yield from _lost_rows(row, whole.end, failure, shard, schema, block_rows)


@contextmanager
def _open_parquet(file: SourceFile) -> Iterator[pq.ParquetFile]:
    # Few writers store checksums, but where they do, a flipped bit in plain values shows in nothing else.
    with open_for_arrow(file.listed) as stream, pq.ParquetFile(stream, page_checksum_verification=True) as parquet:
        if footer_digest(stream) != file.footer:
            raise ChangedFileError("changed since it was listed (another footer); rerun for the file as it is now")
        yield parquet


def _group_spans(shard: Shard, end: int) -> Iterator[_Span]:
    start = shard.first_row
    for group in shard.row_groups:
        num_rows = shard.file.row_groups[group][0]
        yield _Span((group,), start, min(start + num_rows, end))
        start += num_rows


def _read_span(
    parquet: pq.ParquetFile, span: _Span, row: int, shard: Shard, schema: ReadSchema, block_rows: int
) -> Generator[pa.Table, None, tuple[int, Exception | None]]:
    """The span's blocks from `row` on; returns the row after the last one read, and what kept it from the end."""
    wanted = [name for name in schema.file_columns if name in shard.file.columns]
    batches = parquet.iter_batches(block_rows, row_groups=list(span.row_groups), columns=wanted, use_threads=False)
    start = span.start
    while True:
        try:
            batch = next(batches, None)
        except FILE_ERRORS as error:
            return row, error
        if batch is None:
            break
        if start + batch.num_rows > span.end:
            return row, OSError(f"holds more rows than the {span.end - span.start} that its footer says")
        table = pa.Table.from_batches([batch]).slice(max(0, row - start))
        start += batch.num_rows
        if table.num_rows:
            rows = np.arange(row, start, dtype=np.int64)
            row = start
            yield from _blocks(table, rows, _invalid_text(table), shard, schema)
    if start < span.end:
        return row, OSError(f"holds {start - span.start} rows where its footer says {span.end - span.start}")
    return row, None


def _lost_rows(
    start: int, end: int, error: Exception, shard: Shard, schema: ReadSchema, block_rows: int
) -> Iterator[pa.Table]:
    """Rows [start, end) of the file, known from its footer alone."""
    if start == end:
        return
    message = f"rows {start} to {end - 1} cannot be read: {describe(error)}"
    if not isinstance(error, ChangedFileError):
        message += "; restore or rewrite the file"
    logger.warning("%s: %s", shard.file.source_file, message)
    for first in range(start, end, block_rows):
        rows = np.arange(first, min(first + block_rows, end), dtype=np.int64)
        identity = Identity(shard.file.source_file, shard.index, rows)
        yield build_bad_block(identity, schema, Reason.FILE_UNREADABLE, [message] * len(rows))


def _invalid_text(table: pa.Table) -> dict[int, str]:
    """Rows with text that is not UTF-8 (parquet readers do not check), and what to tell."""
    bad: dict[int, str] = {}
    for name in table.column_names:
        if not pt.is_string(plain_type(table[name].type)):
            continue
        try:
            table[name].validate(full=True)
        except pa.ArrowInvalid:
            for row, cell in enumerate(plain(table[name]).cast(pa.binary()).to_pylist()):
                text = (cell or b"").decode(errors="replace")
                if cell is not None and text.encode() != cell:
                    bad.setdefault(row, _describe_bad_bytes(name, "utf-8", text))
    return bad


def _describe_bad_bytes(name: str, encoding: str, text: str) -> str:
    return f"column {name!r} holds bytes that are no {encoding} text: {text[:_SHOWN_CELL_CHARS]!r}"


# --- blocks


def _blocks(
    table: pa.Table, rows: npt.NDArray[np.int64], bad: dict[int, str], shard: Shard, schema: ReadSchema
) -> Iterator[pa.Table]:
    """The table as one block, and the rows of `bad` (by position, with their messages) as another."""
    if not bad:
        yield from _good_blocks(table, rows, shard, schema)
        return
    positions = sorted(bad)
    good = np.ones(len(rows), dtype=np.bool_)
    good[positions] = False
    yield from _good_blocks(table.filter(pa.array(good)), rows[good], shard, schema)
    yield _malformed_block(rows[~good], [bad[position] for position in positions], shard, schema)


def _good_blocks(table: pa.Table, rows: npt.NDArray[np.int64], shard: Shard, schema: ReadSchema) -> Iterator[pa.Table]:
    """The table as one block, or in halves down to the row with a value that Python or the column's type cannot hold."""
    try:
        block = _block(table, rows, shard, schema)
    except _CELL_ERRORS as error:
        if len(rows) == 1:
            yield _malformed_block(rows, [f"holds a value that cannot be handled: {describe(error)}"], shard, schema)
            return
        half = len(rows) // 2
        yield from _good_blocks(table.slice(0, half), rows[:half], shard, schema)
        yield from _good_blocks(table.slice(half), rows[half:], shard, schema)
    else:
        yield block


def _malformed_block(rows: npt.NDArray[np.int64], messages: list[str], shard: Shard, schema: ReadSchema) -> pa.Table:
    return build_bad_block(Identity(shard.file.source_file, shard.index, rows), schema, Reason.ROW_MALFORMED, messages)


def _block(table: pa.Table, rows: npt.NDArray[np.int64], shard: Shard, schema: ReadSchema) -> pa.Table:
    names = schema.file_columns
    for key in shard.file.partition:
        if key in names and key not in shard.file.columns:
            value = pa.scalar(shard.file.partition[key], pa.string())
            table = table.append_column(key, pa.repeat(value, len(rows)))
    as_text = frozenset(name for name in names if shard.file.is_text(name))
    return build_block(table, Identity(shard.file.source_file, shard.index, rows), schema, as_text)


# --- CSV


def _read_csv(shard: Shard, schema: ReadSchema, config: CsvConfig, block_rows: int) -> Iterator[pa.Table]:
    """Blocks of good records, and of malformed ones once their place is passed.

    The parser runs ahead of the batches it hands out, so a malformed record may be known before its turn: records are
    numbered by skipping the numbers of the malformed ones. One batch is held back, for it may end in a broken record.
    """
    malformed: dict[int, str] = {}
    next_row = 0
    held: _Records | None = None
    records = CsvRecords(shard, schema, config, malformed)
    for table in records:
        rows, next_row = _number_rows(next_row, table.num_rows, malformed)
        if held is not None:
            yield from _csv_blocks(held, shard, schema, config, block_rows)
        held = _Records(table, rows)
    end = next(row for row in itertools.count(next_row) if row not in malformed)
    if records.is_cut_short:
        end = max(0, end - 1)
    if held is not None:
        yield from _csv_blocks(held.before(end), shard, schema, config, block_rows)
    order = sorted(row for row in malformed if row < end or records.failure is None)
    if order:
        yield _malformed_block(np.array(order, dtype=np.int64), [malformed[row] for row in order], shard, schema)
    if records.failure is not None:
        raise UnreadableFileError(shard.file.source_file, records.reason, end) from records.failure


@dataclass(frozen=True)
class _Records:
    """CSV records as text, and their row numbers in the file."""

    table: pa.Table
    rows: npt.NDArray[np.int64]

    def before(self, end: int) -> "_Records":
        count = int(np.searchsorted(self.rows, end))
        return _Records(self.table.slice(0, count), self.rows[:count])


def _csv_blocks(
    records: _Records, shard: Shard, schema: ReadSchema, config: CsvConfig, block_rows: int
) -> Iterator[pa.Table]:
    for offset in range(0, len(records.rows), block_rows):
        piece, rows = records.table.slice(offset, block_rows), records.rows[offset : offset + block_rows]
        yield from _blocks(piece, rows, _undecodable(piece, config.encoding), shard, schema)


def _number_rows(start: int, count: int, malformed: dict[int, str]) -> tuple[npt.NDArray[np.int64], int]:
    """The next `count` record numbers from `start` that are not malformed, and where to go on."""
    numbers = itertools.islice((row for row in itertools.count(start) if row not in malformed), count)
    rows = np.fromiter(numbers, dtype=np.int64, count=count)
    return rows, int(rows[-1]) + 1 if count else start


def _undecodable(table: pa.Table, encoding: str) -> dict[int, str]:
    bad: dict[int, str] = {}
    for name in table.column_names:
        for row in np.flatnonzero(pc.match_substring(table[name], BAD_BYTES).to_numpy()).tolist():
            bad.setdefault(row, _describe_bad_bytes(name, encoding, show_text(table[name][row].as_py())))
    return bad
