"""A driver killed at every named step of write and commit: after one rerun nothing is lost, doubled or published early.

On the ledger alone, in processes that kill themselves with SIGKILL (`scoring/steps.py`); with Ray: `tests/test_chaos.py`.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from scoring.steps import STEPS
from tests.ledger_run import FAULTY, RUN_ID, TASK_ROWS, drive, rows_scored, score_of, write_inputs
from tests.published import Published, read_published

pytestmark = pytest.mark.timeout(300)

MOMENTS = [f"{step}:{when}" for step in STEPS for when in ("before", "after")]
# The steps of a task happen several times: the first part of the first task, and a later one's.
LATER = [f"{step}:{when}:4" for step in ("write_part", "write_receipt") for when in ("before", "after")]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_inputs(tmp_path / "data")
    return tmp_path


def identities(work: Path) -> list[tuple[str, int]]:
    files = (("a.parquet", 230), ("b.parquet", 150), ("c.csv", 120))
    return [(str(work / "data" / name), row) for name, count in files for row in range(count)]


def assert_exact(work: Path) -> Published:
    """Every row once, scores as the formula has them, bad rows in quarantine; nothing but what is listed lies there."""
    published = read_published(work / "out")
    assert published.identities() == identities(work)
    rows = published.scores["source_row"].to_numpy()
    assert (published.scores["proba_1"].to_numpy() == score_of(rows)).all()
    bad = published.quarantine["source_row"].to_numpy()
    assert sorted(bad.tolist()) == sorted(row for _, row in identities(work) if row % 50 == 0)
    for file in published.manifest["files"]:
        data = (published.folder / file["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file["sha256"]
    left = sorted(path.name for path in published.folder.iterdir())
    assert left == ["_SUCCESS", "config.yaml", "manifest.json", "quarantine", "scores"]
    return published


def assert_nothing_published_early(work: Path) -> None:
    """A reader that goes by `latest.json` or `_SUCCESS` finds all of a run or nothing."""
    folder = work / "out" / "runs" / RUN_ID
    if (work / "out" / "latest.json").exists():
        assert (folder / "_SUCCESS").exists()
    if (folder / "_SUCCESS").exists():
        manifest = json.loads((folder / "manifest.json").read_text())
        on_disk = {f"{kind}/{path.name}" for kind in ("scores", "quarantine") for path in (folder / kind).iterdir()}
        assert on_disk == {file["path"] for file in manifest["files"]}
        assert sum(file["rows"] for file in manifest["files"]) == len(identities(work))


@pytest.mark.parametrize("moment", [*MOMENTS, *LATER])
def test_one_rerun_after_a_kill_at_any_step_gives_the_whole_run(work: Path, moment: str) -> None:
    assert drive(work, moment) == -9, f"no step {moment} was passed"
    assert_nothing_published_early(work)
    assert drive(work) == 0
    assert_exact(work)
    assert rows_scored(work) <= len(identities(work)) + TASK_ROWS, "only what was in flight is scored again"
    before = sorted(path.stat().st_mtime_ns for path in (work / "out").rglob("*") if path.is_file())
    scored = rows_scored(work)
    assert drive(work) == 0
    assert json.loads((work / "outcome.json").read_text())["was_published"]
    assert rows_scored(work) == scored
    assert sorted(path.stat().st_mtime_ns for path in (work / "out").rglob("*") if path.is_file()) == before


def test_kill_after_kill_still_ends_whole(work: Path) -> None:
    """A driver that never gets far: each one dies a few steps after it began, until one is through."""
    rng = np.random.default_rng(7)
    kills = 0
    while drive(work, f"write_receipt:{rng.choice(['before', 'after'])}:{rng.integers(1, 3)}") == -9:
        kills += 1
        assert_nothing_published_early(work)
        assert kills < 40
    assert kills >= 3
    assert_exact(work)
    assert rows_scored(work) <= len(identities(work)) + kills * TASK_ROWS


def test_a_run_that_is_scored_but_not_published_reads_nothing_again(work: Path) -> None:
    assert drive(work, "write_manifest:before") == -9
    notes = sorted((work / "out").rglob("reads/*.json"))
    assert notes
    for path in (work / "data").iterdir():
        # Its size and time stay, for the fingerprint, and its footer or header: whoever reads a row finds none.
        status, content = path.stat(), bytearray(path.read_bytes())
        content[20 : len(content) // 3] = b"\0" * (len(content) // 3 - 20)
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert drive(work) == 0
    assert_exact(work)


@pytest.mark.parametrize("kill_at", [None, "take_over:before", "sweep:after", "write_receipt:before", "commit:before"])
def test_quarantined_rows_are_tried_again_beside_the_scores_that_stay(work: Path, kill_at: str | None) -> None:
    (work / FAULTY).touch()
    assert drive(work) == 0
    before = read_published(work / "out")
    faulty = [row for _, row in identities(work) if row % 50 == 1]
    assert before.manifest["totals"]["reasons"] == {"number_invalid": 11, "score_error": len(faulty)}
    (work / FAULTY).unlink()
    scored = rows_scored(work)
    if kill_at:
        assert drive(work, kill_at, retry_of=RUN_ID) == -9
    assert drive(work, retry_of=RUN_ID) == 0
    after = assert_exact(work)
    assert after.folder.name == f"{RUN_ID}-again"
    quarantined = before.manifest["totals"]["rows_quarantined"]
    assert rows_scored(work) - scored <= quarantined * (2 if kill_at else 1), "nothing else is scored again"
    kept = {file["path"]: file["sha256"] for file in before.manifest["files"] if file["path"].startswith("scores/")}
    assert kept.items() <= {file["path"]: file["sha256"] for file in after.manifest["files"]}.items()
    assert (work / "out" / "runs" / RUN_ID / "_SUCCESS").exists(), "the old run stays as it was"
    # Once more: what is left is bad for good, and the run that was retried has nothing left to take.
    assert drive(work, retry_of=RUN_ID) == 0


def test_scores_are_those_of_a_quiet_run(work: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    quiet = tmp_path_factory.mktemp("quiet")
    write_inputs(quiet / "data")
    assert drive(quiet) == 0
    assert drive(work, "write_receipt:after:3") == -9
    assert drive(work) == 0

    def by_row(published: Published) -> pa.Table:
        names = [path.rpartition("/")[2] for path in published.scores["source_file"].to_pylist()]
        table = published.scores.set_column(0, "source_file", pa.array(names))
        return table.sort_by([("source_file", "ascending"), ("source_row", "ascending")])

    assert by_row(assert_exact(work)).equals(by_row(assert_exact(quiet)))
