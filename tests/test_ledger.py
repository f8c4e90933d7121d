"""The ledger: claims, attempts that take over from each other, and publication, on files and on memory://."""

import json
import logging
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scoring.accounts import PartFile, ReadNote, Receipt, ShardReceipt
from scoring.config import Fingerprint
from scoring.errors import FingerprintError, LockError
from scoring.ledger import AttemptFolder, RunFolder, Taken, takes_decisions
from scoring.lock import Hold
from scoring.storage import exists, join, list_names, read_bytes, remove_tree, write_bytes


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "out")
        return
    folder = f"memory://{uuid.uuid4().hex}/out"
    yield folder
    remove_tree(folder)


def started(run: RunFolder) -> Hold:
    run.claim("d1", {"predictor": "aa"}, lambda parts: [])
    hold = run.hold()
    assert hold is not None
    return hold


def write(attempt: AttemptFolder, task: int, rows: tuple[int, int], *, receipted: bool = True) -> Receipt:
    """A task's part and, unless it is killed before, its receipt."""
    path = attempt.write_part("scores", task, b"rows %d to %d" % rows)
    file = PartFile(path, rows[1] - rows[0], 10, "ab" * 32, attempt.attempt, "torch")
    receipt = Receipt(attempt.attempt, task, (file,), {0: ShardReceipt((rows,), (), 7)}, {"timeout": 1}, 0.5)
    if receipted:
        attempt.write_receipt(receipt)
    return receipt


def manifest_of(attempt: AttemptFolder) -> dict[str, Any]:
    files = [vars(file) for receipt in attempt.receipts() for file in receipt.files]
    return {
        "version": 1,
        "files": files,
        "fingerprint": {"digest": "d1", "parts": {"predictor": "aa", "gone": "x"}},
    }


def publish(run: RunFolder) -> dict[str, Any]:
    hold = started(run)
    attempt = run.begin(hold)
    write(attempt, 0, (0, 5))
    manifest = manifest_of(attempt)
    run.commit(hold, attempt, manifest, "input: {}\n")
    return manifest


# --- claims


def test_claim_is_idempotent_and_leaves_the_fingerprint(output: str) -> None:
    run = RunFolder(output, "r1")
    for _ in range(2):
        run.claim("d1", {"predictor": "aa"}, lambda parts: [])
    stored = json.loads(read_bytes(join(output, "runs", "r1", "_work", "fingerprint.json")))
    assert stored == {"digest": "d1", "parts": {"predictor": "aa"}}


@pytest.mark.parametrize("is_published", [False, True])
def test_another_fingerprint_is_refused_and_what_differs_is_named(output: str, is_published: bool) -> None:
    run = RunFolder(output, "r1")
    before = Fingerprint("d1", {"predictor": "aa", "gone": "x"})
    now = Fingerprint("d2", {"predictor": "bb", "new": "y"})
    run.claim(before.digest, before.parts, before.differences)
    if is_published:
        publish(run)
    refusals: list[Callable[[], None]] = [
        partial(run.claim, now.digest, now.parts, now.differences),
        partial(run.check_fingerprint, now.digest, now.differences),
    ]
    for refuse in refusals:
        with pytest.raises(FingerprintError) as caught:
            refuse()
        assert str(caught.value).splitlines() == [
            f"run.id: r1 at {run.uri} is a run of something else; choose another --run-id, or drop it",
            "gone: gone (was x)",
            "new: added (y)",
            "predictor: was aa, now bb",
        ]
    run.check_fingerprint(before.digest, before.differences)


def test_a_driver_killed_while_claiming_leaves_no_half_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(str(tmp_path), "r1")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.claim("d1", {}, lambda parts: [])
    assert list_names(join(run.uri, "_work")) == []
    run.claim("d2", {}, lambda parts: [])


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# --- attempts


def test_an_attempt_keeps_parts_notes_and_receipts(output: str) -> None:
    attempt = AttemptFolder(join(output, "runs", "r"), "20240101-ab")
    assert attempt.write_part("scores", 7, b"rows") == "scores/part-20240101-ab-000007.parquet"
    assert read_bytes(join(output, "runs", "r", "scores", "part-20240101-ab-000007.parquet")) == b"rows"
    assert (attempt.read_notes(), attempt.receipts()) == ({}, [])
    attempt.write_reads(0, {0: ReadNote(5), 1: ReadNote(2)})
    attempt.write_reads(12, {12: ReadNote(9, None, "cut off")})
    attempt.write_reads(0, {0: ReadNote(5), 1: ReadNote(3, 2, "bad page")})  # a retried task
    assert attempt.read_notes() == {0: ReadNote(5), 1: ReadNote(3, 2, "bad page"), 12: ReadNote(9, None, "cut off")}
    written = [write(attempt, task, (10 * task, 10 * task + 5)) for task in (11, 2)]
    attempt.write_receipt(written[0])
    assert attempt.receipts() == [written[1], written[0]]


