"""The main job end to end: real Ray, real files, really trained predictors.

Covers identities and accounts over formats and actors, bad rows, what upstream does with them, resume, empty input, and
the scores written against AutoGluon's own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from tests import predictors
from tests.conftest import RayHead, ScoreCommand
from tests.formula import score_of
from tests.layouts import LAYOUT_SETTINGS, ActorLines, ScoredLayout, wait_for_goodbyes, write_layout
from tests.predictors import Predictor
from tests.published import Published, read_published

pytestmark = pytest.mark.timeout(900)


def expected_identities(files: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted((path, row) for path, count in files.items() for row in range(count))


def assert_accounts(published: Published, files: Mapping[str, int]) -> None:
    """rows read = rows scored + rows quarantined, for the run and every shard, and the identities are the input's."""
    assert published.identities() == expected_identities(files)
    totals = published.manifest["totals"]
    assert totals["rows_read"] == sum(files.values()) == totals["rows_scored"] + totals["rows_quarantined"]
    by_file = dict.fromkeys(files, 0)
    for shard in published.manifest["shards"]:
        assert shard["state"] == "complete"
        assert shard["rows_read"] == shard["rows_scored"] + shard["rows_quarantined"]
        by_file[shard["source_file"]] += shard["rows_read"]
    assert by_file == dict(files)


@pytest.fixture(scope="module")
def tabular_reference(
    zoo: Mapping[str, Predictor], tmp_path_factory: pytest.TempPathFactory, tabular_rows: pa.Table
) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("reference") / "rows.parquet"
    pq.write_table(tabular_rows, path)
    reference: pd.DataFrame = predictors.reference(zoo["ft_transformer"].path, path).to_pandas()
    return reference.assign(row_id=tabular_rows["row_id"].to_pylist()).set_index("row_id")


def test_every_row_of_parquet_csv_and_hive_is_scored_once_and_like_the_reference(
    score: ScoreCommand, scored_layout: ScoredLayout, tabular_reference: pd.DataFrame
) -> None:
    run = scored_layout
    published = read_published(run.output)
    assert_accounts(published, run.files)
    assert sum(run.lines.final_rows.values()) == 300, f"the actor's last line counts every row: {run.lines}"
    assert set(run.lines.final_rows) == run.lines.loaded
    assert len(run.lines.loaded) == 1
    assert "provider=cpu rows=" in run.log, "and it reaches the driver's log"
    plans = list((run.cache / "engines" / "rtx").glob("*/engine.plan"))
    assert len(plans) == 1, "the engine for the cluster's L4 is built where the spec is extracted"
    assert published.manifest["images"] == {
        "decode": "auto",
        "mode": "exact",
        "resizes_on_gpu": False,
        "cpu_share": 0.0,
    }
    check_decision(published)
    check_like_reference(published, tabular_reference)

    again = score(*run.arguments)
    assert again.code == 0
    assert again.summary["was_published"] is True
    assert read_published(run.output).manifest == published.manifest, "the same command again does nothing"


def check_decision(published: Published) -> None:
    """One decision, on ONNX Runtime: 300 rows do not pay the import of AutoGluon into an actor."""
    assert set(published.manifest["engine"]["decisions"]) == {"cpu"}
    decision = published.manifest["engine"]["decisions"]["cpu"]
    assert decision["provider"] == "cpu"
    assert decision["reference"] == "predict_proba(realtime=True) in fp32"
    parity = decision["rungs"][0]["parity"]
    assert parity["rows"] >= 60
    assert parity["max_abs_diff"] <= 1e-5
    assert {rung["provider"]: rung["outcome"] for rung in decision["rungs"]} == {"cpu": "used", "torch": "skipped"}


def check_like_reference(published: Published, reference: pd.DataFrame) -> None:
    scores = published.scores.to_pandas().set_index("row_id")
    assert set(scores["region"].dropna()) == {"north", "s/outh"}
    for name in ("proba_0", "proba_1"):
        assert scores[name].dtype == np.float32
        assert np.abs(scores[name] - reference.loc[scores.index, name]).max() <= 1e-5
    assert (scores["prediction"] == reference.loc[scores.index, "prediction"]).all()


