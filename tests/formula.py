"""`jobs.score` with a closed-form scorer: the score is a formula of the row's number, so that no model has to be loaded.

    python -m tests.formula [--delay=SECONDS] [--workers-read] -- --input ... --predictor ... --output ...

Everything else is the real job: Ray, reading, features, writing, ledger. With `--workers-read` feature workers read their rows
themselves, as before a GPU that decodes. What comes after `--` is jobs.score's own line. The predictor is a real one, whose
feature spec must lie in the cache.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.columns import ENGINE_COLUMN, SOURCE_ROW
from scoring.config import ScoreConfig
from scoring.decoding import DecodePlan
from scoring.errors import Stage
from scoring.features import FEATURE_PREFIX
from scoring.guard import Guard
from scoring.journal import Journal


def score_of(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """float32 in [0, 1) from the row's number alone."""
    return ((rows * 2654435761 % 2**32) / 2**32).astype(np.float32)


def poison_of(output: object, stage: str) -> Mapping[str, str]:
    """Rows that do harm, as file:row -> raise, crash or hang, by stage; from a file beside the run's output, if there is one."""
    path = Path(f"{output}.poison.json")
    found: Mapping[str, Mapping[str, str]] = json.loads(path.read_text()) if path.exists() else {}
    return found.get(stage, {})


def suffer_from(table: pa.Table, poison: Mapping[str, str]) -> None:
    """Do what a poison row does to whoever gets it."""
    names = [name.rpartition("/")[2] for name in table["source_file"].to_pylist()]
    for name, row, reason in zip(names, table[SOURCE_ROW].to_pylist(), table["reason"].to_pylist(), strict=True):
        if reason is None and f"{name}:{row}" in poison:
            suffer(poison[f"{name}:{row}"])


def started_of(output: object, stage: str) -> Path:
    """Where a stage's actors note that they started."""
    return Path(f"{output}.{stage}.started")


def note_start(output: object, stage: str) -> None:
    with started_of(output, stage).open("a") as file:
        file.write(f"{os.getpid()}\n")


def suffer(harm: str) -> None:
    """What a poison row does to who scores it."""
    if harm == "crash":
        # A real one, in this thread: a signal goes to any, and this one would go on with other rows.
        ctypes.string_at(0)
    if harm == "hang":
        time.sleep(3600)
    raise RuntimeError("this row cannot be scored")


def diary_of(output: object) -> Path:
    """Where the actors of a run note how many rows they scored."""
    return Path(f"{output}.diary")


class FormulaActor:
    """In `ScoringActor`'s place, for a binary predictor with the classes 0 and 1."""

    delay_s = 0.0

    def __init__(self, spec_json: str, config: ScoreConfig, predictor_hash: str, told: Mapping[str, Any]) -> None:
        output = told["decisions"].partition("/runs/")[0]
        self._diary, self._poison = diary_of(output), poison_of(output, Stage.SCORE)
        note_start(output, Stage.SCORE)
        self._guard = Guard(self._score, Stage.SCORE, Journal(told["journal"], timeout_s=5.0))

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(self.delay_s)
        with self._diary.open("a") as file:  # what was scored, also what was scored twice
            file.write(f"{table.num_rows}\n")
        return self._guard(table)

    def _score(self, table: pa.Table) -> pa.Table:
        suffer_from(table, self._poison)
        scored = table.drop_columns([name for name in table.column_names if name.startswith(FEATURE_PREFIX)])
        is_good = np.array([reason is None for reason in table["reason"].to_pylist()])
        scores = score_of(table[SOURCE_ROW].to_numpy())
        columns = {"proba_0": 1 - scores, "proba_1": scores, "prediction": (scores > 0.5).astype(np.int64)}
        for name, values in columns.items():
            scored = scored.append_column(name, pa.array(values, mask=~is_good))
        return scored.append_column(ENGINE_COLUMN, pa.repeat("formula", table.num_rows))


class NoPreparer:
    """In the place of the process that imports AutoGluon: a formula has no reference."""

    class reference:  # noqa: N801
        @staticmethod
        def remote(*_: object, **__: object) -> None:
            return None

    build = reference


def main(arguments: Sequence[str]) -> None:
    from jobs import score  # first: it settles how Ray starts
    from scoring.pipeline import FeatureWorker, StartedPreparer
    from scoring.sizing import size_flow

    end = arguments.index("--")
    workers_read = "--workers-read" in arguments[:end]
    delays = [float(argument.partition("=")[2]) for argument in arguments[:end] if argument.startswith("--delay=")]

    class DelayedActor(FormulaActor):
        """Takes its time, so that a run lasts long enough to be killed in the middle; sent by value, with its delay."""

        delay_s = delays[0] if delays else 0.0

    class PoisonedWorker(FeatureWorker):
        """The real one, whose rows may do harm."""

        def __init__(self, spec_json: str, config: ScoreConfig, decode: DecodePlan, journal: str) -> None:
            super().__init__(spec_json, config, decode, journal)
            build = self._guard._work
            poison = poison_of(config.output.path, Stage.FEATURES)
            note_start(config.output.path, Stage.FEATURES)

            def build_or_suffer(table: pa.Table) -> pa.Table:
                suffer_from(table, poison)
                return build(table)

            self._guard._work = build_or_suffer

    def flow(*given: Any) -> Any:
        chosen = size_flow(*given)
        return replace(chosen, workers_may_read=True, task_rows=1) if workers_read else chosen

    DelayedActor.__name__ = FormulaActor.__name__
    PoisonedWorker.__name__ = FeatureWorker.__name__
    # Nor does anybody import AutoGluon to check a formula.
    with (
        patch("scoring.pipeline.ScoringActor", DelayedActor),
        patch("scoring.pipeline.FeatureWorker", PoisonedWorker),
        patch("scoring.pipeline.size_flow", flow),
        patch("scoring.pipeline._start_preparer", lambda *_: StartedPreparer(NoPreparer)),
    ):
        score.app(args=list(arguments[end + 1 :]))


if __name__ == "__main__":
    main(sys.argv[1:])
