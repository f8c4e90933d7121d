"""The records of one CSV file: its text in any encoding, good records as tables, malformed and broken ones told apart.

Owns parsing. Numbers, identities and blocks are `reading.py`'s.
"""

import codecs
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.csv as pacsv

from scoring.columns import ReadSchema
from scoring.config import CsvConfig
from scoring.opening import FILE_ERRORS, ChangedFileError, describe, open_csv_text
from scoring.shards import Shard

# Stands for bytes that are no text in input.csv.encoding until their row is marked; no text holds noncharacters.
BAD_BYTES = "\ufdd0\ufdef"

# One CSV record must fit into a block ("straddling object straddles two block boundaries"); images in base64 are long.
_BLOCK_BYTES = 32 * 2**20
_PIECE_BYTES = 2**20
_SHOWN_CHARS = 200


class CsvRecords:
    """Iterates over a file's good records, never in empty tables, and notes malformed ones by their number.

    It ends where the file breaks; then `failure` tells why. `is_cut_short`: the last record may lack its end, since the
    parser was told that the file ends there, so as to hand out all that came before.
    """

    def __init__(self, shard: Shard, schema: ReadSchema, config: CsvConfig, malformed: dict[int, str]) -> None:
        self._shard = shard
        self._wanted = [name for name in schema.file_columns if name in shard.file.columns]
        self._config = config
        self._malformed = malformed
        self.failure: Exception | None = None
        self.is_cut_short = False

    @property
    def reason(self) -> str:
        """Why the file breaks, and what to do; only after a failure."""
        assert self.failure is not None
        if isinstance(self.failure, ChangedFileError):
            return describe(self.failure)
        advice = "restore or remove the file"
        if "straddling object" in str(self.failure):
            advice = f"a record is longer than {_BLOCK_BYTES} bytes, or a quote is never closed; repair the file"
        return f"{describe(self.failure)}; {advice}"

    def __iter__(self) -> Iterator[pa.Table]:
        text: _Utf8Text | None = None
        try:
            with open_csv_text(self._shard.file.listed) as stream:
                text = _Utf8Text(stream, self._config.encoding)
                for batch in self._open(text):
                    if batch.num_rows:
                        yield pa.Table.from_batches([batch])
        except FILE_ERRORS as error:
            self.failure = error
        # What the parser says of the last line is a consequence.
        if text is not None and text.failure is not None:
            self.failure = text.failure
            self.is_cut_short = True

    def _open(self, text: "_Utf8Text") -> pacsv.CSVStreamingReader:
        return pacsv.open_csv(
            pa.PythonFile(text, mode="r"),
            read_options=pacsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            parse_options=pacsv.ParseOptions(
                delimiter=self._config.delimiter, newlines_in_values=True, invalid_row_handler=self._note_malformed
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(self._shard.file.columns, pa.string()),
                include_columns=self._wanted,
                strings_can_be_null=False,
            ),
        )

    def _note_malformed(self, record: pacsv.InvalidRow) -> str:
        # Numbers count the header as 1 and blank lines not at all (tried with pyarrow 24).
        text = show_text(record.text)[:_SHOWN_CHARS]
        wanted = len(self._shard.file.columns)
        self._malformed[record.number - 2] = f"{record.actual_columns} cells where the header has {wanted}: {text!r}"
        return "skip"


class _Utf8Text(io.RawIOBase):
    """A file's text as UTF-8, ending with a newline, `BAD_BYTES` where it is no text.

    Pyarrow's own transcoding fails the file at one bad byte, and so does a malformed record with one. It also takes a
    header that ends without a newline for an empty file, and loses the newline of a quoted \\r\\n between two reads: no
    read ends with \\r. Where the file breaks, the text ends and `failure` tells why.
    """

    def __init__(self, stream: io.BufferedIOBase, encoding: str) -> None:
        def mark(error: UnicodeError) -> tuple[str, int]:
            assert isinstance(error, UnicodeDecodeError)
            return BAD_BYTES, error.end

        codecs.register_error("scoring_mark", mark)
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="scoring_mark")
        self._pending = b""
        self._is_at_end = False
        self.failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size > 1, "pyarrow reads blocks"
        pieces, length = [self._pending], len(self._pending)
        while length < size and not self._is_at_end:
            data = self._read_piece(min(size, _PIECE_BYTES))
            self._is_at_end = not data
            text = self._decoder.decode(data, final=self._is_at_end).encode() + (b"\n" if self._is_at_end else b"")
            pieces.append(text)
            length += len(text)
        self._pending = b"".join(pieces)
        piece = self._pending[:size]
        if piece.endswith(b"\r"):
            piece = piece[:-1]
        self._pending = self._pending[len(piece) :]
        return piece

    def _read_piece(self, size: int) -> bytes:
        try:
            # read1: a longer read would lose what it has when it breaks.
            return self._stream.read1(size)
        except FILE_ERRORS as error:
            self.failure = error
            return b""


def show_text(text: str) -> str:
    """The text as a message has it: a replacement character for bytes that are none."""
    return text.replace(BAD_BYTES, "\ufffd")
