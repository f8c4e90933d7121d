"""The sample of the input that engines are checked on: spread over shards, without faulty rows, as many as asked."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from scoring.config import ScoreConfig
from scoring.sample import draw_sample
from scoring.shards import inspect_files, list_inputs, plan_inputs
from scoring.spec import FeatureSpec, NumericalColumn

SPEC = FeatureSpec(
    label="y",
    problem_type="binary",
    class_labels=(0, 1),
    numerical=(NumericalColumn("x", 0.0, None, None),),
    categorical=(),
    text=(),
    image=(),
    numerical_models=("numerical_mlp",),
    categorical_models=(),
    text_models=(),
    image_models=(),
    skip_missing=False,
)


def sample(folder: Path, **parity: Any) -> Any:
    config = ScoreConfig.model_validate(
        {
            "input": {"paths": (str(folder),)},
            "predictor": {"path": "unused"},
            "output": {"path": "unused"},
            "images": {"base": str(folder)},
            "parity": parity,
        }
    )
    plan = plan_inputs(inspect_files(list_inputs(config.input), config.input), SPEC, config.input, ())
    found = draw_sample(plan, config, SPEC)
    if found is None:
        return None
    assert found.raw.column_names == ["x"]
    assert found.raw.num_rows == found.features.num_rows
    return found.features


def test_rows_come_from_shards_over_the_whole_input(tmp_path: Path) -> None:
    for day in range(20):
        pd.DataFrame({"x": [float(day)] * 100}).to_parquet(tmp_path / f"day-{day:02d}.parquet")
    found = sample(tmp_path, rows=80)
    days = {path[-10:-8] for path in found["source_file"].to_pylist()}
    assert found.num_rows == pytest.approx(80, abs=8)
    assert len(days) >= 5
    assert max(map(int, days)) >= 15, "late files are in it"


def test_a_small_run_gives_a_tenth_or_at_least_sixty_four_rows(tmp_path: Path) -> None:
    pd.DataFrame({"x": range(1000)}).to_parquet(tmp_path / "rows.parquet")
    assert sample(tmp_path).num_rows == 100
    pd.DataFrame({"x": range(100)}).to_parquet(tmp_path / "rows.parquet")
    assert sample(tmp_path).num_rows == 64


def test_faulty_rows_are_not_in_it(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("x\n" + "\n".join(["1", "two", "3"] * 10) + "\n")
    found = sample(tmp_path)
    assert found.num_rows == 20
    assert found["reason"].null_count == 20


def test_no_rows_no_sample(tmp_path: Path) -> None:
    pd.DataFrame({"x": pd.Series([], dtype=float)}).to_parquet(tmp_path / "rows.parquet")
    assert sample(tmp_path) is None
