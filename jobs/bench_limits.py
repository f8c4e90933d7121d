"""The two limits of ours: the forward pass alone, and the preprocessing alone.

Owns L and P of the protocol. L runs in the benchmark's process, inputs on the device, weighted by the token steps of the
rows. P is a command of its own, ours without the scoring actors:

    python -m jobs.bench_limits FOLDER --set key=value ...

whose last line on standard output is one JSON document.
"""

import json
import logging
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jobs.bench_score import Entry, ScoreJob
from jobs.bench_series import mean_between, steady_rate, thin_out
from jobs.bench_watch import probed_gpu, watch
from scoring.collate import cut
from scoring.staging import CPU_ROWS, GPU_ROWS, GPU_TOKENS

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_TIMEOUT_S = 900.0
# Rows a counting task: small, so that the rows that pass are seen often.
_COUNT_ROWS = 2048
_QUICK_ROWS = 16
_COMPILED = "torch-compiled"


def measure_forward_limit(
    predictor: Any, rows: "pd.DataFrame", cache: Path, used: Sequence[str], *, quick: bool = False
) -> Entry:
    """L: rows/s of the engine alone at every token step that the rows have, and their mean as the rows are spread.

    `used` are the engines that ours scored with; the compiled one is taken if it was among them.
    """
    from scoring.engines.build import EngineRequest, has_gpu
    from scoring.engines.cache import EngineCache
    from scoring.predictor import extract_spec

    spec = extract_spec(predictor)
    request = EngineRequest(
        lambda: predictor,
        spec,
        EngineCache(str(cache)),
        batch_rows=GPU_ROWS if has_gpu() else CPU_ROWS,
        num_threads=os.cpu_count() or 1,
    )
    engine, name = build_used(request, used)
    lengths = token_lengths(rows, spec)
    steps = Counter(request.shapes.fit(1, length)[1] for length in lengths.tolist())
    with probed_gpu() as probe:
        measured = {tokens: _forward_rate(engine, request, tokens, quick=quick) for tokens in sorted(steps)}
    engine.close()
    limit = sum(steps.values()) / sum(count / measured[tokens]["rows_per_s"] for tokens, count in steps.items())
    by_tokens = {str(tokens): {**figures, "rows": steps[tokens]} for tokens, figures in measured.items()}
    return {
        "rows": sum(steps.values()),
        "rows_per_s": round(limit, 1),
        "engine": name,
        "gpu_clock_mhz": mean_between(probe.clock, 0.0, math.inf),
        "padding_pct": padding_pct(lengths, request.shapes, request.batch_rows, GPU_TOKENS if has_gpu() else None),
        "by_tokens": by_tokens,
    }


def build_used(request: Any, used: Sequence[str]) -> tuple[Any, str]:
    """The engine that a part names, the compiled one if it is among several, warmed up; and its name."""
    from scoring.engines.build import build_engine, has_gpu

    # A part names every engine that scored it, as provider-precision-device.
    names = [name for names in used for name in names.split(", ")] or [
        "torch-compiled-fp16-" if has_gpu() else "cpu-fp32-"
    ]
    name = next((name for name in names if name.startswith(_COMPILED)), names[0])
    precision: Any = "fp16" if "-fp16-" in name else "fp32"
    provider = name.partition(f"-{precision}-")[0]
    engine = build_engine(request, provider, precision)[0]
    engine.warm_up()
    return engine, f"{provider}-{precision}"


def token_lengths(rows: "pd.DataFrame", spec: Any) -> npt.NDArray[np.int64]:
    """Tokens of each row, of the longest of its text models; 0 without text."""
    import pyarrow as pa

    from scoring.sequences import TokenSequences

    lengths = np.zeros(len(rows), dtype=np.int64)
    texts = {column.name: pa.array(rows[column.name].fillna("").astype(str), pa.large_string()) for column in spec.text}
    for model in spec.text_models if spec.text else ():
        lengths = np.maximum(lengths, TokenSequences(model).build(texts)[0].value_lengths().to_numpy())
    return lengths