@pytest.mark.slow
def test_three_real_actors_score_every_row_once_and_like_the_reference(
    ray_head: RayHead,
    score: ScoreCommand,
    zoo: Mapping[str, Predictor],
    tabular_rows: pa.Table,
    tabular_reference: pd.DataFrame,
    tmp_path: Path,
) -> None:
    files = write_layout(tabular_rows, tmp_path / "data")
    before = ActorLines.read(ray_head.logs)
    arguments: list[Any] = ["--input", tmp_path / "data", "--predictor", zoo["ft_transformer"].path]
    run = score(*arguments, "--output", tmp_path / "out", "--set", "resources.actors=3", *LAYOUT_SETTINGS)
    assert run.code == 0, run.log
    published = read_published(tmp_path / "out")
    assert_accounts(published, files)
    check_decision(published)
    check_like_reference(published, tabular_reference)
    lines = wait_for_goodbyes(ray_head.logs, before, rows=300)
    assert sum(lines.final_rows.values()) == 300, f"the actors' last lines count every row: {lines}"
    # Ray kills an actor that was not ready when the last row was scored: it may have loaded, and scored nothing.
    assert set(lines.final_rows) <= lines.loaded
    assert 1 <= len(lines.loaded) <= 3


def test_several_actors_share_the_rows_and_score_each_once(
    formula: ScoreCommand, zoo: Mapping[str, Predictor], tabular_rows: pa.Table, tmp_path: Path
) -> None:
    files = write_layout(tabular_rows, tmp_path / "data")
    arguments: list[Any] = ["--input", tmp_path / "data", "--predictor", zoo["ft_transformer"].path]
    run = formula(*arguments, "--output", tmp_path / "out", "--set", "resources.actors=3", *LAYOUT_SETTINGS)
    assert run.code == 0, run.log
    published = read_published(tmp_path / "out")
    assert_accounts(published, files)
    rows = published.scores["source_row"].to_numpy()
    np.testing.assert_array_equal(published.scores["proba_1"].to_numpy(), score_of(rows))


