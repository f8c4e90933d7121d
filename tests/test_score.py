"""The main job end to end: real Ray, real files, really trained predictors.

Covers identities and accounts over formats and actors, bad rows, what upstream does with them, resume, empty input, and
the scores written against AutoGluon's own.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
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
from tests.predictors import Predictor
from tests.published import Published, read_published

pytestmark = pytest.mark.timeout(900)


def write_layout(rows: pa.Table, folder: Path) -> dict[str, int]:
    """300 rows as two parquet files in Hive partitions (several row groups each) and one CSV: rows by file."""
    hive = [folder / "region=north" / "a.parquet", folder / "region=s%2Fouth" / "b.pq"]
    for path, part, group in zip(hive, (rows.slice(0, 130), rows.slice(130, 90)), (40, 90), strict=True):
        path.parent.mkdir(parents=True)
        pq.write_table(part, path, row_group_size=group)
    csv = folder / "c.csv"
    rest = rows.slice(220, 80).to_pandas().astype(object)
    rest.where(rest.notna(), "").to_csv(csv, index=False)
    return {str(hive[0]): 130, str(hive[1]): 90, str(csv): 80}


@dataclass(frozen=True)
class ActorLines:
    """What a run's scoring actors said, from the workers' own logs: the driver's copy may be cut off at its end."""

    loaded: frozenset[str]
    final_rows: Mapping[str, int]

    @staticmethod
    def read(head: RayHead) -> "ActorLines":
        text = "".join(path.read_text(errors="replace") for path in head.logs.glob("worker-*.err"))
        final = re.findall(r"score actor=(\w+) provider=\S+ rows=(\d+) .*final=true", text)
        assert len({actor for actor, _ in final}) == len(final), "an actor says goodbye once"
        return ActorLines(
            frozenset(re.findall(r"score actor=(\w+) load_s=", text)), {actor: int(rows) for actor, rows in final}
        )

    def since(self, earlier: "ActorLines") -> "ActorLines":
        final = {actor: rows for actor, rows in self.final_rows.items() if actor not in earlier.final_rows}
        return ActorLines(self.loaded - earlier.loaded, final)


def wait_for_goodbyes(head: RayHead, earlier: ActorLines, rows: int) -> ActorLines:
    """The actors' lines once they stand still: actors end after the driver has published."""
    deadline = time.monotonic() + 120
    while True:
        lines = ActorLines.read(head).since(earlier)
        time.sleep(5)
        if ActorLines.read(head).since(earlier) == lines and sum(lines.final_rows.values()) == rows:
            return lines
        if time.monotonic() > deadline:
            return lines


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
def tabular_rows(zoo: Mapping[str, Predictor]) -> pa.Table:
    table = pq.read_table(zoo["ft_transformer"].rows).replace_schema_metadata(None).slice(0, 300)
    return table.append_column("row_id", pa.array([f"id-{i:03d}" for i in range(table.num_rows)]))


@pytest.fixture(scope="module")
def tabular_reference(
    zoo: Mapping[str, Predictor], tmp_path_factory: pytest.TempPathFactory, tabular_rows: pa.Table
) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("reference") / "rows.parquet"
    pq.write_table(tabular_rows, path)
    reference: pd.DataFrame = predictors.reference(zoo["ft_transformer"].path, path).to_pandas()
    return reference.assign(row_id=tabular_rows["row_id"].to_pylist()).set_index("row_id")


