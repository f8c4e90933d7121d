"""Reading one shard: its rows as blocks of the run's schema, each row with its identity.

Owns parquet row groups and CSV records, malformed ones included. `source.py` gives this to Ray; nothing here imports it.
"""

import codecs
import io
import itertools
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pyarrow.types as pt

from scoring.columns import Identity, ReadSchema, build_bad_block, build_block, plain, plain_type
from scoring.config import CsvConfig
from scoring.errors import InputError, Reason
from scoring.shards import Shard, open_csv_text
from scoring.storage import open_input, redact_text

# One CSV record must fit into a block ("straddling object straddles two block boundaries"); images in base64 are long.
_CSV_BLOCK_BYTES = 32 * 2**20
_SHOWN_CHARS = 200
_SHOWN_CELL_CHARS = 40
# Stands for bytes that are no text in input.csv.encoding until their row is marked; no text holds noncharacters.
_BAD_BYTES = "\ufdd0\ufdef"


def read_shard(shard: Shard, schema: ReadSchema, csv_config: CsvConfig, block_rows: int) -> Iterator[pa.Table]:
    """The shard's rows in order, in blocks of at most `block_rows`. Raises InputError naming the file."""
    try:
        if shard.file.format == "parquet":
            yield from _read_parquet(shard, schema, block_rows)
        else:
            yield from _read_csv(shard, schema, csv_config, block_rows)
    except (OSError, ValueError, pa.ArrowException, EOFError, zlib.error) as error:
        advice = "restore or remove the file"
        if "straddling object" in str(error):
            advice = f"a record is longer than {_CSV_BLOCK_BYTES} bytes, or a quote is never closed; repair the file"
        reason = redact_text(str(error))
        raise InputError(f"{shard.file.source_file}: cannot be read: {reason}; {advice}") from error


def _read_parquet(shard: Shard, schema: ReadSchema, block_rows: int) -> Iterator[pa.Table]:
    if not shard.num_rows:
        return
    wanted = [name for name in schema.file_columns if name in shard.file.columns]
    row = shard.first_row
    with open_input(shard.file.uri) as stream, pq.ParquetFile(stream) as parquet:
        batches = parquet.iter_batches(block_rows, row_groups=list(shard.row_groups), columns=wanted, use_threads=False)
        for batch in batches:
            rows = np.arange(row, row + batch.num_rows, dtype=np.int64)
            table = pa.Table.from_batches([batch])
            yield from _blocks(table, rows, _invalid_text(table), shard, schema)
            row += batch.num_rows
    read = row - shard.first_row
    if read != shard.num_rows:
        raise InputError(
            f"{shard.file.source_file}: {read} rows read, its footer says {shard.num_rows}; rewrite the file"
        )


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


def _blocks(
    table: pa.Table, rows: npt.NDArray[np.int64], bad: dict[int, str], shard: Shard, schema: ReadSchema
) -> Iterator[pa.Table]:
    """The table as one block, and the rows of `bad` (by position, with their messages) as another."""
    if not bad:
        yield _block(table, rows, shard, schema)
        return
    positions = sorted(bad)
    good = np.ones(len(rows), dtype=np.bool_)
    good[positions] = False
    yield _block(table.filter(pa.array(good)), rows[good], shard, schema)
    identity = Identity(shard.file.source_file, shard.index, rows[~good])
    yield build_bad_block(identity, schema, Reason.ROW_MALFORMED, [bad[position] for position in positions])


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
        text = _show(record.text)[:_SHOWN_CHARS]
        malformed[record.number - 2] = f"{record.actual_columns} cells where the header has {num_columns}: {text!r}"
        return "skip"

    next_row = 0
    with open_csv_text(shard.file.uri) as stream:
        reader = pacsv.open_csv(
            pa.PythonFile(_Utf8Text(stream, config.encoding), mode="r"),
            read_options=pacsv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES),
            parse_options=pacsv.ParseOptions(
                delimiter=config.delimiter, newlines_in_values=True, invalid_row_handler=note_malformed
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(shard.file.columns, pa.string()),
                include_columns=wanted,
                strings_can_be_null=False,
            ),
        )
        for batch in reader:
            rows, next_row = _number_rows(next_row, batch.num_rows, malformed)
            table = pa.Table.from_batches([batch])
            for offset in range(0, len(rows), block_rows):
                piece, piece_rows = table.slice(offset, block_rows), rows[offset : offset + block_rows]
                yield from _blocks(piece, piece_rows, _undecodable(piece, config.encoding), shard, schema)
    if malformed:
        order = sorted(malformed)
        identity = Identity(shard.file.source_file, shard.index, np.array(order, dtype=np.int64))
        yield build_bad_block(identity, schema, Reason.ROW_MALFORMED, [malformed[row] for row in order])


def _number_rows(start: int, count: int, malformed: dict[int, str]) -> tuple[npt.NDArray[np.int64], int]:
    """The next `count` record numbers from `start` that are not malformed, and where to go on."""
    numbers = itertools.islice((row for row in itertools.count(start) if row not in malformed), count)
    rows = np.fromiter(numbers, dtype=np.int64, count=count)
    return rows, int(rows[-1]) + 1 if count else start


class _Utf8Text(io.RawIOBase):
    """A file's text as UTF-8, ending with a newline, `_BAD_BYTES` where it is no text.

    Pyarrow's own transcoding fails the file at one bad byte, and so does a malformed record with one. It also takes a
    header that ends without a newline for an empty file, and loses the newline of a quoted \\r\\n between two reads: no
    read ends with \\r.
    """

    def __init__(self, stream: io.BufferedIOBase, encoding: str) -> None:
        def mark(error: UnicodeError) -> tuple[str, int]:
            assert isinstance(error, UnicodeDecodeError)
            return _BAD_BYTES, error.end

        codecs.register_error("scoring_mark", mark)
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="scoring_mark")
        self._pending = b""
        self._is_at_end = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size > 1, "pyarrow reads blocks"
        while len(self._pending) < size and not self._is_at_end:
            data = self._stream.read(size)
            self._is_at_end = not data
            self._pending += self._decoder.decode(data, final=self._is_at_end).encode()
            self._pending += b"\n" if self._is_at_end else b""
        piece = self._pending[:size]
        if piece.endswith(b"\r"):
            piece = piece[:-1]
        self._pending = self._pending[len(piece) :]
        return piece


def _undecodable(table: pa.Table, encoding: str) -> dict[int, str]:
    bad: dict[int, str] = {}
    for name in table.column_names:
        for row in np.flatnonzero(pc.match_substring(table[name], _BAD_BYTES).to_numpy()).tolist():
            bad.setdefault(row, _describe_bad_bytes(name, encoding, _show(table[name][row].as_py())))
    return bad


def _show(text: str) -> str:
    return text.replace(_BAD_BYTES, "\ufffd")