@pytest.fixture(scope="module")
def bad_photos(zoo: Mapping[str, Predictor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows with one corrupt photo (row 7) and one missing file (row 8)."""
    folder = tmp_path_factory.mktemp("bad-photos")
    rows = pd.read_parquet(zoo["skip_images"].rows)
    rows = rows[rows["photo"].notna()].head(40).reset_index(drop=True)
    (folder / "corrupt.jpg").write_bytes(b"this is no picture" * 20)
    rows.loc[7, "photo"] = str(folder / "corrupt.jpg")
    rows.loc[8, "photo"] = str(folder / "does-not-exist.jpg")
    rows.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.slow
def test_upstream_scores_a_black_image_or_the_neighbour_where_ours_quarantines(
    zoo: Mapping[str, Predictor], bad_photos: Path
) -> None:
    zero = predictors.reference(zoo["image_only"].path, bad_photos, default_mode=True).to_pandas()
    assert zero.loc[7, "proba_1"] == pytest.approx(zero.loc[8, "proba_1"], abs=1e-6), (
        "both are scored as the black image"
    )
    skip = predictors.reference(zoo["skip_images"].path, bad_photos, default_mode=True).to_pandas()
    assert len(skip) == 40
    assert skip.loc[7, "proba_1"] == pytest.approx(skip.loc[9, "proba_1"], abs=1e-6), "row 7 has row 9's score"
    assert skip.loc[8, "proba_1"] == pytest.approx(skip.loc[9, "proba_1"], abs=1e-6), "row 8 has row 9's score"


def test_a_bad_image_is_quarantined_with_its_reason_and_the_limit_holds(
    score: ScoreCommand, zoo: Mapping[str, Predictor], bad_photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments: list[Any] = ["--input", bad_photos, "--predictor", zoo["skip_images"].path, "--output", output]
    refused = score(*arguments)
    assert refused.code == 3, refused.log
    assert "quarantine.max_fraction: 2 of 40 rows (5.00 %)" in refused.error
    assert "image_missing 1" in refused.error
    assert not (output / "latest.json").exists(), "nothing is published over the limit"
    # A rerun with another limit publishes what was scored: no actor starts.
    published_run = score(*arguments, "--set", "quarantine.max_fraction=0.1")
    assert published_run.code == 0, published_run.log
    assert "40 rows are done already" in published_run.log
    assert "1 of 1 shards are complete and not read again" in published_run.log
    assert "load_s=" not in published_run.log
    published = read_published(output)
    assert_accounts(published, {str(bad_photos): 40})
    decision = published.manifest["engine"]["decisions"]["cpu"]
    assert decision["reference"] == "predict_proba(realtime=True) in fp32", "where only the spec was known"
    bad = {row["source_row"]: row for row in published.quarantine.to_pylist()}
    assert {row: (item["stage"], item["reason"]) for row, item in bad.items()} == {
        7: ("features", "image_undecodable"),
        8: ("features", "image_missing"),
    }
    assert "does-not-exist.jpg" in bad[8]["message"]


def test_a_run_without_rows_publishes_an_empty_part_with_the_full_schema(
    formula: ScoreCommand, zoo: Mapping[str, Predictor], tabular_rows: pa.Table, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(tabular_rows.slice(0, 0), data / "empty.parquet")
    pacsv.write_csv(tabular_rows.slice(0, 0), data / "header-only.csv")
    run = formula("--input", data, "--predictor", zoo["ft_transformer"].path, "--output", tmp_path / "out")
    assert run.code == 0, run.log
    published = read_published(tmp_path / "out")
    assert published.manifest["totals"]["rows_read"] == 0
    assert published.scores.num_rows == 0
    names = ["row_id", "source_file", "source_row", "proba_0", "proba_1", "prediction"]
    assert [name for name in published.scores.column_names if name in names] == names
    assert {shard["state"] for shard in published.manifest["shards"]} == {"complete"}


def test_dry_run_prints_the_plan_and_writes_nothing(
    score: ScoreCommand, zoo: Mapping[str, Predictor], tabular_rows: pa.Table, tmp_path: Path
) -> None:
    files = write_layout(tabular_rows, tmp_path / "data")
    predictor = zoo["ft_transformer"].path
    run = score("--input", tmp_path / "data", "--predictor", predictor, "--output", tmp_path / "out", "--dry-run")
    assert run.code == 0, run.log
    assert not (tmp_path / "out").exists()
    for text in (*files, "sha256=", "row_id", "region", "kept", "1 scoring"):
        assert text in run.log
    assert run.summary["rows_estimated"] == 300


def test_run_id_of_another_fingerprint_is_refused_naming_the_difference(
    score: ScoreCommand, zoo: Mapping[str, Predictor], tabular_rows: pa.Table, tmp_path: Path
) -> None:
    pq.write_table(tabular_rows.slice(0, 0), tmp_path / "rows.parquet")
    arguments: list[Any] = ["--input", tmp_path / "rows.parquet", "--predictor", zoo["ft_transformer"].path]
    arguments += ["--output", tmp_path / "out", "--run-id", "nightly"]
    assert score(*arguments).code == 0
    pq.write_table(tabular_rows.slice(0, 0), tmp_path / "rows.parquet", compression="none", data_page_version="2.0")
    changed = score(*arguments, "--set", "images.on_error=blank")
    assert changed.code == 2
    for text in ("nightly", "images.on_error", "quarantine", "blank", str(tmp_path / "rows.parquet")):
        assert text in changed.error


def test_the_manifest_names_every_file_with_its_sha256(
    score: ScoreCommand, zoo: Mapping[str, Predictor], tabular_rows: pa.Table, tmp_path: Path
) -> None:
    import hashlib

    pq.write_table(tabular_rows.slice(0, 0), tmp_path / "rows.parquet")
    output = tmp_path / "out"
    assert (
        score("--input", tmp_path / "rows.parquet", "--predictor", zoo["ft_transformer"].path, "--output", output).code
        == 0
    )
    published = read_published(output)
    for file in published.manifest["files"]:
        data = (published.folder / file["path"]).read_bytes()
        assert (file["sha256"], file["size_bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert json.loads((output / "latest.json").read_text())["run_id"] == published.manifest["run_id"]
    assert "predictor:" in (published.folder / "config.yaml").read_text()
