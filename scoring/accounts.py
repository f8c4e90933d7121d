"""Accounts: receipts of what was written, and what they add up to.

Owns the arithmetic alone: row ranges, checksums of identities, one account a shard. No files (`ledger.py`), no Ray.

A receipt is one write task's: its files, and per shard the row ranges [start, end) it scored and quarantined. A shard is
complete when the ranges tile it: no row missing, none twice.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from scoring.errors import IncompleteError, QuarantineLimitError, Reason, ScoringError

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
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Receipt":
        """A receipt as `asdict` and JSON left it."""
        shards = {
            int(index): ShardReceipt(_ranges(item["scored"]), _ranges(item["quarantined"]), item["checksum"])
            for index, item in data["shards"].items()
        }
        files = tuple(PartFile(**item) for item in data["files"])
        return cls(data["attempt"], data["task"], files, shards, data["reasons"], data["write_s"])


def _ranges(pairs: Iterable[Sequence[int]]) -> tuple[Range, ...]:
    return tuple((start, end) for start, end in pairs)


@dataclass(frozen=True)
class ReadNote:
    """What a read task found in one shard: its rows, and how many of them could not be read (None: nobody knows), with why.

    Rows that are lost without a count are not among `rows`.
    """

    rows: int
    lost: int | None = 0
    error: str = ""


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
    """The run's accounts; `is_complete` when every row that could be counted is accounted for.

    A shard is complete, incomplete, or unreadable: what was read of it is accounted for, and how much is lost nobody knows.
    """

    shards: tuple[ShardAccount, ...]
    files: tuple[PartFile, ...]
    reasons: Mapping[str, int]

    @property
    def is_complete(self) -> bool:
        return all(shard.state != "incomplete" for shard in self.shards)

    @property
    def totals(self) -> dict[str, int]:
        return {
            name: sum(getattr(shard, name) for shard in self.shards)
            for name in ("rows_read", "rows_scored", "rows_quarantined")
        }


def add_up(shards: Sequence[ShardRows], notes: Mapping[int, ReadNote], receipts: Sequence[Receipt]) -> Accounts:
    """Receipts against what was read: one account a shard. Raises ScoringError for a row that is there twice."""
    by_shard: dict[int, list[ShardReceipt]] = {}
    for receipt in receipts:
        for index, part in receipt.shards.items():
            by_shard.setdefault(index, []).append(part)
    accounts = tuple(_shard_account(shard, notes, by_shard.get(shard.index, [])) for shard in shards)
    files = tuple(file for receipt in receipts for file in receipt.files)
    return Accounts(accounts, files, sum_reasons(receipts))


def _shard_account(shard: ShardRows, notes: Mapping[int, ReadNote], parts: Sequence[ShardReceipt]) -> ShardAccount:
    note = notes.get(shard.index)
    rows_read = shard.num_rows if shard.num_rows is not None or note is None else note.rows
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
        state=("unreadable" if note and note.lost is None else "complete") if is_complete else "incomplete",
    )


def done_ranges(receipts: Iterable[Receipt]) -> dict[int, tuple[Range, ...]]:
    """The rows that receipts account for, by shard, as sorted and joined ranges. Raises ScoringError for a row twice."""
    by_shard: dict[int, list[Range]] = {}
    for receipt in receipts:
        for index, part in receipt.shards.items():
            by_shard.setdefault(index, []).extend([*part.scored, *part.quarantined])
    return {index: tuple(merge_ranges(ranges, f"shard {index}")) for index, ranges in by_shard.items()}


def is_done(rows: npt.NDArray[np.int64], done: Sequence[Range]) -> npt.NDArray[np.bool_]:
    """Which row numbers lie in one of the sorted, disjoint ranges."""
    if not done:
        return np.zeros(len(rows), dtype=np.bool_)
    starts, ends = np.array(done, dtype=np.int64).T
    place = np.searchsorted(starts, rows, side="right") - 1
    return np.asarray((place >= 0) & (rows < ends[place]))


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
    missing = [shard for shard in accounts.shards if shard.state == "incomplete"]
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


def check_quarantine(reasons: Mapping[str, int], rows: int, max_fraction: float) -> None:
    """Raise QuarantineLimitError when more of the `rows` than `max_fraction` are in quarantine, for these reasons.

    Rows that a broken file took with it are `input.on_bad_file`'s matter.
    """
    reasons = {reason: count for reason, count in reasons.items() if reason != Reason.FILE_UNREADABLE}
    bad = sum(reasons.values())
    # Not bad > max_fraction * rows: 0.29 * 100 is less than 29.
    if rows and bad / rows > max_fraction:
        top = ", ".join(f"{reason} {count}" for reason, count in Counter(reasons).most_common(_TOP_REASONS))
        raise QuarantineLimitError(
            f"quarantine.max_fraction: {bad} of {rows} rows ({100 * bad / rows:.2f} %) are in quarantine, the limit is "
            f"{100 * max_fraction:.2f} % ({top}); nothing is published. Repair the input, or raise the limit"
        )


def sum_reasons(receipts: Iterable[Receipt]) -> Counter[str]:
    """Rows in quarantine by reason."""
    reasons = Counter[str]()
    for receipt in receipts:
        reasons.update(receipt.reasons)
    return reasons
