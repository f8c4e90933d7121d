"""Real Ray runs whose processes are killed: nothing lost, nothing doubled, nothing published early.

A few kills here; `pytest -m chaos` runs the full set, whose figures lie in `tests/data/chaos/`. Every named step of write and
commit is `tests/test_crashes.py`'s.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import chaos, predictors
from tests.conftest import RayHead
from tests.formula import started_of
from tests.predictors import Predictor

pytestmark = pytest.mark.timeout(7200)


RunParts = Callable[..., Mapping[str, Any]]
StartChaos = Callable[..., chaos.Chaos]


@pytest.fixture
def run_parts(
    ray_head: RayHead,
    zoo: Mapping[str, Predictor],
    zoo_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Mapping[str, Any]]:
    """`tests.chaos` with a small predictor; what it found."""
    monkeypatch.setenv("RAY_ADDRESS", ray_head.address)
    paths = [str(path) for path in (zoo["ft_transformer"].path, zoo_root / predictors.CACHE, tmp_path / "out.json")]

    def run(*arguments: str) -> Mapping[str, Any]:
        chaos.main([str(tmp_path), *paths, *arguments])
        found: Mapping[str, Any] = json.loads((tmp_path / "out.json").read_text())
        return found

    return run


@pytest.fixture
def start_chaos(run_parts: RunParts, zoo: Mapping[str, Predictor], zoo_root: Path, tmp_path: Path) -> StartChaos:
    """4,000 rows in so many files before the formula, on the session's Ray; any share of them may be bad."""

    def start(num_files: int, **changes: Any) -> chaos.Chaos:
        predictor = zoo["ft_transformer"]
        rows = pq.read_table(predictor.rows).replace_schema_metadata(None)
        files = chaos.write_rows(rows, tmp_path / "data", 4_000, num_files)
        settings = ("quarantine.max_fraction=1",)
        return chaos.Chaos(tmp_path, predictor.path, zoo_root / predictors.CACHE, files, settings=settings, **changes)

    return start


def test_two_drivers_killed_in_turn(run_parts: RunParts) -> None:
    """`kill_in_turn` itself holds the rows that are scored twice to those that were in flight: 512 to 6,280 of them."""
    found = run_parts("--seed=3", "--rows=20000", "--delay=0.2", "turns=2")["turns"]
    assert len(found["killed_at"]) == 1, "the first before its first rows"


def test_poison_rows_cost_themselves_alone(start_chaos: StartChaos) -> None:
    """One row in 1,000 raises, one crashes its process, one never returns, also in a feature worker: the others are scored."""
    run = start_chaos(2)
    output = run.output()
    poison: dict[str, dict[str, str]] = {"score": {}, "features": {}}
    poison["score"] |= {"0000.parquet:500": "raise", "0000.parquet:1500": "raise", "0001.parquet:500": "raise"}
    poison["score"] |= {"0001.parquet:1234": "crash", "0000.parquet:77": "hang"}
    poison["features"] |= {"0001.parquet:7": "raise", "0001.parquet:1900": "crash"}
    Path(f"{output}.poison.json").write_text(json.dumps(poison))
    published = run.finish(output)
    run.check(published)
    found = {
        f"{Path(row['source_file']).name}:{row['source_row']}": (row["stage"], row["reason"])
        for row in published.quarantine.to_pylist()
    }
    reasons = {"raise": "score_error", "crash": "process_killed", "hang": "timeout"}
    assert found == {row: (stage, reasons[harm]) for stage in poison for row, harm in poison[stage].items()}
    starts = {stage: len(started_of(output, stage).read_text().split()) for stage in poison}
    print("actors started", starts)
    # Three restarts at most for each row that ends its process.
    assert starts["score"] <= 1 + 2 * 3
    assert starts["features"] <= 1 + 3


def test_workers_that_read_their_rows_lose_none_when_they_are_killed(run_parts: RunParts) -> None:
    found = run_parts("--seed=4", "--rows=20000", "--delay=0.2", "--workers-read", "workers=1")["workers"]
    assert found["kills"] == 1


def test_poison_rows_of_workers_that_read_cost_themselves_alone(start_chaos: StartChaos) -> None:
    run = start_chaos(8, workers_read=True)
    output = run.output()
    poison = {"0003.parquet:7": "raise", "0005.parquet:400": "crash"}
    Path(f"{output}.poison.json").write_text(json.dumps({"features": poison}))
    published = run.finish(output)
    run.check(published)
    timings = published.manifest["timings"]
    assert timings["features_busy_s"] > 0
    assert "read_busy_s" not in timings, "reading is part of their tasks"
    found = {f"{Path(row['source_file']).name}:{row['source_row']}" for row in published.quarantine.to_pylist()}
    assert found == set(poison)
    assert len(started_of(output, "features").read_text().split()) <= 1 + 3


@pytest.mark.chaos
def test_a_hopeless_run_is_stopped_long_before_its_end(run_parts: RunParts) -> None:
    found = run_parts("--rows=40000", "hopeless=1")["hopeless"]
    assert found["rows_done"] <= found["rows"] / 4


@pytest.mark.chaos
def test_a_run_that_has_lost_its_only_place_goes_on_smaller(run_parts: RunParts) -> None:
    (removal,) = run_parts("--rows=40000", "stalls=1")["stalls"]["removals"]
    assert removal["stalls"] >= 1


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("part", "rows"),
    [("driver=30", 20_000), ("owned=3", 20_000), ("actors=20", 100_000), ("workers=10", 100_000), ("nodes=3", 40_000)],
)
def test_the_full_set_with_a_formula(run_parts: RunParts, part: str, rows: int) -> None:
    kind, _, count = part.partition("=")
    found = run_parts("--seed=1", f"--rows={rows}", part)[kind]
    kills = found["removals" if kind == "nodes" else "kills"]
    assert (kills if isinstance(kills, int) else len(kills)) == int(count)


@pytest.mark.chaos
def test_two_drivers_and_a_driver_that_slept_through_its_lease(run_parts: RunParts) -> None:
    found = run_parts("--seed=1", "--rows=20000", "contenders=3", "zombies=3")
    assert found["contenders"]["exit_codes"] == [[0, 5]] * 3
    assert [zombie["zombie_exit_code"] for zombie in found["zombies"]["zombies"]] == [5] * 3


@pytest.mark.chaos
def test_three_kills_of_each_kind_with_a_real_predictor(run_parts: RunParts) -> None:
    found = run_parts("--seed=2", "--rows=20000", "--real", "turns=3", "driver=3", "actors=3", "workers=3", "nodes=3")
    assert len(found["turns"]["killed_at"]) == 2
    assert found["actors"]["kills"] == found["workers"]["kills"] == 3
    assert len(found["driver"]["kills"]) == len(found["nodes"]["removals"]) == 3
