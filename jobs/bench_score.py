"""Ours, as a user starts it: `python -m jobs.score` as a subprocess, watched, its accounts and scores read back.

Owns the command, what one run's figures are and how repeats are summed up. A run that fails is an entry that says why.
"""

import json
import logging
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.bench_series import mean_between, steady_rate, steady_span, thin_mean, thin_out
from jobs.bench_watch import Watched, watch

if TYPE_CHECKING:
    import pandas as pd

    from scoring.config import ScoreConfig

logger = logging.getLogger(__name__)

Entry = dict[str, Any]
_TIMEOUT_S = 1800.0
_ROUNDED = ("rows_per_s", "steady_rows_per_s", "late_rows_per_s", "first_score_s", "ready_s", "wall_s")


@dataclass(frozen=True)
class ScoreJob:
    """One way to run `jobs.score`: on what, with which settings, below which working folder."""

    inputs: tuple[Path, ...]
    rows: int
    predictor: Path
    work: Path
    settings: Mapping[str, object] = field(default_factory=dict)
    num_bad: int = 0
    flow: Mapping[str, int] = field(default_factory=dict)
    """Numbers of `sizing.Flow` other than its own (see `bench_flow`)."""
    cores: int | None = None
    """So many cores for the whole job, Ray included (None: all)."""
    expected: "pd.DataFrame | None" = None
    """Upstream's probabilities of the first rows of the first file of `inputs`, one column a class."""

    @property
    def cache(self) -> Path:
        return self.work / "cache"

    def config(self, output: Path) -> "ScoreConfig":
        """What `command` comes to, less its cores."""
        from scoring.config import load_config

        settings = {"engine.cache": str(self.cache), **self.settings}
        flags = {
            "input.paths": [str(path) for path in self.inputs],
            "predictor.path": str(self.predictor),
            "output.path": str(output),
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        return load_config(file=None, flags=flags, overrides=overrides, cwd=Path.cwd())

    def command(self, output: Path) -> list[str]:
        settings: dict[str, object] = {"engine.cache": self.cache, **self.settings}
        bound: list[str] = []
        if self.cores:
            settings["resources.cpus"] = self.cores
            bound = ["taskset", "--cpu-list", f"0-{self.cores - 1}"]
        inputs = [text for path in self.inputs for text in ("--input", str(path))]
        overrides = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
        paths = ["--predictor", str(self.predictor), "--output", str(output)]
        changes = [f"{name}={value}" for name, value in self.flow.items()]
        module = ["jobs.bench_flow", *changes, "--"] if changes else ["jobs.score"]
        return [*bound, sys.executable, "-m", *module, *inputs, *paths, *overrides]


def measure_score(job: ScoreJob, repeats: int, *, warm_up: bool) -> Entry:
    """Median figures of `repeats` runs; with `warm_up` one more before them if the engine cache is empty.

    Every run writes to a new folder. Returns {"unavailable": why} as soon as one fails.
    """
    is_cold = not (job.cache / "engines").exists()
    count = repeats + (1 if warm_up and is_cold else 0)
    runs: list[Entry] = []
    for number in range(count):
        run = _run_once(job)
        if "unavailable" in run:
            return run
        run["cache"] = "empty" if is_cold and number == 0 else "filled"
        logger.info("ours %s: %.0f rows/s with start-up, steady %s", dict(job.settings), run["rows_per_s"], _told(run))
        if run.get("gpu_hot_pct"):
            logger.warning(
                "heat held the GPU back for %.0f %% of the time, at %.0f MHz on the average: these rates are not its own; cool "
                "it or take another one",
                *(run["gpu_hot_pct"], run["gpu_clock_mhz"]),
            )
        runs.append(run)
    counted = runs[-repeats:]
    # The run whose steady rate is the median one stands for all: its parts belong together.
    chosen = sorted(counted, key=lambda run: float(run["steady_rows_per_s"] or run["rows_per_s"]))[
        (len(counted) - 1) // 2
    ]
    figures = [{name: run[name] for name in (*_ROUNDED, "cache")} for run in runs]
    rates = [float(run["rows_per_s"]) for run in counted]
    return {**chosen, "min": min(rates), "max": max(rates), "runs": figures}


def _told(run: Mapping[str, Any]) -> str:
    steady = run["steady_rows_per_s"]
    return "not known (too few parts)" if steady is None else f"{steady:.0f}"


def _run_once(job: ScoreJob) -> Entry:
    output = job.work / "output"
    shutil.rmtree(output, ignore_errors=True)
    watched = watch(job.command(output), output, timeout_s=_TIMEOUT_S, environment={"HF_HUB_OFFLINE": "1"})
    if watched.code != 0:
        reason = str(watched.summary.get("error") or watched.tail[-600:] or "it said nothing")
        logger.warning("jobs.score %s ended with exit code %d: %s", dict(job.settings), watched.code, reason)
        return {"unavailable": reason, "exit_code": watched.code}
    entry = {**_figures(job, watched), **_published(job, output)}
    shutil.rmtree(output, ignore_errors=True)
    return entry


def _figures(job: ScoreJob, watched: Watched) -> Entry:
    span = steady_span(watched.landed)
    start, end = (span[0][0], span[1][0]) if span else (0.0, watched.wall_s)
    steady = steady_rate(watched.landed)
    rate = watched.summary["rows_read"] / watched.wall_s
    entry: Entry = {
        "rows": watched.summary["rows_read"],
        "settings": {key: str(value) for key, value in {**job.settings, **job.flow}.items()},
        "cores": job.cores or os.cpu_count(),
        "wall_s": watched.wall_s,
        "rows_per_s": rate,
        "steady_rows_per_s": steady,
        # Rows that were prepared while the engine was loaded are scored by then: where cores are few they are a third.
        "late_rows_per_s": steady_rate(watched.landed, since=0.5),
        "rows_per_s_per_core": (steady or rate) / (job.cores or os.cpu_count() or 1),
        "ready_s": min((actor["ready_s"] for actor in watched.loaded), default=None),
        "first_score_s": watched.landed[0][0] if watched.landed else None,
        "start_up": {
            "timings": watched.summary.get("timings", {}),
            "driver": watched.driver,
            "actors": watched.loaded,
        },
        "actors": watched.actors,
        "memory": watched.memory,
        "cpu": watched.cpu,
        "spilled_mib": watched.spilled_mib,
        "gpu_memory_mib": watched.gpu_memory_mib or None,
        "gpu_busy_pct": mean_between(watched.gpu_busy, start, end),
        "jpeg_busy_pct": mean_between(watched.jpeg_busy, start, end),
        "gpu_clock_mhz": mean_between(watched.gpu_clock, start, end),
        "gpu_hot_pct": mean_between(watched.gpu_hot, start, end),
        "series": {"landed": thin_out(watched.landed), "gpu_busy": thin_mean(watched.gpu_busy)},
    }
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in entry.items()}


