"""Verification of a published run: every way in which its files can stop being what was published has a test that does it.

The runs are written here, file by file, and then broken; the last tests score and verify with a really trained predictor.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image
from typer.testing import CliRunner

from jobs.verify import app
from scoring.config import load_config, resolved_yaml
from scoring.predictor import hash_predictor
from scoring.recount import verify_files
from scoring.spec import FeatureSpec, ImageColumn, ImageModel, LabelScaler, NumericalColumn
from scoring.storage import remove_tree, write_bytes
from scoring.verify import find_run
from tests.conftest import REPOSITORY, Run
from tests.layouts import ScoredLayout

A, B, EMPTY = "/data/a.parquet", "/data/b.csv", "/data/empty.parquet"
# (source_file, rows) by shard index; b.csv is listed between the two of a.parquet's, whose rows it does not shift.
SHARDS = ((A, 40), (B, 30), (A, 30), (EMPTY, 0))
SHARD_0, SHARD_1, SHARD_2 = f"{A} shard 0", f"{B} shard 1", f"{A} shard 2"
LABELS = ("cat", "dog.1")
# Where each row is: rows of a.parquet, of b.csv. Part 0 mixes both shards of a.parquet, part 1 both files.
PART_0, PART_1, BAD = "scores/part-x-000000.parquet", "scores/part-x-000001.parquet", "quarantine/part-x-000001.parquet"
IDENTITIES = {
    PART_0: [(A, row) for row in range(50) if row != 5],
    PART_1: [(A, row) for row in range(50, 70)] + [(B, row) for row in range(29)],
    BAD: [(A, 5), (B, 29)],
}


def splitmix64(number: int) -> int:
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return number ^ (number >> 31)


def checksum(identities: list[tuple[str, int]]) -> str:
    """The contract's formula in Python's own integers."""
    total = sum(splitmix64(xxhash.xxh64_intdigest(name) + row) for name, row in identities)
    return f"{total % 2**64:016x}"


def part_table(path: str, identities: list[tuple[str, int]]) -> pa.Table:
    columns: dict[str, Any] = {
        # Kept columns with names that a careless reader takes for scores.
        "proba_of_rain": ["high"] * len(identities),
        "prediction.old": [None] * len(identities),
        "source_file": [name for name, _ in identities],
        "source_row": pa.array([row for _, row in identities], pa.int64()),
    }
    if path.startswith("quarantine/"):
        return pa.table(
            {**columns, "stage": "features", "reason": "image_missing", "message": "gone"} | _marks(identities)
        )
    dogs = np.array([(row % 10 + 0.5) / 10.5 for _, row in identities], dtype=np.float32)
    columns |= {"proba_cat": 1 - dogs, "proba_dog.1": dogs}
    return pa.table({**columns, "prediction": np.where(dogs > 0.5, LABELS[1], LABELS[0]).tolist()})


def _marks(identities: list[tuple[str, int]]) -> dict[str, list[str]]:
    stages, reasons = ("features", "read"), ("image_missing", "row_malformed")
    return {
        "stage": [stages[place % 2] for place in range(len(identities))],
        "reason": [reasons[place % 2] for place in range(len(identities))],
        "message": ["told"] * len(identities),
    }


@dataclass
class MadeRun:
    """A published run made by hand: change `manifest` or a part, then `save`."""

    output: Path
    run_id: str = "r1"
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.output / "runs" / self.run_id

    def table(self, path: str) -> pa.Table:
        return pq.read_table(self.folder / path, partitioning=None)

    def file(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = next(item for item in self.manifest["files"] if item["path"] == path)
        return entry

    def write_part(self, path: str, table: pa.Table, *, forge: bool) -> None:
        """Put a part; `forge` makes the manifest's line of it match."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, target)
        if forge:
            data = target.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            self.file(path).update(rows=table.num_rows, size_bytes=len(data), sha256=digest)

    def save(self) -> None:
        (self.folder / "manifest.json").write_text(json.dumps(self.manifest))


