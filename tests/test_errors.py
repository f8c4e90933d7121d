"""Every way a command is refused before a row is read: its exit code and its message (issue 2, must show 5)."""

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Run, ScoreCommand
from tests.predictors import Predictor

pytestmark = pytest.mark.timeout(600)


class Job:
    """A command that would run, for tests to spoil: rows of the tabular predictor in `data`."""

    def __init__(self, score: ScoreCommand, predictor: Path, rows: pa.Table, folder: Path) -> None:
        self.score = score
        self.predictor = predictor
        self.rows = rows
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir()

    def write(self, name: str, table: pa.Table | None = None) -> Path:
        path = self.data / name
        pq.write_table(self.rows if table is None else table, path)
        return path

    def run(self, *more: object, inputs: tuple[object, ...] | None = None) -> Run:
        flags = [flag for item in (inputs or (self.data,)) for flag in ("--input", item)]
        run = self.score(*flags, "--predictor", self.predictor, "--output", self.folder / "out", *more)
        assert not (self.folder / "out").exists(), "a refused command writes nothing"
        assert run.summary["exit_code"] == run.code
        print(f"exit {run.code}: {run.error}")
        return run


@pytest.fixture(scope="session")
def tabular(zoo: Mapping[str, Predictor], score: ScoreCommand, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """The tabular predictor, its feature spec extracted: what follows needs no Ray."""
    predictor = zoo["ft_transformer"]
    out = tmp_path_factory.mktemp("dry") / "out"
    dry = score("--input", predictor.rows, "--predictor", predictor.path, "--output", out, "--dry-run")
    assert dry.code == 0, dry.log
    return predictor


@pytest.fixture
def job(tabular: Predictor, score_without_ray: ScoreCommand, tmp_path: Path) -> Job:
    rows = pq.read_table(tabular.rows).replace_schema_metadata(None).slice(0, 20)
    return Job(score_without_ray, tabular.path, rows, tmp_path)


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        (["--set", "batch.row=5"], ["batch.row: unknown key", "'batch.rows'"]),
        (["--set", "images.max_fraction=1"], ["images.max_fraction: unknown key", "'quarantine.max_fraction'"]),
        (["--set", "batch.rows=many"], ["batch.rows", "'many'"]),
        (["--set", "output.path=/elsewhere"], ["output.path", "/elsewhere"]),
        (["--set", "run.incremental=true"], ["run.incremental: true is not built yet"]),
        (["--set", "engine.provider=cpu", "--set", "engine.precision=fp16"], ["fp16 contradicts engine.provider=cpu"]),
        (["--set", "input.keep=[nowhere]"], ["input.keep: nowhere in no input file"]),
        (["--set", "predictor.sha256=" + "0" * 64], ["predictor.sha256", "0" * 64, "nothing was unpickled"]),
    ],
)
def test_bad_configuration_exits_2_naming_the_key(job: Job, settings: list[str], texts: list[str]) -> None:
    job.write("rows.parquet")
    run = job.run(*settings)
    assert run.code == 2
    for text in texts:
        assert text in run.error


def test_a_kept_column_named_like_an_output_column_exits_2(job: Job) -> None:
    job.write("rows.parquet", job.rows.append_column("proba_0", pa.array([0.0] * 20)))
    run = job.run()
    assert run.code == 2
    assert "input.keep: proba_0 would collide" in run.error


