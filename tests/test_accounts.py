"""Accounts: ranges, checksums, and what receipts add up to, from their specifications."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoring.accounts import (
    PartFile,
    ReadNote,
    Receipt,
    ShardAccount,
    ShardReceipt,
    ShardRows,
    add_up,
    check_complete,
    check_quarantine,
    done_ranges,
    identity_checksum,
    is_done,
    merge_ranges,
    to_ranges,
)
from scoring.errors import IncompleteError, QuarantineLimitError, ScoringError

MASK = 2**64 - 1


# --- ranges

row_sets = st.sets(st.integers(0, 60) | st.integers(2**40, 2**40 + 10))


def array(rows: Sequence[int]) -> Any:
    return np.array(rows, dtype=np.int64)


@given(row_sets, st.randoms())
def test_ranges_hold_the_rows_and_nothing_else(rows: set[int], shuffle: random.Random) -> None:
    shuffled = list(rows)
    shuffle.shuffle(shuffled)
    ranges = to_ranges(array(shuffled))
    assert [row for start, end in ranges for row in range(start, end)] == sorted(rows)
    gaps = [following[0] - end for (_, end), following in itertools.pairwise(ranges)]
    assert all(gap > 0 for gap in gaps)
    assert all(type(bound) is int for pair in ranges for bound in pair)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([], ()), ([5], ((5, 6),)), ([3, 1, 2], ((1, 4),)), ([0, 2, 3, 9], ((0, 1), (2, 4), (9, 10)))],
)
def test_to_ranges(rows: list[int], expected: tuple[tuple[int, int], ...]) -> None:
    assert to_ranges(array(rows)) == expected


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=8))
def test_merged_ranges_cover_the_same_rows_or_raise(pairs: list[tuple[int, int]]) -> None:
    ranges = [(start, start + length) for start, length in pairs]
    rows = [row for start, end in ranges for row in range(start, end)]
    if len(set(rows)) < len(rows):
        with pytest.raises(ScoringError, match="were written twice"):
            merge_ranges(ranges, "a shard")
        return
    merged = merge_ranges(ranges, "a shard")
    assert [row for start, end in merged for row in range(start, end)] == sorted(rows)
    assert all(end < following for (_, end), (following, _) in itertools.pairwise(merged))


@pytest.mark.parametrize(
    ("ranges", "told"),
    [([(0, 5), (3, 9)], "3 to 5"), ([(0, 9), (2, 4)], "2 to 4"), ([(7, 8), (0, 3), (7, 8)], "7 to 8")],
)
def test_overlaps_name_the_rows(ranges: list[tuple[int, int]], told: str) -> None:
    with pytest.raises(ScoringError) as caught:
        merge_ranges(ranges, "/d/a.csv shard 2")
    assert str(caught.value) == f"/d/a.csv shard 2: rows {told} were written twice; nothing is published"


# --- checksum: both hashes once more, from their specifications


def rotate(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (64 - bits))) & MASK


def xxh64(data: bytes) -> int:
    p1, p2, p3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5

    def step(lane: int, word: int) -> int:
        return rotate((lane + word * p2) & MASK, 31) * p1 & MASK

    lanes, at = [(p1 + p2) & MASK, p2, 0, -p1 & MASK], 0
    while len(data) - at >= 32:
        for i in range(4):
            lanes[i] = step(lanes[i], int.from_bytes(data[at + 8 * i : at + 8 * i + 8], "little"))
        at += 32
    if at:
        acc = sum(rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
        for lane in lanes:
            acc = ((acc ^ step(0, lane)) * p1 + p4) & MASK
    else:
        acc = p5
    acc = (acc + len(data)) & MASK
    while len(data) - at >= 8:
        acc = (rotate(acc ^ step(0, int.from_bytes(data[at : at + 8], "little")), 27) * p1 + p4) & MASK
        at += 8
    if len(data) - at >= 4:
        acc = (rotate(acc ^ (int.from_bytes(data[at : at + 4], "little") * p1 & MASK), 23) * p2 + p3) & MASK
        at += 4
    for byte in data[at:]:
        acc = rotate(acc ^ (byte * p5 & MASK), 11) * p1 & MASK
    acc = (acc ^ (acc >> 33)) * p2 & MASK
    acc = (acc ^ (acc >> 29)) * p3 & MASK
    return acc ^ (acc >> 32)


def splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def checksum(source_file: str, rows: Sequence[int]) -> int:
    start = xxh64(source_file.encode())
    return sum(splitmix64((start + row) & MASK) for row in rows) & MASK


def test_the_hashes_here_give_the_published_values() -> None:
    assert xxh64(b"") == 0xEF46DB3751D8E999
    assert xxh64(b"abc") == 0x44BC2CF5AD770999
    assert splitmix64(0) == 0xE220A8397B1DCDAF


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), st.lists(st.integers(0, 2**62), max_size=20))
def test_checksum_is_what_the_contract_says(source_file: str, rows: list[int]) -> None:
    assert identity_checksum(source_file, array(rows)) == checksum(source_file, rows)


def test_checksum_sees_a_loss_that_a_duplicate_hides() -> None:
    rows = list(range(1000))
    whole = checksum("/d/a.csv", rows)
    shuffled = rows[500:] + rows[:500][::-1]
    assert identity_checksum("/d/a.csv", array(shuffled)) == whole
    assert identity_checksum("/d/a.csv", array([*rows[:-1], 0])) != whole
    assert identity_checksum("/d/b.csv", array(rows)) != whole
    assert identity_checksum("/d/a.csv", array([])) == 0
    halves = identity_checksum("/d/a.csv", array(rows[::2])) + identity_checksum("/d/a.csv", array(rows[1::2]))
    assert halves % 2**64 == whole


# --- accounts


def part(path: str, rows: int) -> PartFile:
    return PartFile(path, rows, 100, "ab" * 32, "attempt", "torch")


def receipt(
    shards: Mapping[int, tuple[str, Sequence[int], Sequence[int]]],
    *,
    task: int = 0,
    files: tuple[PartFile, ...] = (),
    reasons: Mapping[str, int] | None = None,
) -> Receipt:
    """A task's receipt: shard -> (source file, rows scored, rows quarantined)."""
    accounts = {
        index: ShardReceipt(
            tuple((row, row + 1) for row in scored),
            tuple((row, row + 1) for row in bad),
            checksum(source_file, [*scored, *bad]),
        )
        for index, (source_file, scored, bad) in shards.items()
    }
    return Receipt("attempt", task, files, accounts, reasons or {}, 0.5)