def publish(
    output: Path,
    run_id: str = "r1",
    shards: tuple[tuple[str, int], ...] = SHARDS,
    parts: Mapping[str, pa.Table] | None = None,
) -> MadeRun:
    """A run that nothing is wrong with; by default the one that most tests below start from."""
    if parts is None:
        parts = {path: part_table(path, identities) for path, identities in IDENTITIES.items()}
    run = MadeRun(output, run_id)
    bad = [table for path, table in parts.items() if path.startswith("quarantine/")]
    bad_rows = {identity for table in bad for identity in identities_of(table)}
    counts = Counter[str]()
    accounts: list[dict[str, Any]] = []
    for index, (name, rows) in enumerate(shards):
        held = [(name, counts[name] + row) for row in range(rows)]
        counts[name] += rows
        lost = len(bad_rows.intersection(held))
        account = {"source_file": name, "index": index, "rows_read": rows, "rows_scored": rows - lost}
        accounts.append({**account, "rows_quarantined": lost, "checksum": checksum(held), "state": "complete"})
    totals = {name: sum(item[name] for item in accounts) for name in ("rows_read", "rows_scored", "rows_quarantined")}
    run.manifest |= {
        "version": 1,
        "run_id": run_id,
        "fingerprint": {"digest": "0" * 64, "parts": {}},
        "predictor": {"path": "/models/pets", "sha256": "0" * 64},
        "files": [{"path": path, "attempt": "x", "engine": "torch fp32"} for path in parts],
        "shards": accounts,
        "totals": {**totals, "reasons": Counter(reason for table in bad for reason in table["reason"].to_pylist())},
        "timings": {},
    }
    for path, table in parts.items():
        run.write_part(path, table, forge=True)
    run.save()
    (run.folder / "config.yaml").write_text("")
    (run.folder / "_SUCCESS").touch()
    latest = {"run_id": run_id, "manifest": f"runs/{run_id}/manifest.json"}
    (output / "latest.json").write_text(json.dumps(latest))
    return run


def identities_of(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table["source_file"].to_pylist(), table["source_row"].to_pylist(), strict=True))


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    return publish(tmp_path / "out")


def verify(output: Path, *arguments: str, sample: int = 0) -> Run:
    """The command in this process: its last line on stdout, and all that it said."""
    done = CliRunner().invoke(app, ["--output", str(output), "--sample", str(sample), *arguments])
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["exit_code"] == done.exit_code
    return Run(done.exit_code, summary, done.output)


def assert_found(found: Run, *texts: str) -> None:
    """A difference was found, and its message has every text."""
    assert found.code == 3, found.log
    missing = [text for text in texts if text not in found.error]
    assert not missing, f"{missing} not in:\n{found.error}"


def set_cells(table: pa.Table, name: str, changes: Mapping[int, Any]) -> pa.Table:
    cells = table[name].to_pylist()
    for row, value in changes.items():
        cells[row] = value
    return table.set_column(table.column_names.index(name), table.schema.field(name), pa.array(cells, table[name].type))


# --- what is right


def test_a_sound_run_verifies_from_its_files_alone(run: MadeRun) -> None:
    found = verify(run.output)
    assert found.code == 0, found.log
    assert found.summary == {
        "exit_code": 0,
        "run_id": "r1",
        "output": str(run.folder),
        "parts": 3,
        "shards": 4,
        "rows_read": 100,
        "rows_scored": 98,
        "rows_quarantined": 2,
        "reasons": {"image_missing": 1, "row_malformed": 1},
        "checksum": checksum([identity for held in IDENTITIES.values() for identity in held]),
        "num_problems": 0,
        "problems": [],
    }
    for text in ("Verified", "100 = 98 scored + 2 bad", "--sample 0"):
        assert text in found.log


def test_a_run_without_rows_verifies(run: MadeRun) -> None:
    for path in (PART_1, BAD):
        (run.folder / path).unlink()
    run.manifest["files"] = run.manifest["files"][:1]
    run.write_part(PART_0, run.table(PART_0).slice(0, 0), forge=True)
    run.manifest["shards"] = run.manifest["shards"][3:]
    run.manifest["totals"] = {"rows_read": 0, "rows_scored": 0, "rows_quarantined": 0, "reasons": {}}
    run.save()
    assert verify(run.output).code == 0


def test_run_id_names_an_older_run(tmp_path: Path) -> None:
    older = publish(tmp_path, "older")
    publish(tmp_path, "newer")
    (older.folder / "_SUCCESS").unlink()
    assert verify(tmp_path).summary["run_id"] == "newer"
    assert_found(verify(tmp_path, "--run-id", "older"), "run older", "_SUCCESS")


def test_a_run_in_an_object_store_verifies_and_shows_no_secret(run: MadeRun) -> None:
    store = f"memory://key:secret@{run.output.parent.name}/out"
    for path in run.output.rglob("*"):
        if path.is_file():
            write_bytes(f"{store}/{path.relative_to(run.output)}", path.read_bytes())
    found = verify(Path("unused"), "--output", store)
    assert found.code == 0, found.log
    remove_tree(f"{store}/runs/r1/{PART_1}")
    found = verify(Path("unused"), "--output", store)
    assert_found(found, f"{PART_1}: is missing", f"{SHARD_1}: 29 of its rows in no part")
    assert "secret" not in found.log