def test_output_that_cannot_be_written_exits_2(tabular: Predictor, score: ScoreCommand, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    run = score("--input", tabular.rows, "--predictor", tabular.path, "--output", tmp_path / "file" / "out")
    assert run.code == 2
    assert "output.path: cannot write to" in run.error


def test_another_predictor_than_the_pinned_one_is_refused_before_a_pickle_is_opened(job: Job) -> None:
    job.write("rows.parquet")
    trap = job.folder / "opened"

    class Poison:
        def __reduce__(self) -> Any:
            return (Path.touch, (trap,))

    poisoned = job.folder / "poisoned"
    shutil.copytree(job.predictor, poisoned)
    (poisoned / "df_preprocessor.pkl").write_bytes(pickle.dumps(Poison()))
    pickle.loads((poisoned / "df_preprocessor.pkl").read_bytes())
    assert trap.exists(), "the trap works"
    trap.unlink()
    job.predictor = poisoned
    run = job.run("--set", "predictor.sha256=" + "a" * 64)
    assert run.code == 2
    assert not trap.exists()


@pytest.mark.parametrize(
    ("learner", "problem"),
    [
        ("NERLearner", "ner"),
        ("ObjectDetectionLearner", "object_detection"),
        ("SemanticSegmentationLearner", "semantic_segmentation"),
        ("MatchingLearner", "text_similarity"),
        ("FewShotSVMLearner", "few_shot_classification"),
    ],
)
def test_what_cannot_be_scored_row_by_row_is_refused_by_name(job: Job, learner: str, problem: str) -> None:
    job.write("rows.parquet")
    other = job.folder / "predictor"
    shutil.copytree(job.predictor, other)
    assets = json.loads((other / "assets.json").read_text())
    (other / "assets.json").write_text(json.dumps({**assets, "learner_class": learner, "problem_type": problem}))
    job.predictor = other
    run = job.run()
    assert run.code == 2
    assert problem in run.error
    assert learner in run.error


def test_a_folder_that_is_no_predictor_exits_2(job: Job) -> None:
    job.write("rows.parquet")
    job.predictor = job.folder / "nothing"
    run = job.run()
    assert run.code == 2
    assert "assets.json" in run.error


def test_inputs_that_match_nothing_exit_3_all_of_them_named(job: Job) -> None:
    (job.data / "notes.txt").write_text("no rows")
    missing = (job.folder / "nowhere", job.folder / "*.parquet", job.data)
    run = job.run(inputs=missing)
    assert run.code == 3
    assert all(f"input {path}: " in run.error for path in missing)


def test_files_that_cannot_be_read_exit_3_all_of_them_named(job: Job) -> None:
    whole = job.write("a.parquet").read_bytes()
    bad = {
        "truncated.parquet": whole[: len(whole) // 2],
        "zero.parquet": b"",
        "magic.pq": b"no parquet at all, only text",
        "empty.csv": b"",
    }
    for name, data in bad.items():
        (job.data / name).write_bytes(data)
    run = job.run()
    assert run.code == 3
    assert "4 of 5 input files cannot be read" in run.error
    assert all(str(job.data / name) in run.error for name in bad)


def test_missing_columns_exit_3_and_are_never_taken_by_position(job: Job) -> None:
    """Upstream renames columns by position where the count matches, with a warning, and scores nonsense."""
    names = job.rows.column_names
    renamed = job.rows.rename_columns([f"{name}_" if name in ("age", "breed") else name for name in names])
    bad = [job.write("b.parquet", renamed), job.write("c.parquet", job.rows.drop_columns(["fee"]))]
    job.write("a.parquet")
    run = job.run()
    assert run.code == 3
    lines = {line.partition(": ")[0]: line for line in run.error.splitlines()}
    assert set(lines) == {str(path) for path in bad}
    assert "'age'" in lines[str(bad[0])]
    assert "'breed'" in lines[str(bad[0])]
    assert "'fee'" in lines[str(bad[1])]


def test_files_whose_model_columns_have_an_unfit_type_exit_3_all_of_them_named(job: Job) -> None:
    index = job.rows.column_names.index("species")
    as_text = job.rows.set_column(index, "species", job.rows["species"].cast(pa.string()))
    bad = [job.write("b.parquet", as_text), job.write("c.parquet", as_text)]
    job.write("a.parquet")
    run = job.run()
    assert run.code == 3
    assert all(f"{path}: column 'species' is string" in run.error for path in bad)
