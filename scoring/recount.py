"""The files phase of verification: a run's accounts recomputed from its parts, each read once, and held against its manifest.

Owns which rows a run must hold. It trusts nothing that the ledger noted on the way, and needs no AutoGluon, no predictor and
no inputs.
"""

import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from scoring.accounts import PartFile, ShardAccount, identity_checksum, to_ranges
from scoring.columns import SOURCE_FILE, SOURCE_ROW
from scoring.published_part import (
    QUARANTINE,
    SCORES,
    Fault,
    Int64,
    file_faults,
    kind_of,
    quarantine_faults,
    read_part,
    rows_by_file,
    score_faults,
)
from scoring.storage import exists, join, list_names, read_bytes
from scoring.verify import SHOWN_ITEMS, Manifest, PublishedRun, Recount, Totals, read_manifest, some

logger = logging.getLogger(__name__)

# Beside a sampled row's scores: the part it was read from.
PART = "part"
# "unreadable": a file whose number of rows nobody knows (input.on_bad_file=skip); the rows that it gave are counted.
_PUBLISHED_STATES = ("complete", "unreadable")
_PARTS_A_LOG_LINE = 500


def verify_files(run: PublishedRun, sample_rows: int) -> Recount:
    """Recount the run from its parts; draws `sample_rows` scored rows on the way, the same ones every time.

    Raises VerificationError only where there is no manifest to go by; differences are in the result.
    """
    manifest = read_manifest(run)
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
    numbers = [number for number, part in enumerate(files) if part.path.startswith(f"{SCORES}/")]
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
        if path.split("/")[:-1] not in ([SCORES], [QUARANTINE]):
            yield f"{path}: is listed in the manifest, but parts lie right below {SCORES}/ and {QUARANTINE}/"
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
        self._rows = dict.fromkeys((SCORES, QUARANTINE), 0)
        self._reasons = Counter[str]()
        self._score_names: list[str] | None = None
        self.problems: list[str] = []
        self.sampled: list[pa.Table] = []

    @property
    def totals(self) -> Totals:
        rows_read = sum(shard.rows_read for shard in self._manifest.shards)
        return Totals(rows_read, self._rows[SCORES], self._rows[QUARANTINE], dict(self._reasons))

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
        faults = file_faults(part, data)
        shards = ""
        try:
            table = read_part(data, kind_of(part.path))
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
                self.sampled.append(table.take(rows).append_column(PART, paths))
        if faults:
            self.problems.append(f"{part.path}{shards}: {'; '.join(faults)}")

    def _add_rows(self, number: int, part: PartFile, table: pa.Table) -> list[str]:
        """Count a part's rows; returns what is wrong with their identities and values."""
        kind = kind_of(part.path)
        self._rows[kind] += table.num_rows
        faults = []
        for name, rows in rows_by_file(table):
            source = self._sources.get(name)
            outside = rows if source is None else source.add(kind, number, rows)
            if len(outside):
                known = (
                    "a file that the manifest does not have" if source is None else f"which has {source.num_rows} rows"
                )
                faults.append(f"{_show_rows(to_ranges(outside))} of {name}, {known}")
        if kind == QUARANTINE:
            self._reasons.update(map(str, table["reason"].to_pylist()))
            return faults + self._tell(table, quarantine_faults(table))
        names = table.column_names[2:]
        self._score_names = self._score_names or names
        if names != self._score_names:
            return [*faults, f"has the score columns {names}, other parts have {self._score_names}"]
        return faults + self._tell(table, score_faults(table))

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
        for name, rows in rows_by_file(table):
            source = self._sources.get(name)
            names += source.shard_names(rows) if source else [f"{name}, in no shard"]
        return f"rows of {some(names)}"

    def stray_parts(self) -> Iterator[str]:
        """Files among the parts that the manifest does not list: whoever reads the folder takes them for the run's."""
        listed = {part.path for part in self._manifest.files}
        for kind in (SCORES, QUARANTINE):
            for name in list_names(join(self._run.uri, kind)):
                path = f"{kind}/{name}"
                if path not in listed:
                    yield f"{path}: is not in the manifest, but lies among its parts; {self._describe_stray(path)}"

    def _describe_stray(self, path: str) -> str:
        try:
            table = read_part(read_bytes(join(self._run.uri, path)), kind_of(path))
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
        self._counts = {kind: np.zeros(len(shards), dtype=np.int64) for kind in (SCORES, QUARANTINE)}
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
                for start, end, before, again in repeats[:SHOWN_ITEMS].tolist()
            ]
            yield f"{_num_rows(repeats)} of its rows twice ({some(shown, len(repeats))})"

    def _account_faults(self, place: int) -> Iterator[str]:
        shard = self._shards[place]
        for kind, said in ((SCORES, shard.rows_scored), (QUARANTINE, shard.rows_quarantined)):
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
        f"row {start}" if end == start + 1 else f"rows {start} to {end - 1}" for start, end in ranges[:SHOWN_ITEMS]
    ]
    return some(shown, len(ranges))
