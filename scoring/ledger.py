"""The ledger: receipts of what was written, the accounts they add up to, and the publication of a run.

Owns everything under `runs/RUN_ID` but the rows themselves: attempts, read notes, receipts, the manifest, `_SUCCESS` and
`latest.json`. Plain files through `storage`, no Ray. The lock and takeover of attempts belong to the crash-proof protocol
and hook in at `open_run` and `publish`.

A receipt is one write task's: its files, and per shard the row ranges [start, end) it scored and quarantined. A shard is
complete when the ranges tile it: no row missing, none twice.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from scoring.errors import FingerprintError, IncompleteError, QuarantineLimitError, ScoringError
from scoring.storage import exists, join, list_names, read_bytes, remove_tree, replace, write_bytes

logger = logging.getLogger(__name__)

MANIFEST_VERSION = 1
# In the folder of an attempt's decisions for as long as they may be written.
_OPEN_DECISIONS = "open"
_TOP_REASONS = 3

Range = tuple[int, int]


@dataclass(frozen=True)
class PartFile:
    """One parquet file of scores or quarantine; `path` is relative to the run folder."""

    path: str
    rows: int
    size_bytes: int
    sha256: str
    attempt: str
    engine: str


@dataclass(frozen=True)
class ShardReceipt:
    """What one write task did to one shard: row ranges of the file, and the checksum of all their identities."""

    scored: tuple[Range, ...]
    quarantined: tuple[Range, ...]
    checksum: int


@dataclass(frozen=True)
class Receipt:
    """One write task's account."""

    attempt: str
    task: int
    files: tuple[PartFile, ...]
    shards: Mapping[int, ShardReceipt]
    reasons: Mapping[str, int]
    write_s: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Receipt":
        data = json.loads(text)
        shards = {
            int(index): ShardReceipt(_ranges(item["scored"]), _ranges(item["quarantined"]), item["checksum"])
            for index, item in data["shards"].items()
        }
        files = tuple(PartFile(**item) for item in data["files"])
        return cls(data["attempt"], data["task"], files, shards, data["reasons"], data["write_s"])


def _ranges(pairs: Iterable[Sequence[int]]) -> tuple[Range, ...]:
    return tuple((start, end) for start, end in pairs)


@dataclass(frozen=True)
class ShardRows:
    """A shard as the accounts see it. `num_rows` is None where only the read notes tell (CSV)."""

    index: int
    source_file: str
    first_row: int
    num_rows: int | None


@dataclass(frozen=True)
class ShardAccount:
    """One shard's line in the manifest: rows read = rows scored + rows quarantined."""

    source_file: str
    index: int
    rows_read: int
    rows_scored: int
    rows_quarantined: int
    checksum: str
    state: str


@dataclass(frozen=True)
class Accounts:
    """The run's accounts; `is_complete` when every shard is."""

    shards: tuple[ShardAccount, ...]
    files: tuple[PartFile, ...]
    reasons: Mapping[str, int]

    @property
    def is_complete(self) -> bool:
        return all(shard.state == "complete" for shard in self.shards)

    @property
    def totals(self) -> dict[str, int]:
        return {
            name: sum(getattr(shard, name) for shard in self.shards)
            for name in ("rows_read", "rows_scored", "rows_quarantined")
        }


@dataclass(frozen=True)
class AttemptFolder:
    """Where one attempt at a run leaves its parts, read notes and receipts; their names carry the attempt."""

    run_uri: str
    attempt: str

    def write_part(self, kind: str, task: int, data: bytes) -> str:
        """Put one part of `kind` (scores or quarantine); returns its path relative to the run folder."""
        path = f"{kind}/part-{self.attempt}-{task:06d}.parquet"
        write_bytes(join(self.run_uri, path), data)
        return path

    def write_reads(self, first_shard: int, note: str) -> None:
        """Put one read task's note: a JSON object of shard index to rows read."""
        write_bytes(join(self._work_uri, "reads", f"{first_shard:08d}.json"), note.encode())

    def write_receipt(self, receipt: Receipt) -> None:
        """Put a write task's receipt, after its parts: a part without a receipt does not count."""
        write_bytes(join(self._work_uri, "receipts", f"{receipt.task:08d}.json"), receipt.to_json().encode())

    @property
    def decisions_uri(self) -> str:
        """Where scoring actors leave their engine decisions, one file a kind of device, and what came of them later."""
        return join(self._work_uri, "engines")

    def open_decisions(self) -> None:
        """Let actors write decisions: one that is still loading when the run is published must not bring `_work` back."""
        write_bytes(join(self.decisions_uri, _OPEN_DECISIONS), b"")

    def decisions(self) -> dict[str, dict[str, Any]]:
        """The engine decisions and later events by file name, less its ending."""
        names = [name for name in sorted(list_names(self.decisions_uri)) if name.endswith(".json")]
        return {
            name.removesuffix(".json"): json.loads(read_bytes(join(self.decisions_uri, name)).decode())
            for name in names
        }

    def read_notes(self) -> dict[int, int]:
        """Rows read per shard, from every note."""
        rows: dict[int, int] = {}
        for text in self._texts("reads"):
            rows |= {int(index): count for index, count in json.loads(text).items()}
        return rows

    def receipts(self) -> list[Receipt]:
        """Every receipt of this attempt, by task."""
        return [Receipt.from_json(text) for text in self._texts("receipts")]

    @property
    def _work_uri(self) -> str:
        return join(self.run_uri, "_work", self.attempt)

    def _texts(self, kind: str) -> list[str]:
        folder = join(self._work_uri, kind)
        return [read_bytes(join(folder, name)).decode() for name in sorted(list_names(folder))]


