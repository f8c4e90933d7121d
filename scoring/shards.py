"""Inputs to shards: which files there are, what columns and rows they hold, and how they are cut into shards.

Owns listing, inspection (parquet footers, CSV headers), the schema check across files against the predictor's columns,
and the cutting. Reads no rows (`reading`). Every problem of every file is found before anything is reported.
"""

import csv
import hashlib
import io
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from scoring.columns import KeptColumn, ModelColumn, ReadSchema, plain_type
from scoring.config import DEFAULT_NULL_VALUES, CsvConfig, InputConfig
from scoring.errors import ConfigError, InputError
from scoring.images import is_image_type
from scoring.opening import describe, is_gzip, open_csv_text, open_for_arrow
from scoring.spec import FeatureSpec
from scoring.storage import ListedFile, expand, redact

logger = logging.getLogger(__name__)

Format = Literal["parquet", "csv"]

_SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".csv.gz": "csv"}
_PARTITION = re.compile(r"([^/=]+)=([^/]*)")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
# A shard is the unit of a read task: large enough to be worth a task, small enough to spread a single file.
_SHARD_ROWS = 16_384
_SHARD_BYTES = 64 * 2**20
_CSV_SAMPLE_BYTES = 256 * 2**10
_FOOTER_BYTES = 64 * 2**10  # read at once, as arrow does; few are larger
_GZIP_FACTOR = 4  # text of this kind; only an estimate for progress, corrected when the file is read
_INSPECT_THREADS = 16