PARQUET = ShardRows(0, "/d/a.parquet", first_row=10, num_rows=4)
CSV = ShardRows(1, "/d/b.csv", first_row=0, num_rows=None)


def test_receipts_of_several_tasks_add_up() -> None:
    first = receipt(
        {0: (PARQUET.source_file, [13, 10], []), 1: (CSV.source_file, [0], [2])},
        files=(part("scores/1", 3), part("quarantine/1", 1)),
        reasons={"row_malformed": 1},
    )
    second = receipt(
        {0: (PARQUET.source_file, [11], [12]), 1: (CSV.source_file, [1], [])},
        task=1,
        files=(part("scores/2", 2),),
        reasons={"row_malformed": 1, "image_missing": 3},
    )
    accounts = add_up([PARQUET, CSV], {1: ReadNote(3)}, [first, second])
    assert accounts.is_complete
    assert accounts.shards == (
        ShardAccount("/d/a.parquet", 0, 4, 3, 1, f"{checksum('/d/a.parquet', [10, 11, 12, 13]):016x}", "complete"),
        ShardAccount("/d/b.csv", 1, 3, 2, 1, f"{checksum('/d/b.csv', [0, 1, 2]):016x}", "complete"),
    )
    assert accounts.totals == {"rows_read": 7, "rows_scored": 5, "rows_quarantined": 2}
    assert accounts.reasons == {"row_malformed": 2, "image_missing": 3}
    assert [file.path for file in accounts.files] == ["scores/1", "quarantine/1", "scores/2"]
    check_complete(accounts)


@pytest.mark.parametrize(
    ("scored", "bad"),
    [
        ([10, 11, 12], []),
        ([11, 12, 13], []),
        ([10, 13], [11]),
        ([10, 11, 12, 13, 14], []),
        ([9, 10, 11, 12], []),
        ([], []),
    ],
)
def test_a_missing_or_foreign_row_leaves_the_shard_incomplete(scored: list[int], bad: list[int]) -> None:
    accounts = add_up([PARQUET], {}, [receipt({0: (PARQUET.source_file, scored, bad)})])
    assert accounts.shards[0].state == "incomplete"
    with pytest.raises(IncompleteError) as caught:
        check_complete(accounts)
    assert str(caught.value) == (
        f"1 of 1 shards are incomplete (/d/a.parquet shard 0: 4 read, {len(scored)} scored, {len(bad)} quarantined); "
        "nothing is published, rerun the same command"
    )


def test_ranges_that_tile_with_another_checksum_are_incomplete() -> None:
    tiling = ShardReceipt(((10, 14),), (), checksum(PARQUET.source_file, [10, 11, 12, 12]))
    assert not add_up([PARQUET], {}, [Receipt("a", 0, (), {0: tiling}, {}, 0.0)]).is_complete


def test_a_row_both_scored_and_quarantined_is_an_error() -> None:
    with pytest.raises(ScoringError, match=r"^/d/a\.parquet shard 0: rows 11 to 12 were written twice"):
        add_up([PARQUET], {}, [receipt({0: (PARQUET.source_file, [10, 11], [])}), receipt({0: ("", [], [11])}, task=1)])