@pytest.mark.parametrize("actors", [1, 3])
def test_every_row_of_parquet_csv_and_hive_is_scored_once_and_like_the_reference(
    actors: int,
    ray_head: RayHead,
    score: ScoreCommand,
    zoo: Mapping[str, Predictor],
    tabular_rows: pa.Table,
    tabular_reference: pd.DataFrame,
    tmp_path: Path,
) -> None:
    files = write_layout(tabular_rows, tmp_path / "data")
    output = tmp_path / "out"
    arguments: list[Any] = ["--input", tmp_path / "data", "--predictor", zoo["ft_transformer"].path, "--output", output]
    # The zoo has a category that is called NA: in CSV it is a missing value unless told otherwise.
    settings = ["--set", f"resources.actors={actors}", "--set", "batch.rows=32", "--set", 'input.csv.null_values=[""]']
    before = ActorLines.read(ray_head)
    if actors == 1:
        settings += ["--set", f"engine.cache={tmp_path / 'cache'}"]  # empty: the run extracts the feature spec itself
    run = score(*arguments, *settings)
    assert run.code == 0, run.log
    published = read_published(output)
    assert_accounts(published, files)
    lines = wait_for_goodbyes(ray_head, before, rows=300)
    assert sum(lines.final_rows.values()) == 300, f"the actors' last lines count every row: {lines}"
    # Ray kills an actor that was not ready when the last row was scored: it may have loaded, and scored nothing.
    assert set(lines.final_rows) <= lines.loaded
    assert 1 <= len(lines.loaded) <= actors
    assert "provider=torch rows=" in run.log, "and it reaches the driver's log"
    if actors == 1:
        plans = list((tmp_path / "cache" / "engines" / "rtx").glob("*/engine.plan"))
        assert len(plans) == 1, "the engine for the cluster's L4 is built where the spec is extracted"
    assert published.manifest["images"] == {
        "decode": "auto",
        "mode": "exact",
        "resizes_on_gpu": False,
        "cpu_share": 0.0,
    }
    assert set(published.manifest["engine"]["decisions"]) == {"cpu"}
    decision = published.manifest["engine"]["decisions"]["cpu"]
    assert decision["provider"] == "torch"
    assert decision["reference"] == "predict_proba(realtime=True) in fp32"
    parity = decision["rungs"][0]["parity"]
    assert parity["rows"] >= 60
    assert parity["max_abs_diff"] <= 1e-5
    assert {rung["provider"]: rung["outcome"] for rung in decision["rungs"]} == {"torch": "used", "cpu": "skipped"}
    scores = published.scores.to_pandas().set_index("row_id")
    assert set(scores["region"].dropna()) == {"north", "s/outh"}
    for name in ("proba_0", "proba_1"):
        assert scores[name].dtype == np.float32
        assert np.abs(scores[name] - tabular_reference.loc[scores.index, name]).max() <= 1e-5
    assert (scores["prediction"] == tabular_reference.loc[scores.index, "prediction"]).all()

    again = score(*arguments, *settings)
    assert again.code == 0
    assert again.summary["was_published"] is True
    assert read_published(output).manifest == published.manifest, "the same command again does nothing"


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


def test_zero_scores_a_black_image_and_default_mode_the_neighbour_where_ours_quarantines(
    score: ScoreCommand, zoo: Mapping[str, Predictor], bad_photos: Path, tmp_path: Path
) -> None:
    zero = predictors.reference(zoo["image_only"].path, bad_photos, default_mode=True).to_pandas()
    assert zero.loc[7, "proba_1"] == pytest.approx(zero.loc[8, "proba_1"], abs=1e-6), (
        "both are scored as the black image"
    )
    skip = predictors.reference(zoo["skip_images"].path, bad_photos, default_mode=True).to_pandas()
    assert len(skip) == 40
    assert skip.loc[7, "proba_1"] == pytest.approx(skip.loc[9, "proba_1"], abs=1e-6), "row 7 has row 9's score"
    assert skip.loc[8, "proba_1"] == pytest.approx(skip.loc[9, "proba_1"], abs=1e-6), "row 8 has row 9's score"
    for name in ("image_only", "skip_images"):
        output = tmp_path / name
        arguments: list[Any] = ["--input", bad_photos, "--predictor", zoo[name].path, "--output", output]
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
        bad = {row["source_row"]: row for row in published.quarantine.to_pylist()}
        assert {row: (item["stage"], item["reason"]) for row, item in bad.items()} == {
            7: ("features", "image_undecodable"),
            8: ("features", "image_missing"),
        }
        assert "does-not-exist.jpg" in bad[8]["message"]


def test_a_run_without_rows_publishes_an_empty_part_with_the_full_schema(
    score: ScoreCommand, zoo: Mapping[str, Predictor], tabular_rows: pa.Table, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(tabular_rows.slice(0, 0), data / "empty.parquet")
    pacsv.write_csv(tabular_rows.slice(0, 0), data / "header-only.csv")
    run = score("--input", data, "--predictor", zoo["ft_transformer"].path, "--output", tmp_path / "out")
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