@dataclass(frozen=True)
class SourceFile:
    """One input file. `columns` are its own, in order, with plain arrow types; `partition` the Hive keys of its path.

    `row_groups` are (rows, bytes) each, empty for CSV, whose `num_rows` is an estimate. `footer` is the digest of a parquet
    file's footer: a file with another one is no longer this file.
    """

    uri: str
    source_file: str
    size_bytes: int
    version: str
    format: Format
    columns: dict[str, pa.DataType]
    partition: dict[str, str | None]
    num_rows: int
    row_groups: tuple[tuple[int, int], ...] = ()
    footer: str = ""

    @property
    def listed(self) -> ListedFile:
        """The file as the listing had it."""
        return ListedFile(self.uri, self.size_bytes, self.version)

    @property
    def all_columns(self) -> dict[str, pa.DataType]:
        """File columns and partition keys; a key that the file holds too is the file's."""
        return {**dict.fromkeys(self.partition, pa.string()), **self.columns}

    def is_text(self, name: str) -> bool:
        """Whether a column's cells are text that we cast: all of a CSV, and partition keys."""
        return self.format == "csv" or name not in self.columns


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be read, and why. `num_rows` is how many rows are lost with it, None where nobody knows."""

    source_file: str
    reason: str
    num_rows: int | None


@dataclass(frozen=True)
class Shard:
    """A run of whole row groups of one parquet file, or one CSV file. `num_rows` is None where only reading tells."""

    index: int
    file: SourceFile
    first_row: int
    num_rows: int | None
    row_groups: tuple[int, ...] = ()

    @property
    def estimated_rows(self) -> int:
        return self.file.num_rows if self.num_rows is None else self.num_rows


@dataclass(frozen=True)
class InputPlan:
    """What a run reads: its files, shards and the schema they share."""

    files: tuple[SourceFile, ...]
    shards: tuple[Shard, ...]
    schema: ReadSchema

    @property
    def estimated_rows(self) -> int:
        return sum(shard.estimated_rows for shard in self.shards)

    @property
    def has_exact_rows(self) -> bool:
        return all(shard.num_rows is not None for shard in self.shards)

    @property
    def row_bytes(self) -> float:
        """Bytes a row of the files; 0 where one is a CSV, whose rows nobody has counted yet."""
        if any(file.format != "parquet" for file in self.files):
            return 0.0
        return sum(file.size_bytes for file in self.files) / max(1, sum(file.num_rows for file in self.files))


def list_inputs(config: InputConfig) -> list[ListedFile]:
    """Every file of every input, sorted, each once.

    Raises InputError naming all inputs that match nothing, and files that would share one source_file.
    """
    found: dict[str, ListedFile] = {}
    problems: list[str] = []
    for path in config.paths:
        listed = expand(path)
        usable = [file for file in listed if _format(file.uri, config) is not None]
        if not usable:
            problems.append(_no_match(path, listed))
        for file in usable:
            name = redact(file.uri)
            if name not in found:
                found[name] = file
            elif (file.size_bytes, file.version) == (found[name].size_bytes, found[name].version):
                logger.warning("input.paths: %s is named more than once; it is read once", name)
            else:
                problems.append(
                    f"input {redact(path)}: {name} stands for different files once credentials and queries are left "
                    "out, and their rows could not be told apart; score them in separate runs"
                )
        if len(usable) < len(listed):
            logger.info("input.paths: %s: %d other files ignored", redact(path), len(listed) - len(usable))
    if problems:
        raise InputError("\n".join(problems))
    return sorted(found.values(), key=lambda file: file.uri)


def _no_match(path: str, listed: Sequence[ListedFile]) -> str:
    suffixes = ", ".join(_SUFFIXES)
    if not listed:
        return f"input {redact(path)}: matches no file; give a file, a folder, a glob or a URI of {suffixes} files"
    return (
        f"input {redact(path)}: {len(listed)} files, none of them {suffixes} (first: {redact(listed[0].uri)}); "
        "set input.format if they are parquet or CSV under another name"
    )


def _format(uri: str, config: InputConfig) -> Format | None:
    if config.format != "auto":
        return config.format
    name = redact(uri).lower()  # a signed URL ends with its signature
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)


def inspect_files(listing: Sequence[ListedFile], config: InputConfig) -> tuple[SourceFile, ...]:
    """Read every footer and header; under input.on_bad_file=skip the files that cannot be read are left out.

    Under fail it raises InputError naming every such file, with its reason.
    """
    files, bad_files = inspect_all(listing, config)
    if bad_files and config.on_bad_file == "fail":
        raise _unreadable(bad_files, len(listing))
    return files


def inspect_all(
    listing: Sequence[ListedFile], config: InputConfig
) -> tuple[tuple[SourceFile, ...], tuple[BadFile, ...]]:
    """Read every footer and header: the files to score, and those that cannot be read, in the listing's order.

    Raises InputError, under either policy, when that leaves no file to score.
    """

    def inspect(file: ListedFile) -> SourceFile | BadFile:
        try:
            return _inspect(file, config)
        except (OSError, ValueError, pa.ArrowException, csv.Error, EOFError, zlib.error) as error:
            return BadFile(redact(file.uri), describe(error), num_rows=None)

    with ThreadPoolExecutor(_INSPECT_THREADS) as pool:
        inspected = list(pool.map(inspect, listing))
    files = tuple(item for item in inspected if isinstance(item, SourceFile))
    bad_files = tuple(item for item in inspected if isinstance(item, BadFile))
    if bad_files and not files:
        raise _unreadable(bad_files, len(listing))
    if config.on_bad_file == "skip":
        for bad in bad_files:
            logger.warning("input.on_bad_file=skip: %s cannot be read and is left out: %s", bad.source_file, bad.reason)
    return files, bad_files


def _unreadable(bad_files: Sequence[BadFile], num_files: int) -> InputError:
    advice = "restore or remove these files"
    head = f"{len(bad_files)} of {num_files} input files cannot be read; {advice}:"
    return InputError("\n".join([head, *(f"{bad.source_file}: {bad.reason}" for bad in bad_files)]))


def _inspect(file: ListedFile, config: InputConfig) -> SourceFile:
    inspect = _inspect_parquet if _format(file.uri, config) == "parquet" else _inspect_csv
    return inspect(file, config.csv)


def _inspect_parquet(file: ListedFile, _: CsvConfig) -> SourceFile:
    with open_for_arrow(file) as stream, pq.ParquetFile(stream) as parquet:
        metadata = parquet.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        schema = parquet.schema_arrow
        footer = footer_digest(stream)
    _refuse_duplicates(schema.names)
    rows = [group.num_rows for group in groups]
    # Identities come from these numbers, also for rows that cannot be read.
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError(f"its footer says {metadata.num_rows} rows, its row groups {rows[:5]}; rewrite the file")
    return SourceFile(
        uri=file.uri,
        source_file=redact(file.uri),
        size_bytes=file.size_bytes,
        version=file.version,
        format="parquet",
        columns={field.name: plain_type(field.type) for field in schema},
        partition=partition_keys(file.uri),
        num_rows=metadata.num_rows,
        row_groups=tuple((group.num_rows, group.total_byte_size) for group in groups),
        footer=footer,
    )


def footer_digest(stream: "pa.NativeFile | io.BufferedIOBase") -> str:
    """What a parquet file's footer says (row counts, offsets, sizes, statistics): a file put in another's place is noticed.

    Of its bytes, once arrow has understood them: to write a damaged one anew, as `FileMetaData.write_metadata_file` does, ended
    the process in 2 of 12,000 damaged files (pyarrow 24).
    """
    end = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, end - _FOOTER_BYTES))
    tail = stream.read()
    size = int.from_bytes(tail[-8:-4], "little") + 8
    if size > len(tail):
        stream.seek(max(0, end - size))
        tail = stream.read()
    return hashlib.blake2b(tail[-size:], digest_size=16).hexdigest()


def _inspect_csv(file: ListedFile, config: CsvConfig) -> SourceFile:
    with open_csv_text(file) as stream:
        sample = stream.read(_CSV_SAMPLE_BYTES)
    header, sample_rows = _csv_sample(sample, config)
    _refuse_duplicates(header)
    size = file.size_bytes * (_GZIP_FACTOR if is_gzip(file.uri) else 1)
    return SourceFile(
        uri=file.uri,
        source_file=redact(file.uri),
        size_bytes=file.size_bytes,
        version=file.version,
        format="csv",
        columns=dict.fromkeys(header, pa.string()),
        partition=partition_keys(file.uri),
        num_rows=sample_rows if len(sample) < _CSV_SAMPLE_BYTES else round(size / len(sample) * sample_rows),
    )


def _csv_sample(sample: bytes, config: CsvConfig) -> tuple[list[str], int]:
    text = sample.decode(
        "utf-8-sig" if config.encoding.lower() in ("utf-8", "utf8") else config.encoding, errors="replace"
    )
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_SAMPLE_BYTES))  # an image in base64 is one field
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=config.delimiter)
    header = next((row for row in rows if row), None)
    if header is None:
        raise ValueError("no header; an empty CSV file has a header line and no rows")
    if any("\ufffd" in name for name in header):
        raise ValueError(f"the header is no {config.encoding} text: {header}; set input.csv.encoding")
    return header, sum(1 for row in rows if row)


def _refuse_duplicates(names: Sequence[str]) -> None:
    seen: set[str] = set()
    repeated = sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    if repeated:
        raise ValueError(f"column names occur more than once: {', '.join(repeated)}")


def partition_keys(uri: str) -> dict[str, str | None]:
    """The Hive keys of a file's folders: `.../country=at/part.parquet` -> {"country": "at"}."""
    folders = redact(uri).split("/")[:-1]
    matches = [match for folder in folders if (match := _PARTITION.fullmatch(folder))]
    return {
        key: None if value == _HIVE_NULL else unquote(value) for key, value in (match.groups() for match in matches)
    }