def test_a_csv_shard_needs_the_note_of_its_reader() -> None:
    rows = receipt({1: (CSV.source_file, [0, 1], [])})
    without = add_up([CSV], {}, [rows])
    assert (without.shards[0].state, without.shards[0].rows_read) == ("incomplete", 0)
    assert add_up([CSV], {1: ReadNote(3)}, [rows]).shards[0].state == "incomplete"
    assert add_up([CSV], {1: ReadNote(2)}, [rows]).shards[0].state == "complete"
    assert add_up([CSV], {1: ReadNote(0)}, []).shards[0].state == "complete"
    assert add_up([CSV], {}, []).shards[0].state == "incomplete"


def test_a_parquet_shard_goes_by_its_footer_not_by_the_note() -> None:
    rows = receipt({0: (PARQUET.source_file, [10, 11, 12], [])})
    assert not add_up([PARQUET], {0: ReadNote(3)}, [rows]).is_complete


def test_a_run_without_rows_is_complete() -> None:
    nothing = add_up([], {}, [])
    assert nothing.is_complete
    assert nothing.totals == {"rows_read": 0, "rows_scored": 0, "rows_quarantined": 0}
    empty = add_up([ShardRows(0, "/d/a.parquet", 0, 0)], {}, [])
    assert empty.shards == (ShardAccount("/d/a.parquet", 0, 0, 0, 0, "0" * 16, "complete"),)
    check_complete(empty)
    check_quarantine(empty.reasons, 0, 0.0)


def test_incomplete_shards_name_the_first_three() -> None:
    shards = [ShardRows(i, f"/d/{i}.csv", 0, None) for i in range(5)]
    with pytest.raises(
        IncompleteError, match=r"^4 of 5 shards are incomplete \(/d/1\.csv.*/d/2\.csv.*/d/3\.csv.*\)"
    ) as caught:
        check_complete(add_up(shards, {0: ReadNote(0)}, []))
    assert "/d/4.csv" not in str(caught.value)


@pytest.mark.parametrize(
    ("read", "bad", "limit"),
    [(100, 1, 0.01), (100, 0, 0.0), (100, 100, 1.0), (100, 29, 0.29), (1000, 57, 0.057), (7, 0, 0.0)],
)
def test_quarantine_up_to_the_limit_passes(read: int, bad: int, limit: float) -> None:
    check_quarantine({"row_malformed": bad}, read, limit)


@pytest.mark.parametrize(("read", "bad", "limit"), [(100, 2, 0.01), (100, 1, 0.0), (99, 1, 0.01), (100, 30, 0.29)])
def test_quarantine_over_the_limit_fails(read: int, bad: int, limit: float) -> None:
    with pytest.raises(QuarantineLimitError):
        check_quarantine({"row_malformed": bad}, read, limit)


def test_quarantine_limit_tells_the_top_reasons() -> None:
    reasons = {"image_missing": 3, "number_invalid": 20, "row_malformed": 1, "image_undecodable": 7}
    with pytest.raises(QuarantineLimitError) as caught:
        check_quarantine(reasons, 1240, 0.01)
    assert str(caught.value) == (
        "quarantine.max_fraction: 31 of 1240 rows (2.50 %) are in quarantine, the limit is 1.00 % (number_invalid 20, "
        "image_undecodable 7, image_missing 3); nothing is published. Repair the input, or raise the limit"
    )


def test_receipts_survive_json_exactly() -> None:
    whole = Receipt(
        "a",
        3,
        (part("scores/x", 2),),
        {12: ShardReceipt(((0, 5), (7, 9)), ((5, 7),), 2**64 - 1)},
        {"timeout": 2},
        0.1 + 0.2,
    )
    assert Receipt.from_json(whole.to_json()) == whole


# --- what is done


@given(row_sets, row_sets)
def test_done_rows_are_those_of_the_receipts(scored: set[int], bad: set[int]) -> None:
    receipts = [receipt({4: ("/d/a", sorted(scored), [])}), receipt({4: ("/d/a", [], sorted(bad - scored))}, task=1)]
    done = done_ranges(receipts).get(4, ())
    asked = np.array(sorted({row + shift for row in scored | bad for shift in (-1, 0, 1)}), dtype=np.int64)
    assert is_done(asked, done).tolist() == [row in scored | bad for row in asked.tolist()]
    assert all(end < following for (_, end), (following, _) in itertools.pairwise(done))


def test_nothing_is_done_without_receipts() -> None:
    assert done_ranges([]) == {}
    assert is_done(array([0, 1]), ()).tolist() == [False, False]


def test_a_row_with_two_receipts_is_an_error() -> None:
    twice = [receipt({0: ("/d/a", [1, 2], [])}), receipt({0: ("/d/a", [2], [])}, task=1)]
    with pytest.raises(ScoringError, match="shard 0: rows 2 to 3 were written twice"):
        done_ranges(twice)