def _published(job: ScoreJob, output: Path) -> Entry:
    """The accounts against what was put in, the engine, and the scores against upstream's."""
    latest = json.loads((output / "latest.json").read_text())
    manifest = json.loads((output / latest["manifest"]).read_text())
    totals = manifest["totals"]
    rows = totals["rows_scored"] + totals["rows_quarantined"]
    entry: Entry = {
        "rows_scored": totals["rows_scored"],
        "rows_quarantined": totals["rows_quarantined"],
        "reasons": totals["reasons"],
        "rows_bad_injected": job.num_bad,
        "is_accounted": rows == job.rows and totals["rows_quarantined"] == job.num_bad,
        "engine": manifest["engine"]["used"],
        "decisions": _decisions(manifest["engine"]["decisions"]),
    }
    if job.expected is not None:
        folder = output / "runs" / latest["run_id"]
        parts = [folder / file["path"] for file in manifest["files"] if file["path"].startswith("scores/")]
        entry |= compare_scores(parts, job.inputs[0], job.expected)
    return entry


def _decisions(decisions: Mapping[str, Any]) -> list[str]:
    """Every rung of every decision in a line, without its samples."""
    return [
        f"{rung['provider']}-{rung['precision']} {rung['outcome']}: {rung['reason']}"
        for decision in decisions.values()
        for rung in decision.get("rungs", ())
    ]


def compare_scores(parts: Sequence[Path], source: Path, expected: "pd.DataFrame") -> Entry:
    """Published probabilities of the first file's first rows against upstream's, row by row by `source_row`."""
    import numpy as np
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    names = [f"proba_{label}" for label in expected.columns]
    first_file = str(min(source.iterdir())) if source.is_dir() else str(source)
    wanted = (pc.field("source_file") == first_file) & (pc.field("source_row") < len(expected))
    table = ds.dataset([str(part) for part in parts]).to_table(columns=["source_row", *names], filter=wanted)
    rows = table["source_row"].to_numpy()
    found = np.stack([table[name].to_numpy() for name in names], axis=1)
    if sorted(rows.tolist()) != list(range(len(expected))):
        return {"rows_compared": len(rows), "max_abs_diff": None, "flips": None}
    wanted_scores = expected.to_numpy()[rows]
    flips = found.argmax(axis=1) != wanted_scores.argmax(axis=1)
    return {
        "rows_compared": len(rows),
        "max_abs_diff": float(np.abs(found - wanted_scores).max()),
        "mean_abs_diff": float(np.abs(found - wanted_scores).mean()),
        "flips": int(flips.sum()),
    }


def median_of(rates: Sequence[float]) -> dict[str, float]:
    """Median and spread, rounded for a document."""
    return {
        "rows_per_s": round(statistics.median(rates), 1),
        "min": round(min(rates), 1),
        "max": round(max(rates), 1),
    }
