"""Rows that end their process or never return, in real processes that are started anew with the same rows (see flights.py)."""

import json
import os
import subprocess
import threading
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pytest

from scoring import processes
from scoring.errors import Reason, Stage
from scoring.guard import Guard
from scoring.identities import Identities, contains
from scoring.journal import Journal
from scoring.ledger import AttemptFolder, Taken
from scoring.storage import list_names
from tests.flights import Job, Outcome, exit_code, rows_table, run, start

pytestmark = pytest.mark.timeout(300)


def flights(folder: Path) -> list[str]:
    return [name for name in list_names(str(folder / "journal")) if not name.endswith(".stalled")]


def reasons(outcome: Outcome) -> dict[int, str]:
    return {row: reason for row, (_, reason, _) in outcome.bad.items()}


@pytest.mark.parametrize("kind", ["segv", "exit"])
def test_a_row_that_kills_costs_three_restarts_and_itself(tmp_path: Path, kind: str) -> None:
    job = Job(killers={2345: kind})
    outcome = run(tmp_path, job)
    outcome.check(job)
    assert reasons(outcome) == {2345: "process_killed"}
    assert outcome.bad[2345][0] == "score"
    assert outcome.restarts == 3


@pytest.mark.parametrize("kind", ["sleep", "hold"])
def test_a_row_that_never_returns_is_a_timeout_also_when_it_keeps_pythons_lock(tmp_path: Path, kind: str) -> None:
    job = Job(killers={77: kind}, timeout_s=1.0)
    outcome = run(tmp_path, job)
    outcome.check(job)
    assert outcome.bad == {77: ("score", "timeout", "no answer within 1 s")}
    assert outcome.restarts == 3


def test_a_row_that_breaks_the_gpu_ends_the_process_and_is_named_with_the_error(tmp_path: Path) -> None:
    job = Job(rows=300, killers={299: "sticky"})
    outcome = run(tmp_path, job)
    outcome.check(job)
    assert outcome.restarts == 3
    message = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert outcome.bad == {299: ("score", "process_killed", message)}


def test_several_rows_that_kill_are_each_found_and_no_other_row_is_lost(tmp_path: Path) -> None:
    # 5 and 6 share a group; 300 does not.
    job = Job(rows=400, killers={5: "exit", 6: "segv", 300: "exit", 9: "raises"})
    outcome = run(tmp_path, job)
    outcome.check(job)
    killed = "process_killed"
    assert reasons(outcome) == {5: killed, 6: killed, 300: killed, 9: "score_error"}
    # The window, then a group and a row for each; 6 was in the group of 5.
    assert outcome.restarts == 1 + 2 + 1 + 2


def test_windows_that_flew_beside_the_killer_are_scored(tmp_path: Path) -> None:
    # Every call takes long enough that all four windows are in flight when one of them dies.
    job = Job(windows=4, rows=16, killers={40: "segv"}, hold_s=0.15)
    outcome = run(tmp_path, job)
    outcome.check(job)
    assert reasons(outcome) == {40: "process_killed"}
    assert outcome.restarts == 3


def test_a_timeout_names_its_own_window_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[dict[str, Any]] = []

    def leave(code: int) -> None:
        left.extend(json.loads((tmp_path / "journal" / name).read_text()) for name in flights(tmp_path))
        journal._closed.set()

    monkeypatch.setattr(os, "_exit", leave)
    journal = Journal(str(tmp_path / "journal"), timeout_s=1.0)
    late, other = (threading.Thread(target=stay, args=(journal, first)) for first in (0, 100))
    late.start()
    time.sleep(0.6)
    other.start()
    for thread in (late, other):
        thread.join()
    journal.close()
    assert [flight["runs"] for flight in left] == [{"/data/a.parquet": [[0, 9]]}]
    assert left[0]["reason"] == "timeout"


def stay(journal: Journal, first: int) -> None:
    with journal.flight(Identities.of(rows_table(first, 10))):
        time.sleep(1.6)