def test_the_files_alone_need_neither_ray_nor_autogluon() -> None:
    heavy = ("ray", "torch", "autogluon", "onnxruntime", "transformers")
    program = f"import sys, jobs.verify; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- files


def test_a_deleted_part_is_named_with_the_rows_that_each_shard_lacks(run: MadeRun) -> None:
    (run.folder / PART_0).unlink()
    found = verify(run.output)
    assert_found(
        found,
        f"{PART_0}: is missing; the manifest lists it with 49 rows",
        f"{SHARD_0}: 39 of its rows in no part (rows 0 to 4, rows 6 to 39)",
        f"{SHARD_2}: 10 of its rows in no part (rows 40 to 49)",
        "totals.rows_scored is 98, the parts hold 49",
    )
    assert SHARD_1 not in found.error
    assert found.summary["rows_scored"] == 49


def test_a_part_copied_beside_itself_is_named_with_its_shards(run: MadeRun) -> None:
    shutil.copy(run.folder / PART_1, run.folder / "scores" / "copy.parquet")
    found = verify(run.output)
    assert_found(found, "scores/copy.parquet: is not in the manifest", f"49 rows, rows of {SHARD_2}, {SHARD_1}")
    assert found.summary["num_problems"] == 1


def test_a_part_listed_twice_counts_its_rows_twice(run: MadeRun) -> None:
    run.manifest["files"].append(run.file(BAD))
    run.save()
    assert_found(
        verify(run.output),
        f"{BAD}: is listed 2 times",
        f"{SHARD_0}: 1 of its rows twice (row 5 in {BAD} and again in {BAD})",
        f"{SHARD_1}: 1 of its rows twice (row 29 in",
        "totals.rows_quarantined is 2, the parts hold 4",
        "totals.reasons.image_missing is 1, the parts hold 2",
    )


def test_a_swapped_score_changes_the_sha256(run: MadeRun) -> None:
    table = run.table(PART_0)
    swapped = table["proba_cat"].to_pylist()[:2]
    for name, values in (("proba_cat", swapped[::-1]), ("proba_dog.1", [1 - value for value in swapped[::-1]])):
        table = set_cells(table, name, dict(enumerate(values)))
    run.write_part(PART_0, table, forge=False)
    assert_found(verify(run.output), PART_0, SHARD_0, f"the manifest says {run.file(PART_0)['sha256']}")


@pytest.mark.parametrize("is_checksum_forged", [False, True])
def test_a_lost_row_hidden_by_a_duplicate_is_found(run: MadeRun, is_checksum_forged: bool) -> None:
    run.write_part(PART_0, set_cells(run.table(PART_0), "source_row", {8: 44}), forge=True)
    if is_checksum_forged:
        for index, gone, more in ((0, 9, None), (2, None, 44)):
            first = 0 if index == 0 else 40
            rows = [row for row in range(first, first + SHARDS[index][1]) if row != gone]
            run.manifest["shards"][index]["checksum"] = checksum([(A, row) for row in [*rows, more] if row is not None])
        run.manifest["shards"][0]["rows_scored"] -= 1
        run.manifest["shards"][2]["rows_scored"] += 1
    run.save()
    found = verify(run.output)
    assert_found(
        found,
        f"{SHARD_0}: 1 of its rows in no part (row 9)",
        f"{SHARD_2}: 1 of its rows twice (row 44 in {PART_0} and again in {PART_0})",
    )
    assert ("identity checksum" in found.error) is not is_checksum_forged
    assert "totals" not in found.error, "the number of rows is as it was"


def test_rows_counted_in_two_parts_are_named_with_both(run: MadeRun) -> None:
    table = run.table(PART_1)
    rows = table["source_row"].to_pylist()
    run.write_part(PART_1, set_cells(table, "source_row", {0: 10, 1: 11, 2: 12, 3: rows[3]}), forge=True)
    run.save()
    assert_found(
        verify(run.output),
        f"{SHARD_0}: 3 of its rows twice (rows 10 to 12 in {PART_0} and again in {PART_1})",
        f"{SHARD_2}: 3 of its rows in no part (rows 50 to 52)",
    )


@pytest.mark.parametrize("path", ["scores/notes.txt", "quarantine/part-old.parquet"])
def test_a_stray_file_among_the_parts_is_named(run: MadeRun, path: str) -> None:
    (run.folder / path).write_text("not a part")
    assert_found(verify(run.output), f"{path}: is not in the manifest", "it is no readable part")


