"""Verification of a published run: its accounts recomputed from the files alone, and a sample of its rows rescored.

Owns what counts as a difference and how it is told. `verify_files` trusts nothing that the ledger noted on the way: the
manifest is held against the parts as a reader would find them, each read once. `rescore` reads published rows back from the
inputs and asks AutoGluon itself. Nothing is written, no Ray; `verify_files` needs no AutoGluon, no predictor, no inputs.
"""

import hashlib
import io
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from scoring.accounts import PartFile, ShardAccount, identity_checksum, to_ranges
from scoring.columns import SOURCE_FILE, SOURCE_ROW, ReadSchema
from scoring.config import SCORES_VERSION, ScoreConfig, fingerprint, load_config
from scoring.errors import ConfigError, InputError, PredictorError, Reason, Stage, VerificationError
from scoring.ledger import MANIFEST_VERSION
from scoring.parity import Scores, compare
from scoring.predictor import check_hash, extract_spec, fetch_predictor, load_predictor
from scoring.reading import read_shard
from scoring.shards import Shard, SourceFile, inspect_files, list_inputs, plan_inputs
from scoring.spec import FeatureSpec
from scoring.storage import ListedFile, absolute, exists, join, list_names, read_bytes, redact

if TYPE_CHECKING:
    from autogluon.multimodal import MultiModalPredictor

logger = logging.getLogger(__name__)

Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Fault = tuple[str, Mask]
"""What is wrong with some rows of a part, and which."""

_SCORES, _QUARANTINE = "scores", "quarantine"
_PART = "part"
# "unreadable": a file whose number of rows nobody knows (input.on_bad_file=skip); the rows that it gave are counted.
_PUBLISHED_STATES = ("complete", "unreadable")
_SUM_TOLERANCE = 1e-3
# float32 softmax may end one rounding above 1, and two classes may tie in float32 where their logits did not.
_ROUNDING = 1e-6
_SHOWN_PROBLEMS = 20
_SHOWN_ITEMS = 3
_PARTS_A_LOG_LINE = 500
# Rows that are read back and rescored together: their images are all in memory.
_CHUNK_ROWS = 512
_BLOCK_ROWS = 1024
_WITHOUT_RESCORING = "--sample 0 verifies the files alone"


@dataclass(frozen=True)
class PublishedRun:
    """A run's folder below an output."""

    output: str
    run_id: str

    @property
    def uri(self) -> str:
        return join(self.output, "runs", self.run_id)


@dataclass(frozen=True)
class PinnedPredictor:
    """The predictor that scored the run."""

    path: str
    sha256: str


@dataclass(frozen=True)
class StoredFingerprint:
    """What decided the run's scores, each input file's size and version among it."""

    parts: Mapping[str, str]


@dataclass(frozen=True)
class Totals:
    """The run's accounts."""

    rows_read: int
    rows_scored: int
    rows_quarantined: int
    reasons: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """What verification uses of manifest.json; other keys are left alone."""

    version: int
    run_id: str
    fingerprint: StoredFingerprint
    predictor: PinnedPredictor
    files: tuple[PartFile, ...]
    shards: tuple[ShardAccount, ...]
    totals: Totals


@dataclass(frozen=True)
class Recount:
    """What the files hold, counted anew, and every difference from what they should hold.

    `sampled` are the rows to rescore: source_file, source_row, the score columns, and the `part` each was read from.
    """

    manifest: Manifest
    totals: Totals
    checksum: str
    problems: tuple[str, ...]
    sampled: pa.Table | None


@dataclass(frozen=True)
class Rescored:
    """Published scores against AutoGluon's own. `max_abs_diff` as in `parity.py`; None where no row could be compared."""

    rows: int
    max_abs_diff: float | None
    limit: float
    problems: tuple[str, ...]


def find_run(output: str, run_id: str | None) -> PublishedRun:
    """The run that `latest.json` or `run_id` names. Raises ConfigError where there is none, VerificationError for a bad
    `latest.json`."""
    output = absolute(output, Path.cwd())
    names = list_names(join(output, "runs"))
    shown = f"its runs: {_some(names)}" if names else "there is no run below it"
    if run_id is not None:
        if run_id not in names:
            raise ConfigError(f"--run-id: {redact(output)} has no run {run_id}; {shown}")
        return PublishedRun(output, run_id)
    if not exists(join(output, "latest.json")):
        raise ConfigError(
            f"--output: {redact(output)} has no latest.json, so no run was published there; {shown}. Name the --output that "
            "jobs.score was given, or a run with --run-id"
        )
    latest = _read_latest(output)
    if latest not in names:
        raise VerificationError(f"{redact(output)}/latest.json names run {latest}, which is not there; {shown}")
    return PublishedRun(output, latest)


