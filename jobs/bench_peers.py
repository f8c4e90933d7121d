"""What ours is measured against: AutoGluon's own call as shipped and tuned, and the script that one writes first.

Owns A, A+ and C of the protocol. A and A+ run in the benchmark's process; C is a command of its own with its own Ray:

    python -m jobs.bench_peers INPUT_FOLDER PREDICTOR OUTPUT_FOLDER

whose last line on standard output is one JSON document.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.bench_score import Entry, median_of
from jobs.bench_series import mean_between, thin_mean
from jobs.bench_watch import probed_gpu, watch

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

BATCH_ROWS = 256
# fit() in the demo trains on the CPU without loader processes and saves that; these are AutoGluon's own values again.
_SHIPPED = (
    *("num_gpus", "accelerator", "strategy", "precision"),
    *("per_gpu_batch_size", "inference_batch_size_ratio", "num_workers_inference"),
)
_WARM_UP_ROWS = 256
_TIMEOUT_S = 1200.0
# Rows a call of the reference: realtime=True makes one batch of the frame.
_REFERENCE_ROWS = 64


def load(path: Path) -> Any:
    """The predictor, Lightning quiet."""
    from scoring.predictor import load_predictor

    hush_lightning()
    return load_predictor(path)


def hush_lightning() -> None:
    """Keep Lightning from printing its advertisements at every fit() and predict_proba()."""

    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)


def as_shipped(predictor: Any) -> Any:
    """Give a loaded predictor the environment settings that AutoGluon ships (configs/env/default.yaml)."""
    import autogluon.multimodal
    from omegaconf import OmegaConf

    folder = Path(next(iter(autogluon.multimodal.__path__)))
    shipped = OmegaConf.load(folder / "configs" / "env" / "default.yaml").env
    environment = predictor._learner._config.env
    for name in _SHIPPED:
        environment[name] = shipped[name]
    return predictor


def tuned(predictor: Any) -> Any:
    """As shipped, with loader processes on all cores but two and batches of BATCH_ROWS.

    AutoGluon 1.6.3 takes a prediction's batch as env.per_gpu_batch_size x env.inference_batch_size_ratio.
    """
    as_shipped(predictor)
    environment = predictor._learner._config.env
    environment.num_workers_inference = max(1, (os.cpu_count() or 1) - 2)
    environment.per_gpu_batch_size = BATCH_ROWS // environment.inference_batch_size_ratio
    return predictor


def measure_predict_proba(predictor: Any, rows: "pd.DataFrame", repeats: int) -> Entry:
    """Rows/s of `predict_proba` on a frame in memory, the predictor loaded: nothing else is counted."""
    environment = predictor._learner._config.env
    if len(rows) > _WARM_UP_ROWS * 4:
        predictor.predict_proba(rows.head(_WARM_UP_ROWS))
    rates = []
    with probed_gpu() as probe:
        for _ in range(repeats):
            start = time.perf_counter()
            predictor.predict_proba(rows)
            rates.append(len(rows) / (time.perf_counter() - start))
            logger.info("predict_proba, %d loader workers: %.0f rows/s", environment.num_workers_inference, rates[-1])
    return {
        "rows": len(rows),
        **median_of(rates),
        "loader_workers": environment.num_workers_inference,
        "batch_rows": environment.per_gpu_batch_size * environment.inference_batch_size_ratio,
        "gpu_busy_pct": mean_between(probe.busy, 0.0, math.inf),
        "series": {"gpu_busy": thin_mean(probe.busy)},
    }


def reference_scores(predictor: Any, rows: "pd.DataFrame") -> "pd.DataFrame":
    """`predict_proba(realtime=True)` of a frame, in fp32 on the CPU, one column a class."""
    import pandas as pd

    environment = predictor._learner._config.env
    environment.num_gpus, environment.accelerator, environment.precision = 0, "cpu", 32
    predictor._learner._model.to("cpu")
    frames = [rows.iloc[start : start + _REFERENCE_ROWS] for start in range(0, len(rows), _REFERENCE_ROWS)]
    answers = [
        predictor.predict_proba(frame.reset_index(drop=True), as_multiclass=True, realtime=True) for frame in frames
    ]
    scores: pd.DataFrame = pd.concat(answers, ignore_index=True)
    return scores


def measure_ray_script(inputs: Path, predictor: Path, work: Path) -> Entry:
    """C: the obvious Ray script, as a command of its own, with and without its start-up."""
    command = [sys.executable, "-m", "jobs.bench_peers", str(inputs), str(predictor), str(work / "obvious")]
    watched = watch(command, work / "obvious", timeout_s=_TIMEOUT_S, environment={"HF_HUB_OFFLINE": "1"})
    if watched.code != 0:
        return {"unavailable": watched.tail[-600:], "exit_code": watched.code}
    document: Mapping[str, Any] = watched.summary
    return {
        "rows": document["rows"],
        # Its best side: the time its actor spent in predict_proba, without Ray's start and the predictor's load.
        "rows_per_s": round(document["rows"] / document["busy_s"], 1),
        "with_start_up_rows_per_s": round(document["rows"] / watched.wall_s, 1),
        "wall_s": round(watched.wall_s, 1),
        "memory": watched.memory,
        "batch_rows": BATCH_ROWS,
        # Of the time in which its actor scored, which ends with the command.
        "gpu_busy_pct": mean_between(watched.gpu_busy, watched.wall_s - document["busy_s"], watched.wall_s),
        "series": {"gpu_busy": thin_mean(watched.gpu_busy)},
    }


class PredictProba:
    """The actor that everybody writes: load in the constructor, `predict_proba` a batch."""

    def __init__(self, path: str) -> None:
        self._predictor = as_shipped(load(Path(path)))

    def __call__(self, batch: "pd.DataFrame") -> "pd.DataFrame":
        start = time.perf_counter()
        scores: pd.DataFrame = self._predictor.predict_proba(batch)
        scores.columns = [f"proba_{name}" for name in scores.columns]
        return scores.assign(PetID=batch["PetID"], busy_s=(time.perf_counter() - start) / len(batch))


def score_obviously(inputs: str, predictor: str, output: str) -> Entry:
    """Read, `map_batches`, write; the rows and the seconds that the actor was busy."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    import ray
    import torch
    from ray.data import ActorPoolStrategy

    # Its workers' bars would follow the document on standard output.
    ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    ray.data.read_parquet(inputs).map_batches(
        PredictProba,
        fn_constructor_args=(predictor,),
        batch_size=BATCH_ROWS,
        batch_format="pandas",
        compute=ActorPoolStrategy(size=1),
        num_gpus=1 if torch.cuda.is_available() else None,
    ).write_parquet(output)
    written = pq.read_table(output, columns=["busy_s"])
    return {"rows": written.num_rows, "busy_s": pc.sum(written["busy_s"]).as_py()}


def main(arguments: Sequence[str]) -> None:
    print(json.dumps(score_obviously(*arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