def takes_decisions(uri: str) -> bool:
    """Whether the run that a decision's URI belongs to is still there to read it."""
    return exists(join(uri.rpartition("/")[0], _OPEN_DECISIONS))


class RunFolder:
    """One run's place in the output: `OUTPUT/runs/RUN_ID`, and `OUTPUT/latest.json` once published."""

    def __init__(self, output: str, run_id: str) -> None:
        self.output = output
        self.run_id = run_id
        self.uri = join(output, "runs", run_id)

    @property
    def is_published(self) -> bool:
        return exists(join(self.uri, "_SUCCESS"))

    def read_manifest(self) -> dict[str, Any]:
        """The manifest of a published run."""
        manifest: dict[str, Any] = json.loads(read_bytes(join(self.uri, "manifest.json")))
        return manifest

    def claim(self, digest: str, parts: Mapping[str, str], differences: Callable[[dict[str, str]], list[str]]) -> None:
        """Claim the run for a fingerprint. Raises FingerprintError when the folder holds a run of another one.

        `differences` turns the stored parts into lines that name each difference.
        """
        stored = self._stored_fingerprint()
        if stored is None:
            document = json.dumps({"digest": digest, "parts": dict(parts)}).encode()
            # In one put: half a file, left by a killed driver, would stop every rerun.
            replace(join(self.uri, "_work", "fingerprint.json"), document)
        elif stored["digest"] != digest:
            raise FingerprintError(
                "\n".join(
                    [
                        f"run.id: {self.run_id} at {self.uri} is a run of something else; choose another --run-id, or drop it",
                        *differences(stored["parts"]),
                    ]
                )
            )

    def attempts(self) -> list["AttemptFolder"]:
        """What earlier commands left of this run, oldest first."""
        names = list_names(join(self.uri, "_work"))
        return [AttemptFolder(self.uri, name) for name in sorted(names) if not name.endswith(".json")]

    def discard_attempts(self) -> None:
        """Remove every unfinished attempt's parts and receipts: this version scores such a run from its start."""
        for attempt in self.attempts():
            logger.warning("run %s: attempt %s did not finish; its rows are scored again", self.run_id, attempt.attempt)
            remove_tree(join(self.uri, "_work", attempt.attempt))
        for kind in ("scores", "quarantine"):
            remove_tree(join(self.uri, kind))

    def _stored_fingerprint(self) -> dict[str, Any] | None:
        if self.is_published:
            stored: dict[str, Any] = self.read_manifest()["fingerprint"]
            return stored
        uri = join(self.uri, "_work", "fingerprint.json")
        return json.loads(read_bytes(uri)) if exists(uri) else None

    def publish(self, manifest: Mapping[str, Any], config_yaml: str) -> None:
        """Make the run count: manifest and configuration, `_SUCCESS`, then `latest.json`; each one put, in this order."""
        write_bytes(join(self.uri, "config.yaml"), config_yaml.encode())
        write_bytes(join(self.uri, "manifest.json"), (json.dumps(manifest, indent=1) + "\n").encode())
        write_bytes(join(self.uri, "_SUCCESS"), b"")
        self.finish_publication()

    def finish_publication(self) -> None:
        """The steps after `_SUCCESS`: let `latest.json` name this run, drop `_work`. Nothing to do once `_work` is gone.

        So a rerun mends a publication that was cut off here, and a rerun of an old run leaves a newer `latest.json` be.
        """
        if not exists(join(self.uri, "_work")):
            return
        latest = {"run_id": self.run_id, "manifest": f"runs/{self.run_id}/manifest.json"}
        replace(join(self.output, "latest.json"), (json.dumps(latest) + "\n").encode())
        remove_tree(join(self.uri, "_work"))


