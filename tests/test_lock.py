"""The chain of holders: one at a time, taken over when it is gone, and a holder that slept too long can do nothing."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

from scoring.errors import LockError
from scoring.lock import Chain
from scoring.storage import join, list_names, read_bytes, remove_tree, write_bytes

LEASE_S = 1.0
HOLDER = """
import sys, time
from scoring.lock import Chain
Chain(sys.argv[1], "run r", 1.0).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "chain")
        return
    folder = f"memory://{uuid.uuid4().hex}/chain"
    yield folder
    remove_tree(folder)


def chain(place: object) -> Chain:
    return Chain(str(place), "run r", LEASE_S)


def start_holder(place: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_one_is_refused_and_told_who_holds_it(place: str) -> None:
    hold = chain(place).acquire()
    with pytest.raises(LockError) as caught:
        chain(place).acquire()
    assert f"run r at {place} is held by process {os.getpid()} on " in str(caught.value)
    assert "wait for it, or stop it and run the same command again" in str(caught.value)
    hold.check()
    hold.release()


def test_who_releases_is_followed_at_once(place: str) -> None:
    for number in range(3):
        start = time.monotonic()
        hold = chain(place).acquire()
        assert time.monotonic() - start < LEASE_S / 2
        assert hold.number == number
        hold.release()
    chain(place).forget_before(2)
    assert list_names(place) == ["00000002.json"]


def test_one_that_waits_gets_it_when_the_other_is_done(place: str) -> None:
    first = chain(place).acquire()
    with ThreadPool(1) as pool:
        waiting = pool.apply_async(lambda: chain(place).acquire(waits=True))
        time.sleep(LEASE_S)
        assert not waiting.ready()
        first.release()
        second = waiting.get(timeout=10)
    assert second.number == 1
    second.release()


def test_a_killed_holder_of_this_host_is_followed_at_once(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    process.kill()
    process.wait()
    start = time.monotonic()
    chain(tmp_path).acquire().release()
    assert time.monotonic() - start < LEASE_S / 2


def test_a_holder_elsewhere_is_watched_for_one_lease(place: str) -> None:
    gone = {"host": "elsewhere", "machine": "elsewhere boot pid", "pid": 1, "started": 0.0, "beat": 3}
    write_bytes(join(place, "00000000.json"), json.dumps(gone).encode())
    start = time.monotonic()
    hold = chain(place).acquire()
    assert time.monotonic() - start >= LEASE_S
    assert hold.number == 1
    hold.release()


def test_an_entry_without_words_is_watched_too(place: str) -> None:
    write_bytes(join(place, "00000000.json"), b"")
    start = time.monotonic()
    chain(place).acquire().release()
    assert time.monotonic() - start >= LEASE_S


def test_a_stopped_holder_is_taken_over_and_finds_out(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    process.send_signal(signal.SIGSTOP)
    try:
        hold = chain(tmp_path).acquire()
        assert hold.number == 1
        process.send_signal(signal.SIGCONT)
        time.sleep(LEASE_S)
        entries = {name: json.loads(read_bytes(str(tmp_path / name))) for name in list_names(str(tmp_path))}
        assert entries["00000001.json"]["pid"] == os.getpid()
        hold.check()
        hold.release()
    finally:
        process.kill()
        process.wait()


def test_a_heartbeat_does_not_bring_back_a_chain_that_is_gone(place: str) -> None:
    hold = chain(place).acquire()
    remove_tree(place)
    time.sleep(LEASE_S)
    with pytest.raises(LockError, match="another process took over"):
        hold.check()
    hold.release()
    assert list_names(place) == []


def race(place: str, turn: Any, results: Any) -> None:
    """One contender of many: acquires when all are ready, and holds on until all have tried."""
    turn.wait()
    try:
        hold = Chain(place, "run r", LEASE_S).acquire()
        results.put("held")
        turn.wait()
        hold.release()
    except LockError:
        results.put("refused")
        turn.wait()


@pytest.mark.parametrize("is_stale", [False, True])
def test_of_many_at_once_one_gets_it(tmp_path: Path, is_stale: bool) -> None:
    if is_stale:
        process = start_holder(tmp_path)
        process.kill()
        process.wait()
    context = multiprocessing.get_context("spawn")
    turn, results = context.Barrier(6), context.Queue()
    contenders = [context.Process(target=race, args=(str(tmp_path), turn, results)) for _ in range(6)]
    for contender in contenders:
        contender.start()
    found = sorted(results.get(timeout=120) for _ in contenders)
    for contender in contenders:
        contender.join()
    assert found == ["held", *["refused"] * 5]