def test_a_truncated_part_is_no_readable_part(run: MadeRun) -> None:
    path = run.folder / PART_1
    path.write_bytes(path.read_bytes()[:-40])
    assert_found(verify(run.output), f"{PART_1}: has ", "is no readable part", f"{SHARD_1}: 29 of its rows in no part")


def test_a_missing_success_marker_is_named(run: MadeRun) -> None:
    (run.folder / "_SUCCESS").unlink()
    found = verify(run.output)
    assert_found(found, "_SUCCESS: is missing")
    assert found.summary["num_problems"] == 1


# --- accounts


@pytest.mark.parametrize("name", ["rows_read", "rows_scored", "rows_quarantined"])
def test_a_wrong_total_is_named(run: MadeRun, name: str) -> None:
    run.manifest["totals"][name] += 1
    run.save()
    said = run.manifest["totals"][name]
    found = verify(run.output)
    assert_found(found, f"totals.{name} is {said},", f" {said - 1}\n")
    assert found.summary["num_problems"] == 1


def test_a_wrong_count_of_reasons_is_named(run: MadeRun) -> None:
    run.manifest["totals"]["reasons"] = {"image_missing": 2}
    run.save()
    assert_found(verify(run.output), "totals.reasons.image_missing is 2, the parts hold 1", "row_malformed is 0,")


def test_shard_accounts_that_only_add_up_for_the_run_are_named(run: MadeRun) -> None:
    run.manifest["shards"][0]["rows_scored"] += 1
    run.manifest["shards"][1]["rows_scored"] -= 1
    run.manifest["shards"][2]["state"] = "incomplete"
    run.save()
    assert_found(
        verify(run.output),
        f"{SHARD_0}: 39 rows in scores, the manifest says 40; 40 rows read are not 40 scored + 1 quarantined",
        f"{SHARD_1}: 29 rows in scores, the manifest says 28",
        f"{SHARD_2}: its state is 'incomplete'",
    )


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"source_file": "/data/z.parquet"}, ["row 0 of /data/z.parquet, a file that the manifest does not have"]),
        ({"source_row": 70}, [f"row 70 of {A}, which has 70 rows"]),
        ({"source_row": -1}, [f"row -1 of {A}, which has 70 rows"]),
    ],
)
def test_a_row_of_nowhere_is_named(run: MadeRun, changes: dict[str, Any], texts: list[str]) -> None:
    table = run.table(PART_0)
    for name, value in changes.items():
        table = set_cells(table, name, {0: value})
    run.write_part(PART_0, table, forge=True)
    run.save()
    assert_found(verify(run.output), PART_0, f"{SHARD_0}: 1 of its rows in no part (row 0)", *texts)


# --- values


@pytest.mark.parametrize(
    ("path", "changes", "what"),
    [
        (PART_0, {"proba_cat": float("nan")}, "a probability that is not finite"),
        (PART_0, {"proba_cat": None}, "a probability that is not finite"),
        (PART_0, {"proba_cat": 1.2, "proba_dog.1": -0.2, "prediction": "cat"}, "a probability outside [0, 1]"),
        (PART_0, {"proba_cat": 0.7, "proba_dog.1": 0.29, "prediction": "cat"}, "do not sum to 1 within 0.001"),
        (PART_0, {"prediction": None}, "no prediction"),
        (PART_0, {"proba_cat": 0.25, "proba_dog.1": 0.75, "prediction": "cat"}, "not the class of the highest"),
        (PART_0, {"prediction": "horse"}, "not the class of the highest"),
        (BAD, {"stage": "lunch"}, "the stage 'lunch', which no stage is"),
        (BAD, {"reason": None}, "the reason None, which no reason is"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_row(
    run: MadeRun, path: str, changes: dict[str, Any], what: str
) -> None:
    table = run.table(path)
    place = 1 if path == BAD else 45
    for name, value in changes.items():
        table = set_cells(table, name, {place: value})
    run.write_part(path, table, forge=True)
    run.save()
    shard, row = (SHARD_1, 29) if path == BAD else (SHARD_2, 46)
    assert_found(verify(run.output), f"{path} (rows of ", "1 of its rows with", what, f"(first: row {row} of {shard})")


def test_regressions_must_be_finite(run: MadeRun) -> None:
    for path in (PART_0, PART_1):
        table = run.table(path)
        prices = np.linspace(0, 1, table.num_rows, dtype=np.float32)
        prices[3] = np.inf if path == PART_0 else 0.5
        bare = table.drop_columns(["proba_cat", "proba_dog.1", "prediction"])
        run.write_part(path, bare.append_column("prediction", pa.array(prices)), forge=True)
    run.save()
    found = verify(run.output)
    assert_found(found, PART_0, f"1 of its rows with a prediction that is not finite (first: row 3 of {SHARD_0})")
    assert found.summary["num_problems"] == 1


def test_parts_of_other_classes_do_not_mix(run: MadeRun) -> None:
    table = run.table(PART_1)
    names = ["proba_horse" if name == "proba_cat" else name for name in table.column_names]
    run.write_part(PART_1, table.rename_columns(names), forge=True)
    run.save()
    assert_found(verify(run.output), f"{PART_1} (rows of {SHARD_2}, {SHARD_1})", "proba_horse", "other parts have")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda table: table.drop_columns(["source_row"]), "it has no column source_row"),
        (
            lambda table: table.set_column(3, "source_row", pc.cast(table["source_row"], pa.float64())),
            "source_row is double",
        ),
        (lambda table: set_cells(table, "source_file", {0: None}), "rows without source_file"),
        (lambda table: table.drop_columns(["prediction"]), "must be proba_<class> columns and prediction"),
    ],
)
def test_parts_without_the_promised_columns_are_named(
    run: MadeRun, change: Callable[[pa.Table], pa.Table], what: str
) -> None:
    run.write_part(PART_0, change(run.table(PART_0)), forge=True)
    run.save()
    assert_found(verify(run.output), f"{PART_0}: is no readable part", what, SHARD_0, SHARD_2)