def test_the_same_rows_on_another_node_are_known_to_have_killed(tmp_path: Path) -> None:
    job = Job(rows=400, killers={123: "exit"})
    for node in ("node-a", "node-b", "node-c"):
        assert exit_code(start(tmp_path, replace(job, host=node))) == 3
    outcome = run(tmp_path, replace(job, host="node-d"))
    outcome.check(job)
    assert (outcome.restarts, reasons(outcome)) == (0, {123: "process_killed"})


def wait_for_flight(folder: Path, worker: BaseProcess, known: set[str]) -> None:
    deadline = time.monotonic() + 60
    while set(flights(folder)) <= known:
        assert worker.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_killed_from_outside_cost_no_row(tmp_path: Path) -> None:
    job = Job(windows=4, rows=16, hold_s=0.3)
    for _ in range(3):
        known = set(flights(tmp_path))
        worker = start(tmp_path, job)
        wait_for_flight(tmp_path, worker, known)
        worker.kill()
        assert exit_code(worker) == -9
    outcome = run(tmp_path, replace(job, hold_s=0.0))
    outcome.check(job)
    assert (outcome.restarts, outcome.bad) == (0, {})


def test_rows_of_a_living_process_are_no_suspects_until_it_is_dead(tmp_path: Path) -> None:
    worker = start(tmp_path, Job(rows=50, hold_s=600))
    wait_for_flight(tmp_path, worker, set())
    journal = Journal(str(tmp_path / "journal"))
    overlapping, others = Identities.of(rows_table(40, 20)), Identities.of(rows_table(50, 20))
    assert journal.suspicion(overlapping) is None
    worker.kill()
    worker.join()
    suspicion = journal.suspicion(overlapping)
    assert suspicion is not None
    assert suspicion.deaths.tolist() == [1] * 10 + [0] * 10
    assert suspicion.condemned == {}
    assert journal.suspicion(others) is None
    journal.close()


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    exit_code(start(tmp_path, Job(rows=50, killers={1: "exit"})))
    dead = subprocess.Popen(["/bin/true"])
    while psutil.Process(dead.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    renamed(tmp_path, dead.pid, int(psutil.Process(dead.pid).create_time()))
    journal = Journal(str(tmp_path / "journal"))
    assert journal.suspicion(Identities.of(rows_table(0, 50))) is not None
    journal.close()
    dead.wait()


def renamed(folder: Path, pid: int, started: int) -> None:
    """Give the one flight of a dead process to another."""
    (name,) = flights(folder)
    host, _, _, *rest = name.split("~")
    path = folder / "journal" / name
    path.rename(path.with_name("~".join([host, str(pid), str(started), *rest])))


def test_a_process_that_got_the_number_of_a_dead_one_is_another(tmp_path: Path) -> None:
    exit_code(start(tmp_path, Job(rows=50, killers={1: "exit"})))
    renamed(tmp_path, os.getppid(), 1_700_000_000)
    journal = Journal(str(tmp_path / "journal"))
    assert journal.suspicion(Identities.of(rows_table(0, 50))) is not None
    journal.close()


def test_nothing_is_left_of_a_flight_that_came_back(tmp_path: Path) -> None:
    job = Job(windows=2, rows=100, killers={7: "raises"})
    outcome = run(tmp_path, job)
    outcome.check(job)
    assert (outcome.restarts, reasons(outcome)) == (0, {7: "score_error"})
    assert flights(tmp_path) == []


def test_waiting_for_a_turn_is_not_taking_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    journal = Journal(str(tmp_path / "journal"), timeout_s=0.4)
    with journal.flight(Identities.of(rows_table(0, 5))):
        with journal.paused():
            time.sleep(1.0)
        time.sleep(0.2)
        assert ended == []
        time.sleep(0.8)
    journal.close()
    assert ended[:1] == [1]


def test_a_folder_that_is_gone_stays_gone_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(str(tmp_path / "journal"))
    for path in (tmp_path / "journal").iterdir():
        path.unlink()
    (tmp_path / "journal").rmdir()
    guard = Guard(lambda table: table, Stage.FEATURES, journal)
    assert guard(rows_table(0, 10)).num_rows == 10
    guard.close()
    assert not (tmp_path / "journal").exists()
    assert "would not be found" in caplog.text


def test_the_journal_may_lie_in_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "memory://journal-test"
    rows = Identities.of(rows_table(0, 1))
    lost = []
    for node in ("node-a", "node-b", "node-c"):
        monkeypatch.setattr(processes, "_machine", lambda node=node: node)
        journal = Journal(folder)
        with journal.flight(rows):
            assert len(list_names(folder)) == 1
        assert list_names(folder) == []
        journal.close()
    for node in ("node-a", "node-b", "node-c"):
        monkeypatch.setattr(processes, "_machine", lambda node=node: node)
        journal = Journal(folder)
        flight = journal.flight(rows)
        flight.__enter__()
        lost.append(flight)  # it would come back if it were dropped
        journal.note(Reason.PROCESS_KILLED, "said so")
        journal.close()
    monkeypatch.setattr(processes, "_machine", lambda: "node-d")
    journal = Journal(folder)
    suspicion = journal.suspicion(rows)
    journal.close()
    assert suspicion is not None
    assert suspicion.condemned == {0: (Reason.PROCESS_KILLED, "said so")}


def test_a_suspect_flies_alone(tmp_path: Path) -> None:
    exit_code(start(tmp_path, Job(rows=50, killers={1: "exit"})))
    in_flight: list[int] = []
    seen: list[tuple[int, int]] = []
    lock = threading.Lock()

    def work(table):  # type: ignore[no-untyped-def]
        with lock:
            in_flight.append(table.num_rows)
            seen.append((table["source_row"][0].as_py(), len(in_flight)))
        time.sleep(0.02)
        with lock:
            in_flight.pop()
        return table

    guard = Guard(work, Stage.SCORE, Journal(str(tmp_path / "journal")))
    threads = [threading.Thread(target=guard, args=(rows_table(first, 25),)) for first in (0, 25, *range(50, 350, 25))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    guard.close()
    suspects = [beside for first, beside in seen if first < 50]
    assert len(suspects) == 10, "two windows of 25, in groups of 5"
    assert set(suspects) == {1}
    assert len(seen) == 22


def test_who_starts_after_the_attempt_is_over_leaves_nothing_behind(tmp_path: Path) -> None:
    attempt = AttemptFolder(str(tmp_path / "run"), "00000000-0-abc")
    attempt.begin(Taken(), {})
    attempt.remove()
    journal = Journal(attempt.journal_uri("score"))
    with journal.flight(Identities.of(rows_table(0, 3))):
        pass
    journal.close()
    assert not (tmp_path / "run" / "_work" / attempt.attempt).exists()


def test_runs_and_buckets_name_rows_exactly_and_roughly() -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        table = rows_table(int(rng.integers(0, 10**6)), 300)
        rows = Identities.of(table.take(rng.choice(300, 100, replace=False)))
        others = Identities.of(table)
        for name, file in rows.files.items():
            numbers = others.files[name].numbers
            np.testing.assert_array_equal(contains(file.runs, numbers), np.isin(numbers, file.numbers))
        assert rows.buckets() & others.buckets(), "rows in common have bits in common"
        assert rows.buckets().bit_count() <= 4


def test_a_window_costs_about_a_millisecond_at_most(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal"))
    # The flights of other workers, in other files; some share a bit with these rows and are read once.
    for pid in range(128):
        flight = {"runs": {f"/data/{pid}.parquet": [[0, 511]]}, "reason": None, "message": ""}
        (tmp_path / "journal" / f"elsewhere~{pid}~1700000000~0~{1 << pid:x}").write_text(json.dumps(flight))

    def fly() -> float:
        start = time.perf_counter()
        named = Identities.of(window)
        assert journal.suspicion(named) is None
        with journal.flight(named):
            pass
        return time.perf_counter() - start

    window = rows_table(10**6, 4096)
    costs = [fly() for _ in range(200)]
    journal.close()
    print(f"journal: {1e6 * median(costs):.0f} us a window (median), {1e6 * min(costs):.0f} at best")
    # 0.5 ms on an idle core; two busy ones that others share took 0.8.
    assert min(costs) < 3e-3
