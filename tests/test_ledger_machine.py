"""The ledger under any order of writes, receipts, crashes, recoveries, commits and reruns: a state machine of hypothesis.

A crash is an exception at one of the named steps of `scoring/steps.py`, or between them; the driver then is a process that is
gone. What a real SIGKILL leaves is the same files: `tests/test_crashes.py`.
"""

import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scoring import steps
from scoring.accounts import (
    PartFile,
    Range,
    Receipt,
    ShardReceipt,
    ShardRows,
    add_up,
    done_ranges,
    identity_checksum,
    is_done,
)
from scoring.ledger import AttemptFolder, RunFolder
from scoring.lock import Hold

SHARDS = (ShardRows(0, "/d/a", 0, 7), ShardRows(1, "/d/a", 7, 4), ShardRows(2, "/d/b", 0, 5))
GONE_PID = 2**22 + 1  # above Linux's largest
counts: Counter[str] = Counter()


class Crash(BaseException):
    """The process is gone."""


class LedgerMachine(RuleBasedStateMachine):
    """One run, its drivers one after another, and the tasks of dead ones that still write."""

    def __init__(self) -> None:
        super().__init__()
        self.output = Path(tempfile.mkdtemp(prefix="ledger-"))
        self.run = RunFolder(str(self.output), "r", lease_s=60.0)
        self.hold: Hold | None = None
        self.attempt: AttemptFolder | None = None
        self.old: list[AttemptFolder] = []
        self.task = 0
        self.was_published = False
        counts["sequences"] += 1

    def teardown(self) -> None:
        shutil.rmtree(self.output)

    # --- what happens

    def _die(self) -> None:
        """The driver's process ends: what it holds names one that is no more."""
        chains = (self.output / "runs" / "r" / "_work" / "chain", self.output / "_publish")
        for place in (path for chain in chains for path in chain.glob("*.json")):
            document = json.loads(place.read_text())
            if "pid" in document and not document.get("released"):
                place.write_text(json.dumps({**document, "pid": GONE_PID}))
        if self.attempt is not None:
            self.old.append(self.attempt)
        self.hold = self.attempt = None
        counts["crashes"] += 1

    def _attempt(self, act: Callable[[], None], crash_at: int | None) -> None:
        """Act, and be gone at the `crash_at`-th moment of it."""
        passed = 0

        def moment(name: str) -> None:
            nonlocal passed
            passed += 1
            if passed == crash_at:
                counts[f"crash at {name}"] += 1
                raise Crash

        with patch.object(steps, "_pass", moment):
            try:
                act()
            except Crash:
                self._die()

    def _left(self) -> list[tuple[ShardRows, np.ndarray[Any, Any]]]:
        assert self.attempt is not None
        done = done_ranges(self.attempt.receipts())
        left = []
        for shard in SHARDS:
            rows = np.arange(shard.first_row, shard.first_row + (shard.num_rows or 0))
            rows = rows[~is_done(rows, done.get(shard.index, ()))]
            if len(rows):
                left.append((shard, rows))
        return left

    def _write(self, attempt: AttemptFolder, picked: dict[int, list[int]], *, receipted: bool) -> None:
        self.task += 1
        path = attempt.write_part("scores", self.task, json.dumps(picked).encode())
        if not receipted:
            return
        shards = {
            index: ShardReceipt(
                tuple((row, row + 1) for row in rows), (), identity_checksum(SHARDS[index].source_file, np.array(rows))
            )
            for index, rows in picked.items()
        }
        file = PartFile(path, sum(map(len, picked.values())), 1, "", attempt.attempt, "formula")
        attempt.write_receipt(Receipt(attempt.attempt, self.task, (file,), shards, {}, 0.0))

    def _pick(self, data: Any) -> dict[int, list[int]]:
        return {
            shard.index: sorted(rows)
            for shard, left in self._left()
            if (rows := data.draw(st.sets(st.sampled_from(left.tolist()))))
        }

    @precondition(lambda self: self.attempt is None)
    @rule(crash_at=st.none() | st.integers(1, 12))
    def start(self, crash_at: int | None) -> None:
        """A driver comes: it holds the run and begins an attempt, or finishes what was committed."""

        def act() -> None:
            self.hold = None if self.run.is_published else self.run.hold()
            if self.hold is None:
                self.run.finish()
                assert self.run.is_published
                return
            self.run.claim("d", {}, lambda parts: [])
            self.attempt = self.run.begin(self.hold)

        counts["starts"] += 1
        self._attempt(act, crash_at)

    @precondition(lambda self: self.attempt is not None)
    @rule(data=st.data(), crash_at=st.none() | st.integers(1, 4))
    def write(self, data: Any, crash_at: int | None) -> None:
        """A task writes some of the rows that are left; it, and the driver with it, may die between part and receipt."""
        attempt = self.attempt
        assert attempt is not None
        if picked := self._pick(data):
            counts["writes"] += 1
            self._attempt(lambda: self._write(attempt, picked, receipted=True), crash_at)

    @precondition(lambda self: self.old and self.attempt is not None)
    @rule(data=st.data(), receipted=st.booleans())
    def write_late(self, data: Any, receipted: bool) -> None:
        """A task of a dead driver's attempt, which looked whether it may write just before it might not."""
        attempt = data.draw(st.sampled_from(self.old))
        assert not attempt.is_open
        picked = {
            shard.index: list(range(shard.first_row, shard.first_row + (shard.num_rows or 0))) for shard in SHARDS
        }
        self._write(attempt, picked, receipted=receipted)
        counts["late writes"] += 1

    @precondition(lambda self: self.attempt is not None)
    @rule()
    def die(self) -> None:
        """The driver dies between two steps."""
        self._die()

    @precondition(lambda self: self.attempt is not None)
    @rule(crash_at=st.none() | st.integers(1, 16), completes=st.booleans())
    def publish(self, crash_at: int | None, completes: bool) -> None:
        """The driver adds up and commits; it scores the rest before, or finds the run incomplete."""
        attempt, hold = self.attempt, self.hold
        assert attempt is not None
        assert hold is not None
        if completes and (left := {shard.index: rows.tolist() for shard, rows in self._left()}):
            self._write(attempt, left, receipted=True)
        accounts = add_up(SHARDS, {}, attempt.receipts())
        if not accounts.is_complete:
            return
        manifest = {"files": [vars(file) for file in accounts.files], "fingerprint": {"digest": "d", "parts": {}}}
        self._attempt(lambda: self.run.commit(hold, attempt, manifest, ""), crash_at)
        if self.attempt is not None:
            counts["commits"] += 1
            self.old.append(attempt)
            self.hold = self.attempt = None

    # --- what always holds

    @invariant()
    def published_means_whole(self) -> None:
        """`latest.json` leads to `_SUCCESS`, and `_SUCCESS` to every row once and to no other file, for good."""
        folder = self.output / "runs" / "r"
        is_published = (folder / "_SUCCESS").exists()
        assert is_published >= self.was_published
        self.was_published = is_published
        if (self.output / "latest.json").exists():
            assert is_published
        if not is_published:
            return
        files = {file["path"] for file in json.loads((folder / "manifest.json").read_text())["files"]}
        assert {f"scores/{path.name}" for path in (folder / "scores").iterdir()} == files
        found: list[tuple[int, int]] = []
        for path in files:
            picked = json.loads((folder / path).read_text())
            found += [(int(index), row) for index, rows in picked.items() for row in rows]
        assert sorted(found) == [
            (shard.index, row)
            for shard in SHARDS
            for row in range(shard.first_row, shard.first_row + (shard.num_rows or 0))
        ]

    @invariant()
    def what_counts_is_there_and_counts_once(self) -> None:
        """Receipts never overlap (`done_ranges` raises), and every part they name is on disk."""
        if self.attempt is None:
            return
        ranges: dict[int, tuple[Range, ...]] = done_ranges(self.attempt.receipts())
        assert set(ranges) <= {0, 1, 2}
        for receipt in self.attempt.receipts():
            for file in receipt.files:
                assert (self.output / "runs" / "r" / file.path).exists()


def test_the_invariants_hold_in_any_order(caplog: pytest.LogCaptureFixture) -> None:
    counts.clear()
    machine = LedgerMachine.TestCase
    machine.settings = settings(max_examples=120, stateful_step_count=25, deadline=None, derandomize=True)
    # Who lives is said by the entries; what a heartbeat does is test_lock's.
    with patch.object(Hold, "_beat"), caplog.at_level(logging.ERROR):
        machine().runTest()
    print(dict(counts))
    assert counts["sequences"] >= 120
    assert counts["commits"] >= 20
    assert counts["late writes"] >= 20
    crashed_at = {name.removeprefix("crash at ") for name in counts if name.startswith("crash at ")}
    assert len(crashed_at) >= 15, f"crashes reached only {sorted(crashed_at)}"