# --- which run, and how it is told


def test_a_run_that_is_not_there_is_a_usage_error(run: MadeRun, tmp_path: Path) -> None:
    other = verify(run.output, "--run-id", "r2")
    assert other.code == 2
    for text in (str(run.output), "no run r2", "its runs: r1"):
        assert text in other.error
    nothing = verify(tmp_path / "elsewhere")
    assert nothing.code == 2
    assert f"{tmp_path / 'elsewhere'} has no latest.json" in nothing.error
    assert verify(run.output, "--run-id", "../runs/r1").code == 2


@pytest.mark.parametrize(
    "latest", ['{"run_id": "gone", "manifest": "runs/gone/manifest.json"}', "{}", "[", '{"run_id": "r1"}']
)
def test_a_latest_json_that_leads_nowhere_is_a_difference(run: MadeRun, latest: str) -> None:
    (run.output / "latest.json").write_text(latest)
    assert_found(verify(run.output), "latest.json")
    assert verify(run.output, "--run-id", "r1").code == 0


def test_without_a_manifest_there_is_nothing_to_go_by(run: MadeRun) -> None:
    run.manifest["version"] = 2
    run.save()
    assert_found(verify(run.output), "manifest.json: version 2, this code reads 1")
    del run.manifest["shards"][1]["checksum"]
    run.save()
    assert_found(verify(run.output), "manifest.json: shards.1.checksum: Field required")
    (run.folder / "manifest.json").unlink()
    assert_found(verify(run.output), "manifest.json: is missing (there is a _SUCCESS)")


def test_many_differences_are_capped_and_counted(run: MadeRun) -> None:
    shutil.rmtree(run.folder / "scores")
    run.manifest["shards"] = [
        {**run.manifest["shards"][0], "source_file": f"/data/{index}.parquet", "index": index} for index in range(50)
    ]
    run.manifest["totals"]["rows_read"] = 2000
    run.save()
    found = verify(run.output)
    # Three parts, fifty shards, one total.
    assert_found(found, "54 differences", "... and 34 more", "/data/0.parquet shard 0: 40 of its rows in no part")
    assert len(found.error.splitlines()) == 23
    assert (found.summary["num_problems"], len(found.summary["problems"])) == (54, 20)


# --- rescoring: what is refused before AutoGluon is imported


def rescorable(run: MadeRun, folder: Path, *overrides: str) -> None:
    """Give the run a configuration whose inputs are the files of `folder`, their fingerprint, and a predictor's folder."""
    predictor = folder / "predictor"
    predictor.mkdir()
    (predictor / "assets.json").write_text("{}")
    flags = {"input.paths": [str(folder / "data")], "predictor.path": str(predictor), "output.path": str(run.output)}
    config = load_config(file=None, flags=flags, overrides=overrides, cwd=folder)
    (run.folder / "config.yaml").write_text(resolved_yaml(config))
    inputs = {path: path.stat() for path in (folder / "data").iterdir()}
    run.manifest["fingerprint"]["parts"] = {
        f"input file {path}": f"{status.st_size} bytes, {status.st_mtime_ns}" for path, status in inputs.items()
    }
    run.manifest["predictor"] = {"path": str(predictor), "sha256": hash_predictor(predictor)}
    run.save()