def padding_pct(lengths: npt.NDArray[np.int64], shapes: Any, max_rows: int, max_tokens: int | None) -> float | None:
    """Of the tokens that an engine is given the share (%) of padding, with these rows as one window; None without text."""
    if not lengths.any():
        return None
    ordered, given = np.sort(lengths), 0
    for start, end in cut(ordered, max_rows, shapes, max_tokens):
        rows, tokens = shapes.fit(end - start, int(ordered[end - 1]))
        given += rows * tokens
    return round(100 * (1 - int(lengths.sum()) / given), 1)


def _forward_rate(engine: Any, request: Any, tokens: int, *, quick: bool) -> dict[str, float]:
    """A full batch's rate (a quick run's are small); of long texts a batch has fewer rows, as ours cuts them."""
    import torch

    from jobs.benchmark import measure
    from scoring.engines.torch_engine import CUDA, to_tensor
    from scoring.flat import describe_inputs, synthetic_arrays

    most = min(_QUICK_ROWS if quick else request.batch_rows, GPU_TOKENS // max(1, tokens))
    rows = max(count for count in request.shapes.rows if count <= most)
    arrays = synthetic_arrays(request.spec, rows=rows, tokens=tokens, seed=tokens)
    times: Any = {"seconds": 0.3, "repeats": 1, "warm_ups": 1} if quick else {"seconds": 0.5}
    if torch.cuda.is_available():
        tensors = [to_tensor(arrays[item.name], CUDA) for item in describe_inputs(request.spec)]
        figures = measure(lambda: engine.run(tensors), rows, finish=torch.cuda.synchronize, **times)
    else:
        figures = measure(lambda: engine.forward(arrays), rows, finish=lambda: None, **times)
    logger.info("forward alone, %d rows of %d tokens: %.0f rows/s", rows, tokens, figures["rows_per_s"])
    return {"batch_rows": rows, "rows_per_s": figures["rows_per_s"]}


def measure_feature_limit(job: ScoreJob) -> Entry:
    """P: rows/s from the files to rows that nobody scores, with the feature workers that ours has."""
    output = job.work / "features-only"
    shutil.rmtree(output, ignore_errors=True)
    # jobs.score's own arguments, so that both read one configuration.
    arguments = job.command(output)[3:]
    command = [sys.executable, "-m", "jobs.bench_limits", *arguments]
    watched = watch(command, output, timeout_s=_TIMEOUT_S, environment={"HF_HUB_OFFLINE": "1"})
    shutil.rmtree(output, ignore_errors=True)
    if watched.code != 0:
        return {"unavailable": watched.tail[-600:], "exit_code": watched.code}
    document = watched.summary
    landed = [(at, rows) for at, rows in document["landed"]]
    steady = steady_rate(landed)
    # A small run's rows pass in a lump: the workers' own time says what they can do (on a GPU it is one of two limits).
    by_busy = document["rows"] * document["workers"] / document["busy_s"] if document["busy_s"] else 0.0
    return {
        "rows": document["rows"],
        "rows_per_s": round(steady or by_busy, 1),
        "measured_by": "rows that passed" if steady else "the workers' busy time",
        "busy_rows_per_s": round(by_busy, 1),
        "workers": document["workers"],
        "wall_s": round(watched.wall_s, 1),
        "memory": watched.memory,
        "series": {"landed": thin_out(landed)},
    }


class StagingOnly:
    """A scoring actor's half of the preparation: images decoded and resized on the GPU, batches cut; nothing is scored."""

    def __init__(self, spec_json: str, config: Any, decode: Any) -> None:
        from scoring.spec import FeatureSpec
        from scoring.staging import Staging

        self._staging = Staging(FeatureSpec.from_json(spec_json), config, decode, on_gpu=True)

    def __call__(self, table: Any) -> Any:
        from scoring.columns import SOURCE_ROW

        self._staging.stage(table)
        return table.select([SOURCE_ROW])


def _stage_features(dataset: Any, plan: Any) -> Any:
    """What `pipeline.score_features` does less the forward."""
    from ray.data import ActorPoolStrategy

    flow, pools = plan.flow, plan.pools
    return dataset.map_batches(
        StagingOnly,
        fn_constructor_kwargs={"spec_json": plan.spec.to_json(), "config": plan.config, "decode": plan.decode},
        batch_size=flow.window_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pools.scoring_actors, enable_true_multi_threading=True),
        num_cpus=0,
        num_gpus=pools.gpus_per_actor,
        max_concurrency=flow.calls,
        udf_modifying_row_count=False,
    )