def _read_latest(output: str) -> str:
    try:
        document = json.loads(read_bytes(join(output, "latest.json")))
        run_id, manifest = str(document["run_id"]), document["manifest"]
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"{redact(output)}/latest.json: holds no run_id and manifest ({error!r}); name the run with --run-id"
        ) from error
    if manifest != f"runs/{run_id}/manifest.json":
        raise VerificationError(
            f"{redact(output)}/latest.json: names run {run_id} but the manifest {manifest}; name the run with --run-id"
        )
    return run_id


def _read_manifest(run: PublishedRun) -> Manifest:
    where = f"{redact(run.uri)}/manifest.json"
    try:
        manifest = TypeAdapter(Manifest).validate_json(read_bytes(join(run.uri, "manifest.json")))
    except FileNotFoundError as error:
        state = "there is a _SUCCESS" if exists(join(run.uri, "_SUCCESS")) else "nor is _SUCCESS: it was not published"
        raise VerificationError(
            f"{where}: is missing ({state}), so nothing says what the run holds; rerun its jobs.score command"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise VerificationError(
            f"{where}: {key}: {first['msg']}; restore the manifest that jobs.score wrote, or score again"
        ) from error
    if manifest.version != MANIFEST_VERSION:
        raise VerificationError(
            f"{where}: version {manifest.version}, this code reads {MANIFEST_VERSION}; verify with the version that wrote it"
        )
    return manifest


def raise_if_different(run: PublishedRun, problems: Sequence[str]) -> None:
    """Raise VerificationError naming the problems, the first 20 in words."""
    if not problems:
        return
    count = f"{len(problems)} difference{'s' if len(problems) > 1 else ''}"
    rest = len(problems) - _SHOWN_PROBLEMS
    raise VerificationError(
        "\n".join(
            [
                f"run {run.run_id} at {redact(run.uri)} is not what was published, or never was right: {count}",
                *problems[:_SHOWN_PROBLEMS],
                *([f"... and {rest} more"] if rest > 0 else []),
                "restore the run's folder from a copy, or score again under another --run-id",
            ]
        )
    )


# --- the files


def verify_files(run: PublishedRun, sample_rows: int) -> Recount:
    """Recount the run from its parts; draws `sample_rows` scored rows on the way, the same ones every time.

    Raises VerificationError only where there is no manifest to go by; differences are in the result.
    """
    manifest = _read_manifest(run)
    if exists(join(run.uri, "_work")):
        logger.warning(
            "run %s: _work is still there; rerun its jobs.score command to finish the publication", run.run_id
        )
    picks = _pick_rows(manifest.files, sample_rows, run.run_id)
    tally = _Tally(run, manifest)
    for number, part in enumerate(manifest.files):
        tally.add_part(number, part, picks.get(number, ()))
        if (number + 1) % _PARTS_A_LOG_LINE == 0:
            logger.info("run %s: %d of %d parts read", run.run_id, number + 1, len(manifest.files))
    problems = [*_run_problems(run, manifest), *tally.problems, *tally.stray_parts(), *tally.shard_problems()]
    problems += _totals_problems(manifest.totals, tally.totals)
    sampled = pa.concat_tables(tally.sampled) if tally.sampled and not problems else None
    return Recount(manifest, tally.totals, tally.checksum, tuple(problems), sampled)


def _pick_rows(files: Sequence[PartFile], wanted: int, seed: str) -> dict[int, list[int]]:
    """Rows of scores parts by the part's number: every scored row is as likely as any other."""
    numbers = [number for number, part in enumerate(files) if part.path.startswith(f"{_SCORES}/")]
    ends = np.cumsum([files[number].rows for number in numbers], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    picks: dict[int, list[int]] = {}
    for row in sorted(random.Random(seed).sample(range(total), min(wanted, total))):
        place = int(np.searchsorted(ends, row, side="right"))
        number = numbers[place]
        picks.setdefault(number, []).append(row - int(ends[place]) + files[number].rows)
    return picks


def _run_problems(run: PublishedRun, manifest: Manifest) -> Iterator[str]:
    if manifest.run_id != run.run_id:
        yield f"manifest.json: run_id is {manifest.run_id}, its folder is {run.run_id}"
    if not exists(join(run.uri, "_SUCCESS")):
        yield "_SUCCESS: is missing: the run was not published to its end, or somebody removed it"
    if not exists(join(run.uri, "config.yaml")):
        yield "config.yaml: is missing: nothing says with which settings the run was scored"
    for path, count in Counter(part.path for part in manifest.files).items():
        if count > 1:
            yield f"{path}: is listed {count} times in the manifest: its rows count as often"
        if path.split("/")[:-1] not in ([_SCORES], [_QUARANTINE]):
            yield f"{path}: is listed in the manifest, but parts lie right below {_SCORES}/ and {_QUARANTINE}/"
    for index, count in Counter(shard.index for shard in manifest.shards).items():
        if count > 1:
            yield f"manifest.json: shard {index} is listed {count} times"


def _totals_problems(said: Totals, found: Totals) -> Iterator[str]:
    for name in ("rows_read", "rows_scored", "rows_quarantined"):
        if getattr(said, name) != getattr(found, name):
            source = "its shards add up to" if name == "rows_read" else "the parts hold"
            yield f"manifest.json: totals.{name} is {getattr(said, name)}, {source} {getattr(found, name)}"
    for reason in sorted({*said.reasons, *found.reasons}):
        before, now = said.reasons.get(reason, 0), found.reasons.get(reason, 0)
        if before != now:
            yield f"manifest.json: totals.reasons.{reason} is {before}, the parts hold {now}"


class _Tally:
    """Counts what parts hold, one part at a time, by shard and for the run."""

    def __init__(self, run: PublishedRun, manifest: Manifest) -> None:
        self._run = run
        self._manifest = manifest
        by_file: dict[str, list[ShardAccount]] = {}
        for shard in sorted(manifest.shards, key=lambda shard: shard.index):
            by_file.setdefault(shard.source_file, []).append(shard)
        self._sources = {name: _SourceRows(name, shards) for name, shards in by_file.items()}
        self._rows = dict.fromkeys((_SCORES, _QUARANTINE), 0)
        self._reasons = Counter[str]()
        self._score_names: list[str] | None = None
        self.problems: list[str] = []
        self.sampled: list[pa.Table] = []

    @property
    def totals(self) -> Totals:
        rows_read = sum(shard.rows_read for shard in self._manifest.shards)
        return Totals(rows_read, self._rows[_SCORES], self._rows[_QUARANTINE], dict(self._reasons))

    @property
    def checksum(self) -> str:
        """The whole run's identity checksum."""
        return f"{sum(sum(source.checksums) for source in self._sources.values()) % 2**64:016x}"

    def add_part(self, number: int, part: PartFile, picks: Sequence[int]) -> None:
        """Read one listed part and note what is wrong with it, as one problem that names its shards."""
        try:
            data = read_bytes(join(self._run.uri, part.path))
        except OSError as error:
            state = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            self.problems.append(f"{part.path}: {state}; the manifest lists it with {part.rows} rows")
            return
        faults = _file_faults(part, data)
        shards = ""
        try:
            table = _read_part(data, _kind(part.path))
        except (OSError, ValueError, pa.ArrowException) as error:
            faults.append(f"is no readable part: {error}")
        else:
            if table.num_rows != part.rows:
                faults.append(f"holds {table.num_rows} rows, the manifest says {part.rows}")
            faults += self._add_rows(number, part, table)
            shards = f" ({self._shards_of(table)})" if table.num_rows else ""
            rows = [row for row in picks if row < table.num_rows]
            if rows:
                paths = pa.repeat(pa.scalar(part.path), len(rows))
                self.sampled.append(table.take(rows).append_column(_PART, paths))
        if faults:
            self.problems.append(f"{part.path}{shards}: {'; '.join(faults)}")

    def _add_rows(self, number: int, part: PartFile, table: pa.Table) -> list[str]:
        """Count a part's rows; returns what is wrong with their identities and values."""
        kind = _kind(part.path)
        self._rows[kind] += table.num_rows
        faults = []
        for name, rows in _rows_by_file(table):
            source = self._sources.get(name)
            outside = rows if source is None else source.add(kind, number, rows)
            if len(outside):
                known = (
                    "a file that the manifest does not have" if source is None else f"which has {source.num_rows} rows"
                )
                faults.append(f"{_show_rows(to_ranges(outside))} of {name}, {known}")
        if kind == _QUARANTINE:
            self._reasons.update(map(str, table["reason"].to_pylist()))
            return faults + self._tell(table, _quarantine_faults(table))
        names = table.column_names[2:]
        self._score_names = self._score_names or names
        if names != self._score_names:
            return [*faults, f"has the score columns {names}, other parts have {self._score_names}"]
        return faults + self._tell(table, _score_faults(table))

    def _tell(self, table: pa.Table, faults: Iterable[Fault]) -> list[str]:
        lines = []
        for what, rows in faults:
            if rows.any():
                first = table.slice(int(rows.argmax()), 1)
                name, row = first[SOURCE_FILE][0].as_py(), first[SOURCE_ROW][0].as_py()
                lines.append(
                    f"{int(rows.sum())} of its rows with {what} (first: row {row} of {self._shard_of(name, row)})"
                )
        return lines

    def _shard_of(self, name: str, row: int) -> str:
        source = self._sources.get(name)
        names = source.shard_names(np.array([row], dtype=np.int64)) if source else []
        return names[0] if names else f"{name}, in no shard"

    def _shards_of(self, table: pa.Table) -> str:
        """The shards that a part has rows of, for a message."""
        names: list[str] = []
        for name, rows in _rows_by_file(table):
            source = self._sources.get(name)
            names += source.shard_names(rows) if source else [f"{name}, in no shard"]
        return f"rows of {_some(names)}"

    def stray_parts(self) -> Iterator[str]:
        """Files among the parts that the manifest does not list: whoever reads the folder takes them for the run's."""
        listed = {part.path for part in self._manifest.files}
        for kind in (_SCORES, _QUARANTINE):
            for name in list_names(join(self._run.uri, kind)):
                path = f"{kind}/{name}"
                if path not in listed:
                    yield f"{path}: is not in the manifest, but lies among its parts; {self._describe_stray(path)}"

    def _describe_stray(self, path: str) -> str:
        try:
            table = _read_part(read_bytes(join(self._run.uri, path)), _kind(path))
        except (OSError, ValueError, pa.ArrowException):
            return "it is no readable part"
        return f"it holds {table.num_rows} rows, {self._shards_of(table)}" if table.num_rows else "it has no rows"

    def shard_problems(self) -> Iterator[str]:
        """One line a shard whose rows, counts or checksum are not what the manifest says."""
        for source in self._sources.values():
            yield from source.problems(self._manifest.files)


class _SourceRows:
    """The rows of one source file as parts hold them, against the shards that the manifest cuts it into.

    Ranges, not rows: a file of millions of rows that were written once takes a few hundred bytes.
    """

    def __init__(self, name: str, shards: Sequence[ShardAccount]) -> None:
        self._name = name
        self._shards = shards
        self._ends: Int64 = np.cumsum([shard.rows_read for shard in shards], dtype=np.int64)
        self._counts = {kind: np.zeros(len(shards), dtype=np.int64) for kind in (_SCORES, _QUARANTINE)}
        # (n, 3) each: start, end, number of the part.
        self._ranges: list[Int64] = [np.empty((0, 3), dtype=np.int64)]
        self.checksums = [0] * len(shards)

    @property
    def num_rows(self) -> int:
        return int(self._ends[-1])

    def add(self, kind: str, part: int, rows: Int64) -> Int64:
        """Count one part's rows of this file; returns those that are in no shard."""
        is_inside = (rows >= 0) & (rows < self.num_rows)
        inside = rows[is_inside]
        places = self._places(inside)
        self._counts[kind] += np.bincount(places, minlength=len(self._shards))
        for place in np.unique(places).tolist():
            self.checksums[place] += identity_checksum(self._name, inside[places == place])
        ranges = np.array(to_ranges(inside), dtype=np.int64).reshape(-1, 2)
        self._ranges.append(np.column_stack([ranges, np.full(len(ranges), part)]))
        return rows[~is_inside]

    def shard_names(self, rows: Int64) -> list[str]:
        """The shards that rows lie in, in order, as messages name them."""
        inside = rows[(rows >= 0) & (rows < self.num_rows)]
        return [_shard_name(self._shards[place]) for place in np.unique(self._places(inside)).tolist()]

    def _places(self, rows: Int64) -> Int64:
        # A shard without rows ends where it begins: side="right" passes it by.
        return np.searchsorted(self._ends, rows, side="right")

    def problems(self, parts: Sequence[PartFile]) -> Iterator[str]:
        """One line a shard that is not as its account says."""
        gaps, repeats = self._gaps_and_repeats()
        first = 0
        for place, shard in enumerate(self._shards):
            end = int(self._ends[place])
            faults = [*self._row_faults(_clip(gaps, first, end), _clip(repeats, first, end), parts)]
            faults += self._account_faults(place)
            if faults:
                yield f"{_shard_name(shard)}: {'; '.join(faults)}"
            first = end

    @staticmethod
    def _row_faults(gaps: Int64, repeats: Int64, parts: Sequence[PartFile]) -> Iterator[str]:
        if len(gaps):
            yield f"{_num_rows(gaps)} of its rows in no part ({_show_rows(gaps)})"
        if len(repeats):
            shown = [
                f"{_show_rows([(start, end)])} in {parts[before].path} and again in {parts[again].path}"
                for start, end, before, again in repeats[:_SHOWN_ITEMS].tolist()
            ]
            yield f"{_num_rows(repeats)} of its rows twice ({_some(shown, len(repeats))})"

    def _account_faults(self, place: int) -> Iterator[str]:
        shard = self._shards[place]
        for kind, said in ((_SCORES, shard.rows_scored), (_QUARANTINE, shard.rows_quarantined)):
            found = int(self._counts[kind][place])
            if found != said:
                yield f"{found} rows in {kind}, the manifest says {said}"
        if shard.rows_read != shard.rows_scored + shard.rows_quarantined:
            yield f"{shard.rows_read} rows read are not {shard.rows_scored} scored + {shard.rows_quarantined} quarantined"
        checksum = f"{self.checksums[place] % 2**64:016x}"
        if checksum != shard.checksum:
            yield f"identity checksum {checksum}, the manifest says {shard.checksum}"
        if shard.state not in _PUBLISHED_STATES:
            yield f"its state is {shard.state!r}: it should not have been published"

    def _gaps_and_repeats(self) -> tuple[Int64, Int64]:
        """Rows in no part, (n, 2): start, end; rows that are there again, (m, 4): start, end, an earlier part, this part."""
        ranges = np.concatenate(self._ranges)
        starts, ends, parts = ranges[np.argsort(ranges[:, 0], kind="stable")].T
        reach = np.maximum.accumulate(ends)
        # Which range reached furthest up to here: it holds whatever begins before its end.
        furthest = np.maximum.accumulate(np.where(ends == reach, np.arange(len(ends)), 0))
        before = np.concatenate([[0], reach])
        gaps = np.column_stack([before, np.append(starts, self.num_rows)])
        holders = parts[np.concatenate([[0], furthest]).astype(np.int64)[:-1]]
        repeats = np.column_stack([starts, np.minimum(ends, before[:-1]), holders, parts])
        return gaps[gaps[:, 0] < gaps[:, 1]], repeats[repeats[:, 0] < repeats[:, 1]]


def _clip(ranges: Int64, first: int, end: int) -> Int64:
    clipped = ranges.copy()
    clipped[:, 0] = np.maximum(ranges[:, 0], first)
    clipped[:, 1] = np.minimum(ranges[:, 1], end)
    return clipped[clipped[:, 0] < clipped[:, 1]]


def _num_rows(ranges: Int64) -> int:
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def _shard_name(shard: ShardAccount) -> str:
    return f"{shard.source_file} shard {shard.index}"


def _show_rows(ranges: Sequence[Sequence[int]] | Int64) -> str:
    shown = [
        f"row {start}" if end == start + 1 else f"rows {start} to {end - 1}" for start, end in ranges[:_SHOWN_ITEMS]
    ]
    return _some(shown, len(ranges))


def _some(items: Sequence[str], num_items: int | None = None) -> str:
    """The first items in words, and how many more there are of `num_items` (default: all are in `items`)."""
    more = (len(items) if num_items is None else num_items) - _SHOWN_ITEMS
    return ", ".join(items[:_SHOWN_ITEMS]) + (f" and {more} more" if more > 0 else "")


# --- one part


def _kind(path: str) -> str:
    return _QUARANTINE if path.startswith(f"{_QUARANTINE}/") else _SCORES


def _file_faults(part: PartFile, data: bytes) -> list[str]:
    faults = []
    if len(data) != part.size_bytes:
        faults.append(f"has {len(data)} bytes, the manifest says {part.size_bytes}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != part.sha256:
        faults.append(f"has sha256 {digest}, the manifest says {part.sha256}")
    return faults


def _read_part(data: bytes, kind: str) -> pa.Table:
    """A part's identity, then its score columns, or stage and reason. Raises ValueError where they are not as promised."""
    with pq.ParquetFile(io.BytesIO(data)) as parquet:
        schema = parquet.schema_arrow
        if SOURCE_ROW not in schema.names:
            raise ValueError(f"it has no column {SOURCE_ROW}; it has {', '.join(schema.names)}")
        # Scores come after the identity, kept columns before it: a kept one may be called proba_anything.
        scores = schema.names[schema.names.index(SOURCE_ROW) + 1 :]
        wanted = _promised_types(kind, scores)
        for name, kinds in wanted.items():
            if name not in schema.names or schema.field(name).type not in kinds:
                found = schema.field(name).type if name in schema.names else "missing"
                raise ValueError(f"column {name} is {found}, must be {' or '.join(map(str, kinds))}")
        # A name that a dot cuts in two finds its first half too.
        table = parquet.read(columns=list(wanted), use_threads=False).select(list(wanted))
    if table[SOURCE_FILE].null_count or table[SOURCE_ROW].null_count:
        raise ValueError("it has rows without source_file or source_row")
    return table


def _promised_types(kind: str, scores: Sequence[str]) -> dict[str, tuple[pa.DataType, ...]]:
    identity = {SOURCE_FILE: (pa.string(),), SOURCE_ROW: (pa.int64(),)}
    if kind == _QUARANTINE:
        return identity | {"stage": (pa.string(),), "reason": (pa.string(),)}
    if scores[-1:] != ["prediction"] or not all(name.startswith("proba_") for name in scores[:-1]):
        raise ValueError(f"after {SOURCE_ROW} it has {', '.join(scores)}, must be proba_<class> columns and prediction")
    labels = (pa.string(), pa.bool_(), pa.int64(), pa.float64())
    return {
        **identity,
        **dict.fromkeys(scores[:-1], (pa.float32(),)),
        "prediction": labels if scores[:-1] else (pa.float32(),),
    }


def _rows_by_file(table: pa.Table) -> Iterator[tuple[str, Int64]]:
    """Each source file of a table with its rows, as they come."""
    files = table[SOURCE_FILE].combine_chunks().dictionary_encode()
    codes, rows = files.indices.to_numpy(), table[SOURCE_ROW].to_numpy()
    for code, name in enumerate(files.dictionary.to_pylist()):
        yield name, rows[codes == code]


def _score_faults(table: pa.Table) -> Iterator[Fault]:
    names = table.column_names[2:-1]
    is_missing: Mask = pc.is_null(table["prediction"]).to_numpy()
    yield "no prediction", is_missing
    if not names:
        yield "a prediction that is not finite", ~np.isfinite(table["prediction"].to_numpy()) & ~is_missing
        return
    values = _columns(table, names)
    lowest, highest = values.min(axis=1), values.max(axis=1)  # NaN where any is
    is_finite: Mask = np.isfinite(lowest) & np.isfinite(highest)
    yield "a probability that is not finite", ~is_finite
    yield "a probability outside [0, 1]", (lowest < -_ROUNDING) | (highest > 1 + _ROUNDING)
    is_off = np.abs(values.sum(axis=1, dtype=np.float64) - 1) > _SUM_TOLERANCE
    yield f"probabilities that do not sum to 1 within {_SUM_TOLERANCE:g}", is_off & is_finite
    predicted = _predicted_classes(table["prediction"], names)
    is_top = values[np.arange(len(values)), predicted] >= highest - _ROUNDING
    is_wrong = ((predicted < 0) | ~is_top) & is_finite & ~is_missing
    yield "a prediction that is not the class of the highest probability", is_wrong


def _columns(table: pa.Table, names: Sequence[str]) -> Scores:
    """Columns of float32 side by side, NaN for null."""
    values: Scores = np.column_stack([table[name].to_numpy() for name in names])
    return values


def _predicted_classes(predictions: pa.ChunkedArray, names: Sequence[str]) -> Int64:
    """Each prediction's place among the `proba_<class>` columns, -1 for a label that has none."""
    encoded = predictions.combine_chunks().dictionary_encode()
    places = {name: place for place, name in enumerate(names)}
    by_code = [places.get(f"proba_{label}", -1) for label in encoded.dictionary.to_pylist()]
    codes: Int64 = pc.fill_null(encoded.indices, len(by_code)).to_numpy()
    return np.array([*by_code, -1], dtype=np.int64)[codes]


def _quarantine_faults(table: pa.Table) -> Iterator[Fault]:
    for name, known in (("stage", Stage), ("reason", Reason)):
        is_known = pc.is_in(table[name], value_set=pa.array([item.value for item in known])).to_numpy()
        unknown = pc.unique(table[name].filter(pa.array(~is_known))).to_pylist()
        yield f"the {name} {_some([repr(value) for value in unknown])}, which no {name} is", ~is_known


# --- rescoring


def rescore(run: PublishedRun, files: Recount) -> Rescored:
    """Score the sampled rows with AutoGluon's `predict_proba(realtime=True)` and hold the published scores against it.

    Raises ConfigError, PredictorError or InputError where the run's configuration, predictor or inputs are not what they
    were; the predictor's hash is checked before anything is unpickled. Imports AutoGluon (about 30 s, 1 GB).
    """
    config = _stored_config(run)
    limit = config.parity.max_abs_diff
    sampled = files.sampled
    if sampled is None:
        return Rescored(0, None, limit, ())
    names = sampled.column_names[2:-1]
    listing = _unchanged_inputs(config, files.manifest)
    wanted = set(sampled[SOURCE_FILE].to_pylist())
    sources = inspect_files([file for name, file in listing.items() if name in wanted], config.input)
    folder = _pinned_predictor(config, files.manifest)
    logger.info("run %s: rescoring %d rows (imports AutoGluon, about 30 s)", run.run_id, sampled.num_rows)
    predictor = load_predictor(folder)
    spec = extract_spec(predictor)
    expected = [*(f"proba_{label}" for label in spec.class_labels), "prediction"]
    if names != expected:
        problem = f"the parts have the score columns {names}, the predictor that the manifest names gives {expected}"
        return Rescored(0, None, limit, (problem,))
    rescorer = _Rescorer(predictor, spec, config, sources)
    for start in range(0, sampled.num_rows, _CHUNK_ROWS):
        rescorer.compare(sampled.slice(start, _CHUNK_ROWS))
    return Rescored(rescorer.num_rows, rescorer.max_abs_diff, limit, tuple(rescorer.problems))


def _stored_config(run: PublishedRun) -> ScoreConfig:
    """The configuration that the run was scored with. Raises VerificationError."""
    uri = join(run.uri, "config.yaml")
    try:
        return load_config(file=uri, flags={}, overrides=[], cwd=Path.cwd())
    except ConfigError as error:
        raise VerificationError(
            f"{redact(uri)}: is not a configuration that this code reads: {error}; verify with the version that wrote it "
            f"({_WITHOUT_RESCORING})"
        ) from error


def _unchanged_inputs(config: ScoreConfig, manifest: Manifest) -> dict[str, ListedFile]:
    """The run's input files by source_file. Raises InputError for one that is gone or not what the run read.

    Files that came since are none of the run's business.
    """
    try:
        listing = list_inputs(config.input)
    except InputError as error:
        raise InputError(f"{error}\nrows are rescored from the run's inputs; {_WITHOUT_RESCORING}") from error
    now = fingerprint(
        config, predictor_hash=manifest.predictor.sha256, listing=listing, scores_version=SCORES_VERSION
    ).parts
    then = manifest.fingerprint.parts
    changed = [
        f"{name}: was {version}, now {now.get(name, 'gone')}"
        for name, version in then.items()
        if name.startswith("input file ") and now.get(name) != version
    ]
    if changed:
        rest = [f"... and {len(changed) - _SHOWN_PROBLEMS} more"] if len(changed) > _SHOWN_PROBLEMS else []
        raise InputError(
            "\n".join(
                [
                    f"{len(changed)} input files changed since run {manifest.run_id} read them, so no row can be rescored; "
                    f"restore them, or score again; {_WITHOUT_RESCORING}",
                    *changed[:_SHOWN_PROBLEMS],
                    *rest,
                ]
            )
        )
    return {redact(file.uri): file for file in listing}


def _pinned_predictor(config: ScoreConfig, manifest: Manifest) -> Path:
    """The predictor's folder, once its hash is the manifest's; nothing is unpickled. Raises PredictorError."""
    pinned = manifest.predictor.sha256
    try:
        folder = fetch_predictor(config.predictor.path, config.engine.cache, pinned)
        check_hash(folder, config.predictor.path, pinned)
    except PredictorError as error:
        raise PredictorError(
            f"run {manifest.run_id} was scored by the predictor {pinned}, which its rows are rescored with: {error}; "
            f"{_WITHOUT_RESCORING}"
        ) from error
    return folder


class _Rescorer:
    """Reads rows back from the inputs and compares AutoGluon's scores of them with published ones."""

    def __init__(
        self, predictor: "MultiModalPredictor", spec: FeatureSpec, config: ScoreConfig, sources: Sequence[SourceFile]
    ) -> None:
        self._predictor = predictor
        self._spec = spec
        self._config = config
        self._sources = {file.source_file: file for file in sources}
        # Kept columns may be in none of the sampled files, and are not scored.
        bare = config.input.model_copy(update={"keep": ()})
        self._schema: ReadSchema = plan_inputs(tuple(sources), spec, bare, reserved=()).schema
        self.num_rows = 0
        self.max_abs_diff: float | None = None
        self.problems: list[str] = []

    def compare(self, published: pa.Table) -> None:
        """Rescore some published rows and note each that differs."""
        from scoring.sample import split_sample

        sample, bad = split_sample(self._read_back(published), self._config, self._spec)
        reference, refusals = self._reference(sample.raw)
        places = {identity: place for place, identity in enumerate(_identities(sample.features))}
        faults = zip(bad["reason"].to_pylist(), bad["message"].to_pylist(), strict=True)
        unusable = dict(
            zip(_identities(bad), (f"it reads as {name} now: {text}" for name, text in faults), strict=True)
        )
        unusable |= {identity: refusals[place] for identity, place in places.items() if place in refusals}
        found = self._comparable(published)
        for row, (identity, part) in enumerate(zip(_identities(published), published[_PART].to_pylist(), strict=True)):
            if identity in places and identity not in unusable:
                difference = self._difference(reference[places[identity]], found[row])
            else:
                difference = f"has scores, but {unusable.get(identity, 'its input has no such row')}"
            if difference:
                self.problems.append(f"{part}: row {identity[1]} of {identity[0]} {difference}")

    def _read_back(self, published: pa.Table) -> pa.Table:
        blocks = [self._schema.arrow.empty_table()]
        for name, rows in _rows_by_file(published):
            if name in self._sources:
                for shard in _shards_with(self._sources[name], rows):
                    blocks += self._read_shard(shard, rows)
        return pa.concat_tables(blocks)

    def _read_shard(self, shard: Shard, rows: Int64) -> Iterator[pa.Table]:
        last = int(rows.max())
        for block in read_shard(shard, self._schema, self._config.input.csv, _BLOCK_ROWS):
            numbers = block[SOURCE_ROW].to_numpy()
            yield block.filter(pa.array(np.isin(numbers, rows)))
            if len(numbers) and numbers[-1] >= last:
                return  # a CSV has no other way to its rows than from the start, but need not be read to its end

    def _reference(self, raw: pa.Table) -> tuple[Scores, dict[int, str]]:
        """AutoGluon's scores, and why there are none of a row that it refuses."""
        from scoring.reference import upstream_scores

        refusals: dict[int, str] = {}
        scores = np.full((raw.num_rows, max(1, len(self._spec.class_labels))), np.nan, dtype=np.float32)
        if not raw.num_rows:
            return scores, refusals
        try:
            return upstream_scores(self._predictor, self._spec, raw), refusals
        except Exception as error:
            # Upstream may raise anything, and one row that it refuses fails the whole call.
            reason = f"{type(error).__name__}: {error}"
            logger.warning("predict_proba(realtime=True) failed, rows are rescored one by one: %s", reason)
        for row in range(raw.num_rows):
            try:
                scores[row] = upstream_scores(self._predictor, self._spec, raw.slice(row, 1))[0]
            except Exception as error:
                # The row was published, so this is a difference, and no reason to stop.
                refusals[row] = f"AutoGluon's own call refuses it: {type(error).__name__}: {error}"
        return scores, refusals

    def _comparable(self, published: pa.Table) -> Scores:
        """Published scores in the reference's unit: probabilities, or standard deviations of the label."""
        if self._spec.is_regression:
            unit = float(self._predictor._learner._df_preprocessor.label_scaler.scale_[0])
            return _columns(published, ["prediction"]) / np.float32(unit)
        return _columns(published, [f"proba_{label}" for label in self._spec.class_labels])

    def _difference(self, reference: Scores, found: Scores) -> str | None:
        """What is wrong with one row's scores, (classes,) each, or None."""
        parity = compare(reference[None, :], found[None, :])
        if not parity.rows:
            return "has scores, but AutoGluon's are not finite"
        self.num_rows += 1
        self.max_abs_diff = max(self.max_abs_diff or 0.0, parity.max_abs_diff)
        limit = self._config.parity.max_abs_diff
        if parity.failure(limit) is None:
            return None
        worst = int(np.abs(reference - found).argmax())
        name = "prediction" if self._spec.is_regression else f"proba_{self._spec.class_labels[worst]}"
        unit = " in standard deviations of the label" if self._spec.is_regression else ""
        flip = "; the label is another one" if parity.label_flips else ""
        return (
            f"has {name} {found[worst]:.6g}, AutoGluon gives {reference[worst]:.6g}{unit} (difference "
            f"{parity.max_abs_diff:.2g}, limit {limit:g}){flip}"
        )


def _shards_with(file: SourceFile, rows: Int64) -> Iterator[Shard]:
    """The row groups that hold any of the rows, each a shard of its own; a CSV whole."""
    if file.format == "csv":
        yield Shard(0, file, first_row=0, num_rows=None)
        return
    first = 0
    for group, (num_rows, _) in enumerate(file.row_groups):
        if ((rows >= first) & (rows < first + num_rows)).any():
            yield Shard(0, file, first, num_rows, (group,))
        first += num_rows


def _identities(table: pa.Table) -> list[tuple[Any, Any]]:
    return list(zip(table[SOURCE_FILE].to_pylist(), table[SOURCE_ROW].to_pylist(), strict=True))
