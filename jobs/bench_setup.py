"""What the parts of `jobs.benchmark pipeline` share: the request, predictors and rows, made once and when first needed.

Owns the default sizes and where things lie below the output folder.
"""

import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import bench_data
from jobs.bench_data import Cut, Recipe
from jobs.bench_score import Entry, ScoreJob

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_GPU_ROWS, _CPU_ROWS, _QUICK_ROWS = 300_000, bench_data.SHARD_ROWS, 256
_COMPARED_ROWS = 2_000
_REPEATS = 3


@dataclass(frozen=True)
class Request:
    """What the user asked for; None is the default for this machine."""

    folder: Path
    models: Path | None = None
    quick: bool = False
    rows: int | None = None
    only: tuple[str, ...] = ()
    repeats: int | None = None


@dataclass
class Bench:
    """What the parts share: predictors and rows, made once and when first needed."""

    request: Request
    machine: Mapping[str, Any]
    parts: Mapping[str, Entry]
    """What was measured so far, in this call or before."""
    keep: Callable[[str, Entry], None]
    """Writes a part into the document at once."""

    @property
    def work(self) -> Path:
        return self.request.folder.absolute() / "work"

    @property
    def rows(self) -> int:
        if self.request.rows:
            return self.request.rows
        if self.request.quick:
            return _QUICK_ROWS
        return _CPU_ROWS if self.machine["device"] == "cpu" else _GPU_ROWS

    @property
    def repeats(self) -> int:
        return self.request.repeats or (1 if self.request.quick else _REPEATS)

    def recipe(self, **changes: Any) -> Recipe:
        return replace(Recipe(rows=min(self.rows, bench_data.SHARD_ROWS)), **changes)

    def predictor_path(self, name: str) -> Path:
        from jobs.bench_models import build_predictor

        folder = (self.request.models or self.work / "models").absolute() / name
        if not (folder / "done").exists():
            from jobs.bench_peers import hush_lightning

            hush_lightning()
        return build_predictor(name, folder, "small" if self.request.quick else "usual")

    @cached_property
    def seed_predictor(self) -> Path:
        from jobs.bench_models import SEED_MODEL

        return self.predictor_path(SEED_MODEL)

    @cached_property
    def seed_cut(self) -> Cut:
        return bench_data.make_cut(self.work / "data" / "measured", self.recipe())

    @cached_property
    def seed_inputs(self) -> tuple[Path, int]:
        return bench_data.repeat_cut(self.seed_cut, self.rows, self.work / "data" / "input")

    @cached_property
    def expected(self) -> "pd.DataFrame":
        """What AutoGluon says of the first rows, in fp32; kept, since a later call would take half a minute for it again."""
        import pandas as pd

        from scoring.predictor import hash_predictor

        rows = min(_COMPARED_ROWS, self.seed_cut.rows)
        path = self.seed_cut.folder / f"expected-{hash_predictor(self.seed_predictor)[:16]}-{rows}.parquet"
        if not path.exists():
            from jobs.bench_peers import load, reference_scores

            logger.info("reference: predict_proba(realtime=True) of %d rows", rows)
            scores = reference_scores(load(self.seed_predictor), self.frame(rows))
            scores.columns = scores.columns.astype(str)
            scores.to_parquet(path)
        return pd.read_parquet(path)

    def frame(self, rows: int) -> "pd.DataFrame":
        return read_frame(self.seed_cut, rows)

    def job(self, settings: Mapping[str, object]) -> ScoreJob:
        inputs, rows = self.seed_inputs
        return ScoreJob((inputs,), rows, self.seed_predictor, self.work, settings, expected=self.expected)


def read_frame(cut: Cut, rows: int) -> "pd.DataFrame":
    """The first rows of a cut as its first parquet files hold them."""
    import pandas as pd

    return pd.concat([pd.read_parquet(file) for file in cut.parquet], ignore_index=True).head(rows)


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