def with_inputs(run: MadeRun, folder: Path) -> Path:
    """Make the run rescorable from one input file, which is returned."""
    rows = folder / "data" / "rows.parquet"
    rows.parent.mkdir()
    pq.write_table(pa.table({"x": [1.0, 2.0]}), rows)
    rescorable(run, folder)
    return rows


def test_changed_inputs_are_an_error_that_says_so(run: MadeRun, tmp_path: Path) -> None:
    rows = with_inputs(run, tmp_path)
    before = rows.stat().st_size
    pq.write_table(pa.table({"x": [1.0, 2.0, 3.0] * 100}), rows)
    found = verify(run.output, sample=5)
    assert_found(found, "1 input files changed since", f"input file {rows}: was {before} bytes", "--sample 0")
    assert found.summary["rows_scored"] == 98, "the files themselves were verified"
    pq.write_table(pa.table({"x": [1.0]}), rows.with_name("later.parquet"))
    rows.unlink()
    assert_found(verify(run.output, sample=5), f"input file {rows}: was {before} bytes", "now gone")
    rows.with_name("later.parquet").unlink()
    assert_found(verify(run.output, sample=5), "matches no file", "--sample 0")


def test_another_predictor_is_refused_before_anything_is_unpickled(run: MadeRun, tmp_path: Path) -> None:
    with_inputs(run, tmp_path)
    assert "autogluon" not in sys.modules
    pinned = run.manifest["predictor"]["sha256"]
    (tmp_path / "predictor" / "model.ckpt").write_bytes(b"planted")
    found = verify(run.output, sample=5)
    assert found.code == 2, found.log
    for text in (pinned, hash_predictor(tmp_path / "predictor"), "nothing was unpickled", "--sample 0"):
        assert text in found.error
    assert "autogluon" not in sys.modules


def test_a_configuration_that_cannot_be_read_is_named(run: MadeRun) -> None:
    (run.folder / "config.yaml").write_text("input: {paths: [a], typo: 1}\n")
    assert_found(verify(run.output, sample=5), f"{run.folder}/config.yaml", "input.typo")
    (run.folder / "config.yaml").unlink()
    assert_found(verify(run.output), "config.yaml: is missing")


# --- rescoring against a predictor that answers by a formula

