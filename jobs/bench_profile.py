"""What bounds a scoring actor on a GPU: its two halves apart and together in one process, and what they ask of the GPU.

Owns the `profile` part of `jobs.benchmark pipeline`. Windows are the actor's own (`sizing.py`), staged by as many threads; Ray,
reading and writing are left out, so that what is lost here is lost between the preparation and the forward.
"""

import gzip
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jobs.bench_score import Entry, ScoreJob
from jobs.bench_series import mean_between
from jobs.bench_watch import probed_gpu

logger = logging.getLogger(__name__)

_SECONDS, _WARM_WINDOWS = 4.0, 6
_TRACED_S = 1.0
_TOP = 14
# As the profiler's trace names what runs on the GPU, and what is asked of its driver.
_ON_GPU, _CALLS = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver")


def measure_profile(job: ScoreJob, predictor: Any, used: Sequence[str]) -> Entry:
    """Rows/s of the staging alone, the forward alone and both, and a trace of both; for the engine that ours used, and the
    compiled one."""
    from jobs.bench_limits import build_used
    from scoring.engines.build import has_gpu

    if not has_gpu():
        return {"unavailable": "no GPU: there are no two halves to profile"}
    actor = ActorInProcess(job, predictor)
    entry: Entry = {"window_rows": actor.table.num_rows, "calls": actor.calls, "images_per_window": actor.num_images}
    entry["staging"], entry["staging_clock_mhz"] = actor.rate(lambda: actor.staging.stage(actor.table))
    for names in (used, ["torch-compiled-fp16-"]):
        engine, name = build_used(actor.request, names)
        if name in entry:
            engine.close()
            continue
        score = actor.scorer(engine)
        staged = actor.staging.stage(actor.table)
        alone, alone_mhz = actor.rate(lambda: score(staged))  # noqa: B023
        actor.spent.clear()
        both, both_mhz = actor.rate(lambda: score(actor.staging.stage(actor.table)))  # noqa: B023
        entry[name] = {
            "forward": alone,
            "both": both,
            "clock_mhz": {"forward": alone_mhz, "both": both_mhz},
            "seconds_a_window": actor.mean_spent(),
            "both_by_calls": actor.by_calls(lambda: score(actor.staging.stage(actor.table))),  # noqa: B023
            "both_without": actor.without(lambda: score(actor.staging.stage(actor.table))),  # noqa: B023
            **actor.trace(lambda: score(actor.staging.stage(actor.table))),  # noqa: B023
        }
        engine.close()
        logger.info("profile: %s: %s", name, {key: entry[name][key] for key in ("forward", "both", "gpu_busy_pct")})
    return entry


