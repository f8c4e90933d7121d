"""Real Ray runs whose processes are killed: nothing lost, nothing doubled, nothing published early.

A few kills here; `pytest -m chaos` runs the full set, whose figures lie in `tests/data/chaos/`. Every named step of write and
commit is `tests/test_crashes.py`'s.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import chaos, predictors
from tests.conftest import RayHead
from tests.formula import started_of
from tests.predictors import Predictor

pytestmark = pytest.mark.timeout(7200)


def run_parts(
    folder: Path,
    head: RayHead,
    zoo_root: Path,
    predictor: Predictor,
    parts: Sequence[str],
    flags: Sequence[str],
) -> Mapping[str, Mapping[str, object]]:
    out = folder / "out.json"
    paths = [str(path) for path in (folder, predictor.path, zoo_root / predictors.CACHE, out)]
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = head.address
    try:
        chaos.main([*paths, *flags, *parts])
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before
    found: Mapping[str, Mapping[str, object]] = json.loads(out.read_text())
    return found


def test_three_drivers_killed_at_random(
    ray_head: RayHead, zoo: Mapping[str, Predictor], zoo_root: Path, tmp_path: Path
) -> None:
    flags = ["--seed=3", "--rows=10000"]
    found = run_parts(tmp_path, ray_head, zoo_root, zoo["ft_transformer"], ["driver=3"], flags)
    assert len(found["driver"]["kills"]) == 3  # type: ignore[arg-type]


def test_poison_rows_cost_themselves_alone(
    ray_head: RayHead,
    zoo: Mapping[str, Predictor],
    zoo_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row in 1,000 raises, one crashes its process, one never returns: all others are scored."""
    monkeypatch.setenv("RAY_ADDRESS", ray_head.address)
    predictor = zoo["ft_transformer"]
    rows = pq.read_table(predictor.rows).replace_schema_metadata(None)
    files = chaos.write_rows(rows, tmp_path / "data", 4_000, 2)
    run = chaos.Chaos(
        tmp_path, predictor.path, zoo_root / predictors.CACHE, files, settings=("quarantine.max_fraction=1",)
    )
    output = run.output()
    poison = {"0000.parquet:500": "raise", "0000.parquet:1500": "raise", "0001.parquet:500": "raise"}
    poison |= {"0001.parquet:1234": "crash", "0000.parquet:77": "hang"}
    Path(f"{output}.poison.json").write_text(json.dumps(poison))
    published = run.finish(output)
    run.check(published)
    found = {
        f"{Path(row['source_file']).name}:{row['source_row']}": (row["stage"], row["reason"])
        for row in published.quarantine.to_pylist()
    }
    reasons = {"raise": "score_error", "crash": "process_killed", "hang": "timeout"}
    assert found == {row: ("score", reasons[harm]) for row, harm in poison.items()}
    starts = len(started_of(output).read_text().split())
    print("actors started", starts)
    assert starts <= 1 + 2 * 3, "three restarts at most for each row that ends its process"


@pytest.mark.chaos
@pytest.mark.parametrize(("part", "rows"), [("actors=20", 100_000), ("workers=10", 100_000), ("driver=30", 40_000)])
def test_the_full_set_with_a_formula(
    ray_head: RayHead, zoo: Mapping[str, Predictor], zoo_root: Path, tmp_path: Path, part: str, rows: int
) -> None:
    flags = ["--seed=1", f"--rows={rows}"]
    found = run_parts(tmp_path, ray_head, zoo_root, zoo["ft_transformer"], [part], flags)
    kind, _, count = part.partition("=")
    kills = found[kind]["kills"]
    assert (kills if isinstance(kills, int) else len(kills)) == int(count)  # type: ignore[arg-type]


@pytest.mark.chaos
def test_three_kills_of_each_kind_with_a_real_predictor(
    ray_head: RayHead, zoo: Mapping[str, Predictor], zoo_root: Path, tmp_path: Path
) -> None:
    parts, flags = ["driver=3", "actors=3", "workers=3"], ["--seed=2", "--rows=10000", "--real"]
    found = run_parts(tmp_path, ray_head, zoo_root, zoo["ft_transformer"], parts, flags)
    assert found["actors"]["kills"] == found["workers"]["kills"] == 3