def features_only(flags: Mapping[str, object], overrides: Sequence[str]) -> Entry:
    """Read and prepare every row of a configuration, as `pipeline.py` does, the GPU's part included; count the rows."""
    import ray

    from scoring.config import load_config
    from scoring.ledger import AttemptFolder
    from scoring.pipeline import Timings, feature_workers, prepare, read_features, shard_source
    from scoring.sizing import IO_CPUS

    def start_ray() -> None:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, logging_level=logging.WARNING)

    config = load_config(file=None, flags=flags, overrides=overrides, cwd=Path.cwd())
    plan = prepare(config, Timings(), start_ray)
    attempt = AttemptFolder(plan.run.uri, "features-only")
    dataset = read_features(plan, attempt)
    if plan.pools.gpus_per_actor:
        dataset = _stage_features(dataset, plan)
    counter = counting_sink()
    dataset.write_datasink(counter, ray_remote_args={"num_cpus": IO_CPUS})
    first = min((at for at, _ in counter.seen), default=0.0)
    landed, rows = [], 0
    for at, count in sorted(counter.seen):
        rows += count
        landed.append((round(at - first, 3), rows))
    return {
        "rows": rows,
        "landed": landed,
        "workers": feature_workers(plan, shard_source(plan, attempt).num_tasks),
        "busy_s": _busy_seconds(dataset, "FeatureWorker"),
    }


def counting_sink() -> Any:
    """A `Datasink` that writes nothing; its `seen` are (moment, rows) of every task once all are done."""
    from ray.data.block import Block, BlockAccessor
    from ray.data.datasource import Datasink

    class CountingSink(Datasink[tuple[float, int]]):  # type: ignore[misc]
        seen: Sequence[tuple[float, int]] = ()

        @property
        def min_rows_per_write(self) -> int:
            return _COUNT_ROWS

        def write(self, blocks: Iterable[Block], ctx: Any) -> tuple[float, int]:  # noqa: ARG002
            rows = sum(BlockAccessor.for_block(block).num_rows() for block in blocks)
            return time.time(), rows

        def on_write_complete(self, write_result: Any) -> None:
            self.seen = write_result.write_returns

    return CountingSink()


def _busy_seconds(dataset: Any, part: str) -> float:
    """Busy seconds of the operators whose name has `part`, from Ray's own statistics."""
    seconds, pending = 0.0, [dataset.get_stats_summary()]
    while pending:
        summary = pending.pop()
        pending.extend(summary.parents)
        seconds += sum(
            stage.wall_time.sum
            for stage in summary.operators_stats
            if part in stage.operator_name and stage.wall_time is not None
        )
    return seconds


def main(arguments: Sequence[str]) -> None:
    """Takes jobs.score's arguments: --input (again and again), --predictor, --output and --set."""
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    given = {name: [value for key, value in pairs if key == name] for name, _ in pairs}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    flags = {
        "input.paths": given["--input"],
        "predictor.path": given["--predictor"][0],
        "output.path": given["--output"][0],
    }
    print(json.dumps(features_only(flags, given.get("--set", []))))


if __name__ == "__main__":
    main(sys.argv[1:])
