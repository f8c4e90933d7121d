"""Score shards with a MultiModalPredictor.

    python -m jobs.score --input data/ --predictor AutogluonModels/mine --output scores/
    python -m jobs.score --config job.yaml --set batch.rows=512 --dry-run

The same line works on a laptop, on one GPU and as the entrypoint of `ray job submit`. Exit codes: 0 complete, 1 a bug,
2 configuration or usage, 3 input, 4 engine, 5 locked, 6 interrupted (rerun to resume). The last line of the log is one
JSON document with exit code, run id and counts, because `ray job submit` itself exits 1 whatever happened.
"""

import json
import logging
import os
import resource
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from scoring.config import describe, load_config
from scoring.errors import IncompleteError, ScoringError
from scoring.storage import redact, redact_text

logger = logging.getLogger("jobs.score")

_LOG_DRAIN_S = 2.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def score(
    input: Annotated[list[str] | None, typer.Option(help="File, folder, glob or URI; may be given again.")] = None,
    predictor: Annotated[str | None, typer.Option(help="Folder or URI that fit() saved.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder or URI to write below.")] = None,
    config: Annotated[str | None, typer.Option(help="YAML file; flags and --set override it.")] = None,
    set: Annotated[list[str] | None, typer.Option(help="One setting, key.path=value; may be given again.")] = None,
    run_id: Annotated[
        str | None, typer.Option(help="Name of the run; derived from its fingerprint if not given.")
    ] = None,
    retry_quarantine: Annotated[
        str | None, typer.Option(help="A published run: keep its scores, try its quarantined rows again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
) -> None:
    """Score every row of the input and write scores, quarantine and a manifest below --output."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    flags: dict[str, Any] = {
        "input.paths": input or None,
        "predictor.path": predictor,
        "output.path": output,
        "run.id": run_id,
    }
    raise typer.Exit(_finish(lambda summary: _score(config, flags, set or [], retry_quarantine, dry_run, summary)))


def _finish(work: "Any") -> int:
    """Run the work, log an error by its kind, and print the closing JSON line; returns the exit code."""
    summary: dict[str, Any] = {"exit_code": 0, "run_id": None}
    try:
        work(summary)
    except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM, a scheduler's way to stop us, into SystemExit
        summary["exit_code"] = IncompleteError.exit_code
        summary["error"] = "interrupted; rerun the same command"
        logger.error("%s", summary["error"])
    except Exception as error:  # the process edge: ours are told, anything else is a bug and comes with its traceback
        known = _scoring_cause(error)
        summary["exit_code"] = known.exit_code if known else 1
        summary["error"] = redact_text(str(known) if known else f"{type(error).__name__}: {error}".strip())
        logger.error("%s", summary["error"], exc_info=None if known else error)
    _stop_ray()
    print(json.dumps(summary), flush=True)
    return int(summary["exit_code"])


def _scoring_cause(error: BaseException) -> ScoringError | None:
    """Our own error, taken out of what Ray wraps around a worker's exception (whose text is a whole traceback)."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, BaseException):
        return _scoring_cause(inner)
    if isinstance(error, ScoringError):
        return error
    return None if error.__cause__ is None else _scoring_cause(error.__cause__)


def _score(
    file: str | None,
    flags: dict[str, Any],
    overrides: list[str],
    retry_of: str | None,
    dry_run: bool,
    summary: dict[str, Any],
) -> None:
    config = load_config(file=file, flags=flags, overrides=overrides, cwd=Path.cwd())
    for key, value in describe(config):
        logger.info("config %s = %s", key, value)
    import ray

    from scoring.pipeline import Timings, prepare
    from scoring.run import run

    timings = Timings()
    start = time.perf_counter()
    starts_ray = _starts_ray(ray)
    plan = prepare(
        config,
        timings,
        start_ray=lambda: _start_ray(ray, config.resources.cpus, starts_one=starts_ray),
        retry_of=retry_of,
        own_cpus=(usable_cpus(config.resources.cpus) or os.cpu_count()) if starts_ray else None,
    )
    summary["run_id"] = plan.run.run_id
    if dry_run:
        _print_plan(plan)
        summary["rows_estimated"] = plan.inputs.estimated_rows
        return
    outcome = run(plan, timings)
    wall_s = time.perf_counter() - start
    summary |= {"output": redact(plan.run.uri), **outcome.totals, "was_published": outcome.was_published}
    if not outcome.was_published:
        scored = outcome.totals["rows_read"]
        # Kilobytes on Linux, bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        summary |= {"wall_s": round(wall_s, 1), "driver_peak_mib": round(peak), "timings": dict(outcome.timings)}
        logger.info(
            "run %s: %d rows in %.1f s, %.0f rows/s with start-up", plan.run.run_id, scored, wall_s, scored / wall_s
        )


def _starts_ray(ray: Any) -> bool:
    """Whether there is no cluster to join: neither RAY_ADDRESS' nor this machine's."""
    return not ray.is_initialized() and "RAY_ADDRESS" not in os.environ and not _has_cluster()


def _start_ray(ray: Any, cpus: int | None, *, starts_one: bool) -> None:
    """Join the cluster of RAY_ADDRESS or of this machine, or start one here with at most so many CPUs."""
    if ray.is_initialized():
        return
    threading.Thread(target=_import_ray_data, daemon=True).start()
    # Only for a Ray that is started here: its dashboard takes up to 60 s of two cores to come up, for nobody.
    own = {"address": "local", "num_cpus": usable_cpus(cpus)} if starts_one else {}
    ray.init(**own, logging_level=logging.WARNING, log_to_driver=True, include_dashboard=False)


def usable_cpus(wanted: int | None) -> int | None:
    """How many CPUs a Ray that is started here shall have; None: as many as it finds.

    It does not see what `taskset` or Slurm leave a process of the machine, and starts a worker for each CPU: with 16 of them on
    4 cores the first score came after 104 s instead of 41.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    left = len(affinity(0)) if affinity else None
    is_bound = left is not None and left < (os.cpu_count() or 1)
    limits = [limit for limit in (wanted, left if is_bound else None) if limit is not None]
    return min(limits, default=None)


def _import_ray_data() -> None:
    """3 s of imports, for which the 8 s of Ray's start need not wait."""
    from ray.data import DataContext

    DataContext.get_current()  # the first one imports as much as half a second more


def _has_cluster() -> bool:
    """Whether a Ray runs on this machine. Its note may be stale: a head that was killed leaves it, and Ray waits for it.

    Seen with Ray 2.58.1: `ray.init()` tried the dead address for more than 8 minutes.
    """
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if not note.is_file():
        return False
    host, _, port = note.read_text().strip().rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        logger.warning("%s names a Ray at %s:%s that does not answer; starting one here", note, host, port)
        return False
    return True


def _stop_ray() -> None:
    """Leave Ray, so that nothing its workers still say comes after the closing line."""
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            # The workers' last lines arrive with a delay; what is not here by now stays in Ray's own log folder.
            time.sleep(_LOG_DRAIN_S)
        ray.shutdown()
    sys.stderr.flush()


def _print_plan(plan: Any) -> None:
    inputs, pools = plan.inputs, plan.pools
    # Wide enough for every path: a path that is cut or folded cannot be copied from a log.
    console = Console(width=60 + max(len(redact(plan.run.uri)), *(len(file.source_file) for file in inputs.files), 60))
    rows = f"{inputs.estimated_rows:,}" + (
        "" if inputs.has_exact_rows else " (estimated: CSV rows are known once read)"
    )
    facts = Table(show_header=False, title="Plan", title_justify="left")
    state = "published already: nothing to do" if plan.run.is_published else "to be scored"
    for name, value in (
        ("run", f"{plan.run.run_id} ({state})"),
        ("would write", redact(plan.run.uri)),
        ("predictor", f"{redact(plan.config.predictor.path)} sha256={plan.predictor_hash}"),
        ("problem", f"{plan.spec.problem_type}, label {plan.spec.label!r}, classes {list(plan.spec.class_labels)}"),
        ("files", f"{len(inputs.files)} in {len(inputs.shards)} shards"),
        ("rows", rows),
        (
            "actors",
            f"{pools.scoring_actors} scoring ({pools.gpus_per_actor:g} GPU each), up to {pools.feature_workers} for features",
        ),
        (
            "images",
            f"{plan.decode.mode}, {plan.decode.cpu_share:.0%} of them decoded on cores" if plan.spec.image else "none",
        ),
        ("batches", f"{plan.flow.block_rows} a block of features, {plan.flow.window_rows} a window of scoring"),
    ):
        facts.add_row(name, str(value))
    console.print(facts)
    _print_columns(console, plan)
    shards = Table(title="Shards", title_justify="left")
    for column in ("shard", "file", "first row", "rows"):
        shards.add_column(column, overflow="fold")
    for shard in inputs.shards[:50]:
        count = f"{shard.estimated_rows:,}" + ("" if shard.num_rows is not None else " (est.)")
        shards.add_row(str(shard.index), shard.file.source_file, f"{shard.first_row:,}", count)
    console.print(shards)
    if len(inputs.shards) > 50:
        console.print(f"... and {len(inputs.shards) - 50} more shards")


def _print_columns(console: Console, plan: Any) -> None:
    columns = Table(title="Columns", title_justify="left")
    for name in ("column", "found as", "used as"):
        columns.add_column(name)
    found = {name: str(kind) for file in reversed(plan.inputs.files) for name, kind in file.all_columns.items()}
    roles = {column.name: column.role for column in plan.inputs.schema.model}
    kept = {column.name for column in plan.inputs.schema.kept}
    for name in dict.fromkeys([*plan.spec.columns, *found]):
        uses = [use for use in (roles.get(name), "kept" if name in kept else None) if use]
        columns.add_row(name, found.get(name, "MISSING"), ", ".join(uses) or "not read")
    console.print(columns)


if __name__ == "__main__":
    app()