def plan_inputs(
    files: tuple[SourceFile, ...], spec: FeatureSpec, config: InputConfig, reserved: Sequence[str]
) -> InputPlan:
    """Check the columns of all files against the predictor and each other, and cut the files into shards.

    Raises InputError naming every file whose model columns are missing or of another type, and ConfigError when a kept
    column is nowhere or named like an output column (`reserved`).
    """
    problems = [problem for file in files for problem in _missing_columns(file, spec)]
    model: list[ModelColumn] = []
    if not problems:
        for name, role, accepts in _wanted_columns(spec):
            column, disagreements = _agree(files, name, role, accepts)
            problems += disagreements
            if column is not None:
                model.append(column)
    if problems:
        raise InputError("\n".join(problems))
    nulls = DEFAULT_NULL_VALUES if config.csv.null_values is None else config.csv.null_values
    kept = _kept_columns(files, spec, config.keep, reserved)
    return InputPlan(files, cut_shards(files), ReadSchema(tuple(model), kept, tuple(nulls)))


def _missing_columns(file: SourceFile, spec: FeatureSpec) -> list[str]:
    missing = [name for name in spec.columns if name not in file.all_columns]
    if not missing:
        return []
    shown = ", ".join(file.all_columns)
    return [
        f"{file.source_file}: column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))} missing, the predictor "
        f"reads {'them' if len(missing) > 1 else 'it'}; the file has: {shown}. Rename or add the column"
    ]


def _wanted_columns(spec: FeatureSpec) -> Iterable[tuple[str, str, Callable[[pa.DataType], pa.DataType | None]]]:
    """(name, what the predictor needs, a function from a file's type to the canonical type or None when unusable)."""
    categorical = {column.name: column.kind for column in spec.categorical}
    numerical = {column.name for column in spec.numerical}
    numerical |= {column.name for column in spec.text if column.origin == "numerical"}
    images = {column.name for column in spec.image}
    for name in spec.columns:
        if name in images:
            yield name, "image", lambda kind: kind if is_image_type(kind) else None
        elif name in numerical:
            yield name, "number", lambda kind: pa.float64() if _is_number(kind) or pt.is_string(kind) else None
        elif categorical.get(name) == "number":
            yield name, "category", lambda kind: pa.float64() if _is_number(kind) and not pt.is_boolean(kind) else None
        elif categorical.get(name) == "bool":
            yield name, "category", lambda kind: pa.bool_() if pt.is_boolean(kind) else None
        elif name in categorical:
            yield name, "category", lambda kind: pa.string() if pt.is_string(kind) else None
        else:
            yield name, "text", lambda kind: None if pt.is_binary(kind) or pt.is_nested(kind) else pa.string()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind) or pt.is_boolean(kind))