SPEC = FeatureSpec(
    label="y",
    problem_type="binary",
    class_labels=("a", "b"),
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
UNIT = 10.0
REGRESSION = replace(SPEC, problem_type="regression", class_labels=(), label_scaler=LabelScaler("standard", UNIT, None))
WITH_PHOTO = replace(
    SPEC,
    image=(ImageColumn("photo", "image_path"),),
    image_models=(ImageModel("timm_image", 8, (0.0,) * 3, (1.0,) * 3, ("resize_to_square",), 1),),
)


@dataclass
class FakeUpstream:
    """AutoGluon for these tests: class b has the probability x; a regression predicts 100 x, its unit is 10."""

    refuses: float | None = None
    calls: list[int] = field(default_factory=list)

    def scores(self, predictor: Any, spec: FeatureSpec, raw: pa.Table) -> npt.NDArray[np.float32]:
        x: npt.NDArray[np.float32] = raw["x"].to_numpy().astype(np.float32)
        self.calls.append(len(x))
        if self.refuses is not None and np.isclose(x, self.refuses).any():
            raise ValueError("one bad cell")
        if spec.is_regression:
            return (100 * x / np.float32(UNIT)).reshape(-1, 1)
        scores: npt.NDArray[np.float32] = np.column_stack([1 - x, x])
        return scores


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> FakeUpstream:
    fake = FakeUpstream()
    monkeypatch.setattr("scoring.rescore.load_predictor", lambda folder: None)
    monkeypatch.setattr("scoring.rescore.extract_spec", lambda predictor: SPEC)
    monkeypatch.setattr("scoring.reference.upstream_scores", fake.scores)
    return fake


def scores_part(name: str, x: Mapping[int, float], spec: FeatureSpec = SPEC) -> pa.Table:
    """The scores that `FakeUpstream` gives rows of one file, by row."""
    values = np.array(list(x.values()), dtype=np.float32)
    columns: dict[str, Any] = {"source_file": [name] * len(x), "source_row": pa.array(list(x), pa.int64())}
    if spec.is_regression:
        return pa.table({**columns, "prediction": 100 * values})
    columns |= {"proba_a": 1 - values, "proba_b": values}
    return pa.table({**columns, "prediction": np.where(values > 0.5, "b", "a").tolist()})


def quarantine_part(name: str, row: int) -> pa.Table:
    marks = {"stage": ["read"], "reason": ["row_malformed"], "message": ["two cells"]}
    return pa.table({"source_file": [name], "source_row": pa.array([row], pa.int64()), **marks})


def publish_input(folder: Path, spec: FeatureSpec = SPEC, *overrides: str) -> tuple[MadeRun, str]:
    """Twelve rows of one parquet file in three row groups, published with the right scores."""
    (folder / "data").mkdir()
    source = str(folder / "data" / "rows.parquet")
    x = {row: 0.05 + 0.07 * row for row in range(12)}
    pq.write_table(pa.table({"x": list(x.values())}), source, row_group_size=4)
    parts = {PART_0: scores_part(source, x, spec)}
    run = publish(folder / "out", shards=((source, 8), (source, 4)), parts=parts)
    rescorable(run, folder, *overrides)
    return run, source


def forge(run: MadeRun, changes: Mapping[str, Any], place: int) -> None:
    table = run.table(PART_0)
    for name, value in changes.items():
        table = set_cells(table, name, {place: value})
    run.write_part(PART_0, table, forge=True)
    run.save()


def test_rows_of_a_csv_are_read_back_by_their_numbers(tmp_path: Path, upstream: FakeUpstream) -> None:
    source = tmp_path / "data" / "rows.csv"
    source.parent.mkdir()
    # Record 1 has a cell too few, records 0 and 3 a line end and a delimiter in quotes.
    source.write_text('note,x\n"a\nb",0.1\nalone\n\nc,0.3\n"d,e",0.9\nf,0.5001\n')
    scored = {0: 0.1, 2: 0.3, 3: 0.9, 4: 0.5001}
    parts = {PART_0: scores_part(str(source), scored), BAD: quarantine_part(str(source), 1)}
    run = publish(tmp_path / "out", shards=((str(source), 5),), parts=parts)
    rescorable(run, tmp_path)
    found = verify(run.output, sample=200)
    assert found.code == 0, found.log
    assert found.summary["rows_rescored"] == 4
    assert found.summary["max_abs_diff"] < 1e-6
    assert "4 rows, largest difference" in found.log
    forge(run, {"proba_a": 0.3, "proba_b": 0.7}, place=2)
    found = verify(run.output, sample=200)
    assert_found(found, f"{PART_0}: row 3 of {source} has proba_", "difference 0.2, limit 0.005")
    assert found.summary["num_problems"] == 1


def draw(run: MadeRun, rows: int) -> pa.Table:
    sampled = verify_files(find_run(str(run.output), None), rows).sampled
    assert sampled is not None
    return sampled


def test_a_sample_is_drawn_over_all_parts_and_is_the_same_again(tmp_path: Path, upstream: FakeUpstream) -> None:
    run, _ = publish_input(tmp_path)
    table = run.table(PART_0)
    run.manifest["files"].append({**run.file(PART_0), "path": PART_1})
    run.write_part(PART_0, table.slice(0, 7), forge=True)
    run.write_part(PART_1, table.slice(7), forge=True)
    run.save()
    drawn = draw(run, 5)
    assert drawn.equals(draw(run, 5))
    assert drawn.num_rows == len(set(identities_of(drawn))) == 5
    assert draw(run, 100)["source_row"].to_pylist() == list(range(12))
    assert verify(run.output, sample=5).summary["rows_rescored"] == 5


def test_files_that_came_since_are_left_alone(tmp_path: Path, upstream: FakeUpstream) -> None:
    run, source = publish_input(tmp_path)
    pq.write_table(pa.table({"other": [1]}), Path(source).with_name("later.parquet"))
    assert verify(run.output, sample=12).code == 0


@pytest.mark.parametrize(("off", "code"), [(0.04, 0), (0.06, 3)])
def test_regressions_are_compared_in_standard_deviations(
    tmp_path: Path, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, off: float, code: int
) -> None:
    monkeypatch.setattr("scoring.rescore.extract_spec", lambda predictor: REGRESSION)
    run, source = publish_input(tmp_path, REGRESSION)
    forge(run, {"prediction": run.table(PART_0)["prediction"][9].as_py() + off}, place=9)
    found = verify(run.output, sample=12)
    assert found.code == code, found.log
    if code:
        assert_found(found, f"row 9 of {source} has prediction 6.806, AutoGluon gives 6.8 in standard deviations")


@pytest.mark.parametrize(("reference", "is_flip"), [(0.494, True), (0.496, False)])
def test_a_label_flip_counts_where_the_reference_is_sure(
    tmp_path: Path, upstream: FakeUpstream, reference: float, is_flip: bool
) -> None:
    run, source = publish_input(tmp_path, SPEC, "parity.max_abs_diff=0.02")
    x = [reference if row == 3 else 0.05 + 0.07 * row for row in range(12)]
    pq.write_table(pa.table({"x": x}), source, row_group_size=4)
    shutil.rmtree(tmp_path / "predictor")
    rescorable(run, tmp_path, "parity.max_abs_diff=0.02")
    forge(run, {"proba_a": 0.494, "proba_b": 0.506, "prediction": "b"}, place=3)
    found = verify(run.output, sample=12)
    assert found.code == (3 if is_flip else 0), found.log
    if is_flip:
        assert_found(found, f"row 3 of {source} has proba_", "limit 0.02); the label is another one")


def test_a_row_that_upstream_refuses_is_named_and_the_others_are_compared(
    tmp_path: Path, upstream: FakeUpstream
) -> None:
    run, source = publish_input(tmp_path)
    upstream.refuses = 0.05 + 0.07 * 6
    found = verify(run.output, sample=12)
    assert_found(found, f"{PART_0}: row 6 of {source} has scores, but AutoGluon's own call refuses it: ValueError")
    assert found.summary["num_problems"] == 1
    assert found.summary["rows_rescored"] == 11
    assert upstream.calls == [12, *[1] * 12]


def test_a_row_whose_image_is_gone_is_named(
    tmp_path: Path, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scoring.rescore.extract_spec", lambda predictor: WITH_PHOTO)
    photos = [tmp_path / "0.png", tmp_path / "1.png"]
    for path in photos:
        Image.new("RGB", (8, 8)).save(path)
    source = str(tmp_path / "data" / "rows.parquet")
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"x": [0.1, 0.9], "photo": list(map(str, photos))}), source)
    run = publish(tmp_path / "out", shards=((source, 2),), parts={PART_0: scores_part(source, {0: 0.1, 1: 0.9})})
    rescorable(run, tmp_path)
    assert verify(run.output, sample=2).code == 0
    photos[1].unlink()
    found = verify(run.output, sample=2)
    assert_found(found, f"row 1 of {source} has scores, but it reads as image_missing now: {photos[1]}")
    assert (found.summary["num_problems"], found.summary["rows_rescored"]) == (1, 1)