class ActorInProcess:
    """A window of the job's rows, and what a scoring actor does with it."""

    def __init__(self, job: ScoreJob, predictor: Any) -> None:
        from scoring.decoding import DecodePlan
        from scoring.engines.build import EngineRequest
        from scoring.engines.cache import EngineCache
        from scoring.predictor import extract_spec
        from scoring.sizing import size_flow, size_pools
        from scoring.staging import GPU_ROWS, Staging

        config = job.config(job.work)
        self._spec = extract_spec(predictor)
        plan = DecodePlan("gpu", resizes_on_gpu=True)
        flow = size_flow(
            config, self._spec, size_pools(config, [{"CPU": float(os.cpu_count() or 1), "GPU": 1.0}]), plan, job.rows
        )
        self.calls = flow.calls
        self.table = _features(config, self._spec, plan, flow.window_rows)
        self.num_images = sum(
            int(self.table[f"feat:{model.prefix}:valid_num"].to_numpy().sum()) for model in self._spec.image_models
        )
        self.staging = Staging(self._spec, config, plan, on_gpu=True)
        self.request = EngineRequest(
            lambda: predictor, self._spec, EngineCache(str(job.cache)), batch_rows=GPU_ROWS, rows_left=job.rows
        )
        self._lock = threading.Lock()
        self.spent: list[tuple[float, float, float, float]] = []

    def mean_spent(self) -> dict[str, float]:
        """Where a window's seconds go, from one end to the other: at the decoders, waiting for the forward's turn, in it, and
        waiting for what the GPU has to do. Long turns: the forward is the bound; none: the staging."""
        names = ("stage", "turn", "submit", "gpu")
        means = [sum(values) / len(self.spent) for values in zip(*self.spent, strict=True)]
        return {name: round(mean, 4) for name, mean in zip(names, means, strict=False)}

    def scorer(self, engine: Any) -> Callable[[Any], object]:
        from scoring.forward import Forward

        forward = Forward(engine, self.staging, max(1, len(self._spec.class_labels)))

        def score(staged: Any) -> object:
            marks = [time.perf_counter()]
            with self._lock:
                marks.append(time.perf_counter())
                submitted = forward.submit(staged)
            marks.append(time.perf_counter())
            logits = submitted.wait()
            marks.append(time.perf_counter())
            turn, submit, gpu = (end - start for start, end in pairwise(marks))
            self.spent.append((staged.seconds, turn, submit, gpu))
            return logits

        return score

    def rate(self, work: Callable[[], object]) -> tuple[float, float | None]:
        """Rows/s of windows worked on by all threads, between the ends of the first and the last that count, and the GPU's
        clock meanwhile (MHz): two things at once may be slower for the power that they take."""
        ends: list[float] = []
        with probed_gpu() as probe:
            self._spin(work, lambda: len(ends) > _WARM_WINDOWS and ends[-1] - ends[_WARM_WINDOWS] > _SECONDS, ends)
        counted = ends[_WARM_WINDOWS:]
        rate = round(float(self.table.num_rows * (len(counted) - 1) / (counted[-1] - counted[0])), 1)
        return rate, mean_between(probe.clock, _SECONDS / 2, math.inf)

    def by_calls(self, work: Callable[[], object]) -> dict[str, float]:
        """Rows/s with fewer and with more windows in flight than a run has."""
        usual, rates = self.calls, {}
        for calls in (max(1, usual - 2), usual + 2):
            self.calls = calls
            rates[str(calls)] = self.rate(work)[0]
        self.calls = usual
        return rates

    def without(self, work: Callable[[], object]) -> dict[str, float]:
        """Rows/s with parts of the staging left out, on pixels of no meaning: what each costs the forward beside it."""
        skips = {
            "decoding": patch("scoring.nvjpeg.JpegDecoder.decode", _decode_nothing),
            "resize": patch("scoring.device_images.resize_frames", lambda *_: None),
        }
        rates = {}
        for names in (("decoding",), ("resize",), ("decoding", "resize")):
            with ExitStack() as patches:
                for name in names:
                    patches.enter_context(skips[name])
                rates[" and ".join(names)] = self.rate(work)[0]
        return rates

    def trace(self, work: Callable[[], object]) -> Entry:
        """What runs on the GPU and what is asked of the driver, per window."""
        import torch

        ends: list[float] = []
        stop = threading.Event()
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=1) as pool:
            spinning = pool.submit(self._spin, work, stop.is_set, ends)
            try:
                while len(ends) < _WARM_WINDOWS and not spinning.done():
                    time.sleep(0.01)
                before = len(ends)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                    time.sleep(_TRACED_S)
                windows = max(1, len(ends) - before)
            finally:
                stop.set()
            spinning.result()
            path = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(path))
            with gzip.open(path, "rt") as file:
                events = json.load(file)["traceEvents"]
        return summarize(events, windows)

    def _spin(self, work: Callable[[], object], is_over: Callable[[], bool], ends: list[float]) -> None:
        failures: list[Exception] = []

        def loop() -> None:
            try:
                while not is_over() and not failures:
                    work()
                    ends.append(time.perf_counter())
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=loop) for _ in range(self.calls)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def _decode_nothing(_decoder: Any, addresses: Sequence[int], *_: Any) -> Any:
    import numpy as np

    return np.ones(len(addresses), dtype=bool)


def _features(config: Any, spec: Any, plan: Any, rows: int) -> Any:
    """A window as the feature workers leave it: blocks, not one array."""
    import pyarrow as pa

    from scoring.features import FeatureBuilder
    from scoring.images import ImageFetcher
    from scoring.parts import reserved_names
    from scoring.reading import read_shard
    from scoring.shards import inspect_files, list_inputs, plan_inputs

    inputs = plan_inputs(
        inspect_files(list_inputs(config.input), config.input), spec, config.input, reserved_names(spec)
    )
    builder = FeatureBuilder(spec, ImageFetcher(config.images), plan)
    blocks: list[Any] = []
    for shard in inputs.shards:
        for block in read_shard(shard, inputs.schema, config.input.csv, block_rows=512):
            blocks.append(builder(block))
            if sum(table.num_rows for table in blocks) >= rows:
                return pa.concat_tables(blocks).slice(0, rows)
    return pa.concat_tables(blocks)


def summarize(events: Iterable[Mapping[str, Any]], windows: int) -> Entry:
    """A chrome trace's events -> the GPU's busy share, and per window the kernels and calls that take the most time."""
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    calls: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    spans = []
    for event in events:
        into = kernels if event.get("cat") in _ON_GPU else calls if event.get("cat") in _CALLS else None
        if into is None:
            continue
        item = into[str(event["name"])[:90]]
        item[0] += 1
        item[1] += float(event["dur"])
        if into is kernels:
            spans.append((float(event["ts"]), float(event["ts"]) + float(event["dur"])))
    return {
        "windows": windows,
        "gpu_busy_pct": _busy(spans),
        "kernels": _largest(kernels, windows),
        "calls": _largest(calls, windows),
    }


def _busy(spans: Sequence[tuple[float, float]]) -> float | None:
    """Share of the time between the first start and the last end in which anything runs, in percent."""
    if not spans:
        return None
    ordered, busy = sorted(spans), 0.0
    reached = ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return round(100 * busy / (reached - ordered[0][0]), 1)


def _largest(sums: Mapping[str, Sequence[float]], windows: int) -> list[dict[str, Any]]:
    """The largest by time, ms and count a window, and all others together."""
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    rest = [sum(values[place] for _, values in ordered[_TOP:]) for place in (0, 1)]
    rows = [*ordered[:_TOP], (f"{max(0, len(ordered) - _TOP)} others", rest)]
    return [
        {"name": name, "count": round(count / windows, 1), "ms": round(us / 1000 / windows, 2)}
        for name, (count, us) in rows
    ]