def _agree(
    files: Sequence[SourceFile], name: str, role: str, accepts: Callable[[pa.DataType], pa.DataType | None]
) -> tuple[ModelColumn | None, list[str]]:
    """The canonical column, or one line a file that does not fit the predictor or the first file."""
    canonical: dict[pa.DataType, list[str]] = {}
    problems = []
    for file in files:
        kind = file.all_columns[name]
        if pt.is_null(kind):
            continue  # a column of nulls alone fits every type
        # Text that we read ourselves is cast to whatever the predictor was fitted on.
        fits = _text_becomes(role, accepts) if file.is_text(name) else accepts(kind)
        if fits is None:
            problems.append(
                f"{file.source_file}: column {name!r} is {kind}, the predictor was fitted on a {role} of another type; cast it"
            )
        else:
            canonical.setdefault(fits, []).append(file.source_file)
    if len(canonical) > 1:
        named = " but ".join(f"{kind} in {', '.join(sources)}" for kind, sources in canonical.items())
        problems.append(f"column {name!r} is {named}; cast it to one type")
    if problems:
        return None, problems
    fallback = accepts(pa.float64()) or accepts(pa.bool_()) or accepts(pa.string())
    return ModelColumn(name, role, next(iter(canonical), fallback)), []  # type: ignore[arg-type]


def _text_becomes(role: str, accepts: Callable[[pa.DataType], pa.DataType | None]) -> pa.DataType | None:
    if role != "category":
        return accepts(pa.string())
    return accepts(pa.string()) or accepts(pa.float64()) or accepts(pa.bool_())


def _kept_columns(
    files: Sequence[SourceFile], spec: FeatureSpec, keep: Sequence[str] | None, reserved: Sequence[str]
) -> tuple[KeptColumn, ...]:
    present = dict.fromkeys(name for file in files for name in file.all_columns)
    if keep is None:
        with_bytes = {name for file in files for name, kind in file.all_columns.items() if _holds_bytes(kind)}
        names = [name for name in present if name not in spec.columns and name not in with_bytes]
    else:
        names = list(keep)
        unknown = [name for name in names if name not in present]
        if unknown and files:
            raise ConfigError(f"input.keep: {', '.join(unknown)} in no input file; they have: {', '.join(present)}")
    collisions = [name for name in names if name in reserved]
    if collisions:
        raise ConfigError(
            f"input.keep: {', '.join(collisions)} would collide with output columns of that name; rename the input column or "
            "list the columns to keep in input.keep"
        )
    return tuple(KeptColumn(name, _common_type(files, name)) for name in names)


def _holds_bytes(kind: pa.DataType) -> bool:
    children = [kind.field(i).type for i in range(kind.num_fields)] if pt.is_nested(kind) else []
    return bool(pt.is_binary(plain_type(kind))) or any(_holds_bytes(child) for child in children)


def _common_type(files: Sequence[SourceFile], name: str) -> pa.DataType:
    kinds = {file.all_columns[name] for file in files if name in file.all_columns} - {pa.null()}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds and all(_is_number(kind) and not pt.is_boolean(kind) and not pt.is_decimal(kind) for kind in kinds):
        if not all(pt.is_integer(kind) for kind in kinds):
            return pa.float64()
        if pa.uint64() not in kinds:
            return pa.int64()
    if kinds:
        logger.warning(
            "input.keep: column %r is %s in different files; it is kept as text", name, sorted(map(str, kinds))
        )
    return pa.string()


def cut_shards(files: Sequence[SourceFile]) -> tuple[Shard, ...]:
    """Files in order -> shards in order, numbered from 0; every row of every file is in exactly one."""
    shards: list[Shard] = []
    for file in files:
        if file.format == "csv":
            shards.append(Shard(len(shards), file, first_row=0, num_rows=None))
            continue
        first_row = 0
        for groups in _group_row_groups(file.row_groups):
            num_rows = sum(file.row_groups[group][0] for group in groups)
            shards.append(Shard(len(shards), file, first_row, num_rows, groups))
            first_row += num_rows
    return tuple(shards)


def _group_row_groups(row_groups: Sequence[tuple[int, int]]) -> Iterable[tuple[int, ...]]:
    """Consecutive row groups up to a shard's rows and bytes; a file without any is one empty shard."""
    group: list[int] = []
    rows = size_bytes = 0
    for index, (num_rows, num_bytes) in enumerate(row_groups):
        if group and (rows + num_rows > _SHARD_ROWS or size_bytes + num_bytes > _SHARD_BYTES):
            yield tuple(group)
            group, rows, size_bytes = [], 0, 0
        group.append(index)
        rows, size_bytes = rows + num_rows, size_bytes + num_bytes
    yield tuple(group)