def test_an_attempt_takes_over_what_has_a_receipt_and_the_rest_is_gone(
    output: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(output, "r1")
    hold = started(run)
    first = run.begin(hold)
    assert first.is_open
    done = write(first, 0, (0, 5))
    write(first, 1, (5, 9), receipted=False)
    first.write_reads(0, {0: ReadNote(40)})
    write_bytes(join(first.decisions_uri, "cpu.json"), b'{"provider": "torch"}')
    write_bytes(join(first.decisions_uri, "refused-ab.json"), b"{}")
    hold.release()
    with caplog.at_level(logging.INFO):
        second = run.begin(started(run))
    assert "run r1: 5 rows are done already; the rest is scored" in caplog.text
    assert (second.receipts(), second.read_notes()) == ([done], {0: ReadNote(40)})
    assert second.decisions() == {"cpu": {"provider": "torch"}}, "the run's scores come from one engine"
    assert list_names(join(run.uri, "scores")) == [done.files[0].path.removeprefix("scores/")]
    assert [attempt.attempt for attempt in run.attempts()] == [second.attempt]


def test_what_a_task_of_an_older_attempt_adds_later_does_not_count_and_is_swept(output: str) -> None:
    run = RunFolder(output, "r1")
    hold = started(run)
    first = run.begin(hold)
    done = write(first, 0, (0, 5))
    hold.release()
    hold = started(run)
    second = run.begin(hold)
    assert not first.is_open, "its tasks are told not to write"
    assert not takes_decisions(join(first.decisions_uri, "cpu.json"))
    write(first, 1, (5, 9))
    own = write(second, 0, (5, 9))
    assert second.receipts() == [done, own]
    run.commit(hold, second, manifest_of(second), "")
    kept = [file.path.removeprefix("scores/") for item in (done, own) for file in item.files]
    assert list_names(join(run.uri, "scores")) == sorted(kept)
    assert not exists(join(run.uri, "_work"))
    assert not second.is_open


def test_an_attempt_that_died_before_it_froze_its_start_changes_nothing(output: str) -> None:
    run = RunFolder(output, "r1")
    hold = started(run)
    first = run.begin(hold)
    done = write(first, 0, (0, 5))
    hold.release()
    hold = started(run)
    torn = AttemptFolder(run.uri, f"{hold.number:08d}-0-dead")
    write_bytes(join(torn.decisions_uri, "cpu.json"), b"{}")
    hold.release()
    third = run.begin(started(run))
    assert third.receipts() == [done]
    assert torn.attempt not in [attempt.attempt for attempt in run.attempts()]


def test_one_holder_may_begin_again_and_decide_anew(output: str) -> None:
    run = RunFolder(output, "r1")
    hold = started(run)
    first = run.begin(hold)
    write_bytes(join(first.decisions_uri, "h100.json"), b"{}")
    second = run.begin(hold, decides_anew=True)
    assert second.attempt > first.attempt
    assert second.decisions() == {}
    assert second.is_open
    assert not first.is_open


def test_what_was_taken_survives_json(output: str) -> None:
    receipt = write(AttemptFolder(join(output, "runs", "r"), "a"), 3, (0, 2**40))
    taken = Taken((receipt,), {7: ReadNote(3), 8: ReadNote(1, None, "gone")})
    assert Taken.from_json(taken.to_json()) == taken


# --- publication


def test_publish_writes_everything_and_drops_the_work(output: str) -> None:
    run = RunFolder(output, "r1")
    assert not run.is_published
    manifest = publish(run)
    assert run.is_published
    assert list_names(run.uri) == ["_SUCCESS", "config.yaml", "manifest.json", "scores"]
    assert run.read_manifest() == manifest
    assert read_bytes(join(run.uri, "manifest.json")).decode().endswith("}\n")
    assert read_bytes(join(run.uri, "_SUCCESS")) == b""
    assert read_bytes(join(run.uri, "config.yaml")) == b"input: {}\n"
    assert json.loads(read_bytes(join(output, "latest.json"))) == {"run_id": "r1", "manifest": "runs/r1/manifest.json"}
    assert len(list_names(join(output, "_publish"))) == 1, "the publisher's lock keeps one entry, released"
    run.finish()
    assert not exists(join(run.uri, "_work"))


def test_a_committed_run_is_finished_by_whoever_comes(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(RunFolder(output, "old"))
    run = RunFolder(output, "r1")
    hold = started(run)
    attempt = run.begin(hold)
    write(attempt, 0, (0, 5))
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", lambda self: None)
        run.commit(hold, attempt, manifest_of(attempt), "")
    assert not run.is_published
    assert run.hold() is None, "there is nothing left to hold"
    run.finish()
    assert run.is_published
    assert json.loads(read_bytes(join(output, "latest.json")))["run_id"] == "r1"


def test_a_rerun_of_an_older_run_leaves_latest_and_mends_a_publication_cut_off_before_it(output: str) -> None:
    for name in ("r1", "r2"):
        publish(RunFolder(output, name))
    latest = join(output, "latest.json")
    RunFolder(output, "r1").finish()
    assert json.loads(read_bytes(latest))["run_id"] == "r2"
    # `_work` is dropped after `latest.json`: while it is there, the pointer may not have been written.
    run = RunFolder(output, "r1")
    write_bytes(join(run.uri, "_work", "fingerprint.json"), b"{}")
    run.finish()
    assert json.loads(read_bytes(latest))["run_id"] == "r1"
    assert not exists(join(run.uri, "_work"))


def test_a_driver_that_was_taken_over_cannot_commit_begin_or_bring_the_work_back(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "r1", lease_s=0.4)
    zombie = started(run)
    old = run.begin(zombie)
    write(old, 0, (0, 5))
    zombie.end()  # its heartbeat stands still
    successor = RunFolder(str(tmp_path), "r1", lease_s=0.4)
    hold = successor.hold()
    assert hold is not None
    new = successor.begin(hold)
    with pytest.raises(LockError, match="another process took over while this one did not answer"):
        run.begin(zombie)
    with pytest.raises(LockError, match="another process took over"):
        run.commit(zombie, old, {"files": []}, "")
    assert not run.is_published
    write(new, 0, (5, 9))
    successor.commit(hold, new, manifest_of(new), "")
    with pytest.raises(LockError):
        zombie.check()
    zombie.release()
    assert list_names(run.uri) == ["_SUCCESS", "config.yaml", "manifest.json", "scores"]
    assert len(list_names(join(run.uri, "scores"))) == 2
