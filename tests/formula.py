"""`jobs.score` with a closed-form scorer: the score is a formula of the row's number, so that no model has to be loaded.

    python -m tests.formula [--slow] -- --input ... --predictor ... --output ...

Everything else is the real job: Ray, reading, features, writing, ledger. What comes after `--` is jobs.score's own line. The
predictor is a real one, whose feature spec must lie in the cache.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.columns import SOURCE_ROW
from scoring.config import ScoreConfig
from scoring.features import FEATURE_PREFIX

_ENGINE_COLUMN = "engine"


def score_of(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """float32 in [0, 1) from the row's number alone."""
    return ((rows * 2654435761 % 2**32) / 2**32).astype(np.float32)


def diary_of(output: object) -> Path:
    """Where the actors of a run note how many rows they scored."""
    return Path(f"{output}.diary")


class FormulaActor:
    """In `ScoringActor`'s place, for a binary predictor with the classes 0 and 1."""

    delay_s = 0.0

    def __init__(self, spec_json: str, config: ScoreConfig, predictor_hash: str, told: Mapping[str, Any]) -> None:
        self._diary = diary_of(told["decisions"].partition("/runs/")[0])

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(self.delay_s)
        with self._diary.open("a") as file:  # what was scored, also what was scored twice
            file.write(f"{table.num_rows}\n")
        scored = table.drop_columns([name for name in table.column_names if name.startswith(FEATURE_PREFIX)])
        is_good = np.array([reason is None for reason in table["reason"].to_pylist()])
        scores = score_of(table[SOURCE_ROW].to_numpy())
        columns = {"proba_0": 1 - scores, "proba_1": scores, "prediction": (scores > 0.5).astype(np.int64)}
        for name, values in columns.items():
            scored = scored.append_column(name, pa.array(values, mask=~is_good))
        return scored.append_column(_ENGINE_COLUMN, pa.repeat("formula", table.num_rows))


class SlowFormulaActor(FormulaActor):
    """The same, taking its time, so that a run lasts long enough to be killed in the middle."""

    delay_s = 0.1


def main(arguments: Sequence[str]) -> None:
    from jobs import score

    end = arguments.index("--")
    actor = SlowFormulaActor if "--slow" in arguments[:end] else FormulaActor
    with patch("scoring.pipeline.ScoringActor", actor):
        score.app(args=list(arguments[end + 1 :]))


if __name__ == "__main__":
    main(sys.argv[1:])