def test_a_predictor_of_other_classes_is_named(
    tmp_path: Path, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scoring.rescore.extract_spec", lambda predictor: replace(SPEC, class_labels=("a", "c")))
    run, _ = publish_input(tmp_path)
    assert_found(verify(run.output, sample=2), "'proba_b'", "'proba_c'")


# --- rescoring, end to end

# Both in one process: importing AutoGluon takes as long as everything else here.
_VERIFY_ALL = """
import sys
from jobs.verify import app
for output in sys.argv[2:]:
    print("exit", app(["--output", output, "--sample", sys.argv[1]], standalone_mode=False), flush=True)
"""


@pytest.mark.timeout(900)
def test_rescoring_passes_a_sound_run_and_names_a_forged_score(scored_layout: ScoredLayout, tmp_path: Path) -> None:
    sound, forged = scored_layout.output, tmp_path / "forged"
    shutil.copytree(sound, forged)
    run_id = json.loads((sound / "latest.json").read_text())["run_id"]
    run = MadeRun(forged, run_id, json.loads((forged / "runs" / run_id / "manifest.json").read_text()))
    path = next(file["path"] for file in run.manifest["files"] if file["path"].startswith("scores/") and file["rows"])
    table = run.table(path)
    csv_row = table["source_file"].to_pylist().index(str(scored_layout.data / "c.csv"))
    moved = 0.2 if table["proba_1"][csv_row].as_py() < 0.5 else -0.2
    changed = table["proba_1"][csv_row].as_py() + moved
    cells = {"proba_1": changed, "proba_0": 1 - changed, "prediction": int(changed > 0.5)}
    for name, value in cells.items():
        table = set_cells(table, name, {csv_row: value})
    run.write_part(path, table, forge=True)
    run.save()

    command = [sys.executable, "-c", _VERIFY_ALL, "300", str(sound), str(forged)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    documents = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [document["exit_code"] for document in documents] == [0, 3], done.stdout + done.stderr
    passed, failed = documents
    assert passed["rows_rescored"] == 300
    assert passed["max_abs_diff"] < 1e-5
    assert failed["num_problems"] == 1
    row = table["source_row"][csv_row].as_py()
    assert failed["problems"][0].startswith(f"{path}: row {row} of {scored_layout.data / 'c.csv'} has proba_")
    assert "difference 0.2, limit 0.005" in failed["problems"][0]