def add_up(shards: Sequence[ShardRows], notes: Mapping[int, int], receipts: Sequence[Receipt]) -> Accounts:
    """Receipts against what was read: one account a shard. Raises ScoringError for a row that is there twice."""
    by_shard: dict[int, list[ShardReceipt]] = {}
    for receipt in receipts:
        for index, part in receipt.shards.items():
            by_shard.setdefault(index, []).append(part)
    accounts = tuple(_shard_account(shard, notes, by_shard.get(shard.index, [])) for shard in shards)
    reasons = Counter[str]()
    for receipt in receipts:
        reasons.update(receipt.reasons)
    return Accounts(accounts, tuple(file for receipt in receipts for file in receipt.files), reasons)


def _shard_account(shard: ShardRows, notes: Mapping[int, int], parts: Sequence[ShardReceipt]) -> ShardAccount:
    rows_read = shard.num_rows if shard.num_rows is not None else notes.get(shard.index)
    scored = [item for part in parts for item in part.scored]
    quarantined = [item for part in parts for item in part.quarantined]
    merged = merge_ranges([*scored, *quarantined], f"{shard.source_file} shard {shard.index}")
    tiles = [(shard.first_row, shard.first_row + rows_read)] if rows_read else []
    checksum = sum(part.checksum for part in parts) % 2**64
    expected = identity_checksum(shard.source_file, np.arange(shard.first_row, shard.first_row + (rows_read or 0)))
    is_complete = rows_read is not None and merged == tiles and checksum == expected
    return ShardAccount(
        source_file=shard.source_file,
        index=shard.index,
        rows_read=rows_read or 0,
        rows_scored=_count(scored),
        rows_quarantined=_count(quarantined),
        checksum=f"{checksum:016x}",
        state="complete" if is_complete else "incomplete",
    )


def _count(ranges: Iterable[Range]) -> int:
    return sum(end - start for start, end in ranges)


def merge_ranges(ranges: Iterable[Range], where: str) -> list[Range]:
    """Sorted, joined ranges. Raises ScoringError when two overlap: a row would count twice."""
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start < merged[-1][1]:
            raise ScoringError(
                f"{where}: rows {start} to {min(end, merged[-1][1])} were written twice; nothing is published"
            )
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def to_ranges(rows: npt.NDArray[np.int64]) -> tuple[Range, ...]:
    """Row numbers in any order -> sorted ranges [start, end)."""
    if not len(rows):
        return ()
    ordered = np.sort(rows)
    breaks = np.flatnonzero(np.diff(ordered) != 1)
    starts = ordered[np.concatenate([[0], breaks + 1])]
    ends = ordered[np.concatenate([breaks, [len(ordered) - 1]])] + 1
    return tuple(zip(starts.tolist(), ends.tolist(), strict=True))


def identity_checksum(source_file: str, rows: npt.NDArray[np.int64]) -> int:
    """sum mod 2^64 of splitmix64(xxh64(source_file) + source_row): order-independent, so a loss hidden by a duplicate shows."""
    with np.errstate(over="ignore"):
        mixed = np.uint64(xxhash.xxh64_intdigest(source_file.encode())) + rows.astype(np.uint64)
        mixed += np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        return int(mixed.sum(dtype=np.uint64))


def check_complete(accounts: Accounts) -> None:
    """Raise IncompleteError naming the shards whose rows are not all accounted for."""
    missing = [shard for shard in accounts.shards if shard.state != "complete"]
    if missing:
        named = "; ".join(
            f"{shard.source_file} shard {shard.index}: {shard.rows_read} read, {shard.rows_scored} scored, "
            f"{shard.rows_quarantined} quarantined"
            for shard in missing[:_TOP_REASONS]
        )
        raise IncompleteError(
            f"{len(missing)} of {len(accounts.shards)} shards are incomplete ({named}); nothing is published, "
            "rerun the same command"
        )


def check_quarantine(accounts: Accounts, max_fraction: float) -> None:
    """Raise QuarantineLimitError when more of the rows than `max_fraction` are in quarantine."""
    totals = accounts.totals
    bad, read = totals["rows_quarantined"], totals["rows_read"]
    # Not bad > max_fraction * read: 0.29 * 100 is less than 29.
    if read and bad / read > max_fraction:
        top = ", ".join(f"{reason} {count}" for reason, count in Counter(accounts.reasons).most_common(_TOP_REASONS))
        raise QuarantineLimitError(
            f"quarantine.max_fraction: {bad} of {read} rows ({100 * bad / read:.2f} %) are in quarantine, the limit is "
            f"{100 * max_fraction:.2f} % ({top}); nothing is published. Repair the input, or raise the limit"
        )
