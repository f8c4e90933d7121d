"""A run on the ledger alone: real shards, reads, parts, receipts and commit, no Ray and no model; to be killed in the middle.

The score is a formula of the row. `run_once` is what `jobs.score` does between `prepare` and its last line, with the pipeline
replaced by a loop in this process. Imported by tests and by the processes they start.
"""

import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scoring import run as runs
from scoring.columns import SOURCE_ROW, mark_rows
from scoring.config import fingerprint, load_config
from scoring.decoding import DecodePlan
from scoring.errors import Reason, ScoringError, Stage
from scoring.ledger import AttemptFolder, RunFolder
from scoring.parts import PartSchemas, reserved_names, write_task
from scoring.pipeline import Plan, Timings
from scoring.retry import retry_fingerprint
from scoring.shards import inspect_all, list_inputs, plan_inputs
from scoring.sizing import size_flow, size_pools
from scoring.source import read_shards
from scoring.spec import FeatureSpec, NumericalColumn
from scoring.steps import KILL_AT

RUN_ID = "named"
TASK_ROWS = 70
# While this file lies in the working folder, every 50th row but one fails in the scorer.
FAULTY = "faulty"
LEASE_S = 2.0
DEFAULTS = ("quarantine.max_fraction=0.5", "input.keep=[]")
SPEC = FeatureSpec(
    "y", "binary", (0, 1), (NumericalColumn("x", 0.0, 1.0, 0.0),), (), (), (), ("numerical_mlp",), (), (), (), False
)


def write_inputs(folder: Path) -> int:
    """Two parquet files of several row groups and one CSV; returns their rows. Every 50th row is a bad one."""
    folder.mkdir(parents=True)
    rows = 0
    for name, count in (("a.parquet", 230), ("b.parquet", 150), ("c.csv", 120)):
        table = pa.table({"x": [str(row) if row % 50 else "no number" for row in range(count)]})
        if name.endswith(".csv"):
            table.to_pandas().to_csv(folder / name, index=False)
        else:
            pq.write_table(table, folder / name, row_group_size=60)
        rows += count
    return rows


def score_of(rows: Any) -> Any:
    """The closed form: float32 in [0, 1), from the row's number alone."""
    return ((rows * 2654435761 % 2**32) / 2**32).astype(np.float32)


def make_plan(work: Path, retry_of: str | None = None, settings: Sequence[str] = ()) -> Plan:
    """The plan for `work/data`, published below `work/out`."""
    flags = {"input.paths": [str(work / "data")], "predictor.path": "/p", "output.path": str(work / "out")}
    defaults = [default for default in DEFAULTS if default.partition("=")[0] not in "".join(settings)]
    config = load_config(file=None, flags=flags, overrides=[*defaults, *settings], cwd=Path("/"))
    listing = list_inputs(config.input)
    files, bad_files = inspect_all(listing, config.input)
    inputs = plan_inputs(files, SPEC, config.input, reserved_names(SPEC))
    mark = fingerprint(config, predictor_hash="abc", listing=listing, scores_version=1)
    pools = size_pools(config, [{"CPU": 2.0}])
    flow = size_flow(config, SPEC, pools, DecodePlan(), inputs.estimated_rows)
    old = RunFolder(str(work / "out"), retry_of) if retry_of else None
    if old is not None:
        mark = retry_fingerprint(mark, old)
    folder = RunFolder(str(work / "out"), f"{retry_of}-again" if retry_of else RUN_ID, LEASE_S)
    rows = inputs.estimated_rows if inputs.has_exact_rows else None
    return Plan(config, Path("/p"), "abc", SPEC, inputs, mark, folder, pools, DecodePlan(), flow, rows, bad_files, old)


def score_here(plan: Plan, attempt: AttemptFolder, diary: Path) -> dict[str, float]:
    """In the pipeline's place: read what is left, score it and write it, one task after another."""
    schemas = PartSchemas(plan.inputs.schema, plan.spec)
    csv = plan.config.input.csv
    blocks = [
        block
        for shard in plan.inputs.shards
        for block in read_shards([shard], plan.inputs.schema, csv, attempt, block_rows=40, done=plan.done)
    ]
    table = pa.concat_tables(blocks).combine_chunks()
    # Tasks mix shards, and take rows in no order.
    order = np.random.default_rng(table.num_rows).permutation(table.num_rows)
    for task, start in enumerate(range(0, table.num_rows, TASK_ROWS)):
        rows = table.take(pa.array(order[start : start + TASK_ROWS]))
        with diary.open("a") as file:  # before it is written: what is in flight when the process dies
            file.write(f"{rows.num_rows}\n")
        scores = score_of(rows[SOURCE_ROW].to_numpy())
        columns = {"proba_0": 1 - scores, "proba_1": scores, "prediction": (scores > 0.5).astype(np.int64)}
        for name, values in columns.items():
            rows = rows.append_column(name, pa.array(values))
        rows = rows.append_column("engine", pa.repeat("formula", rows.num_rows))
        if (diary.parent / FAULTY).exists():
            broken = np.flatnonzero(rows[SOURCE_ROW].to_numpy() % 50 == 1).tolist()
            rows = mark_rows(rows, Stage.SCORE, dict.fromkeys(broken, (Reason.SCORE_ERROR, "the device is faulty")))
        write_task(rows, task, attempt, schemas)
    return {}


def run_once(work: Path, kill_at: str | None = None, retry_of: str | None = None, settings: Sequence[str] = ()) -> None:
    """One driver from its plan to its end, to be called in a process of its own; `kill_at` names where it dies."""
    if kill_at:
        os.environ[KILL_AT] = kill_at
    diary = work / "diary.txt"

    def score(plan: Plan, attempt: AttemptFolder) -> dict[str, float]:
        return score_here(plan, attempt, diary)

    # Both ask Ray, the first for its nodes.
    with patch.object(runs, "check_output"), patch.object(runs, "score", score):
        try:
            outcome = runs.run(make_plan(work, retry_of, settings), Timings())
        except ScoringError as error:
            (work / "error.txt").write_text(str(error))
            raise SystemExit(error.exit_code) from error
    (work / "outcome.json").write_text(json.dumps({"totals": outcome.totals, "was_published": outcome.was_published}))


def drive(work: Path, kill_at: str | None = None, retry_of: str | None = None, settings: Sequence[str] = ()) -> int:
    """`run_once` in a process; its exit code, -9 where it was killed."""
    process = CONTEXT.Process(target=run_once, args=(work, kill_at, retry_of, settings))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


# Its server imports this module once: a process is there in 20 ms instead of 5 s.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ledger_run"])


def rows_scored(work: Path) -> int:
    """Rows that were ever given to a write task, also those that were given twice."""
    diary = work / "diary.txt"
    return sum(map(int, diary.read_text().split())) if diary.exists() else 0
