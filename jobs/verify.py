"""Verify a published run: recompute its accounts from the files, and rescore a sample of its rows.

    python -m jobs.verify --output scores/
    python -m jobs.verify --output s3://bucket/scores --run-id nightly --sample 0

Reads manifest and parts alone; the sample also reads the inputs and loads the predictor, whose hash must be the manifest's.
`--sample 0` needs neither. Writes nothing. Exit codes: 0 all as it should be, 1 a bug, 2 usage or predictor, 3 a difference
was found or the inputs changed, 6 interrupted. The last line on stdout is one JSON document with exit code, run id and
counts.
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from scoring.errors import IncompleteError, ScoringError
from scoring.recount import verify_files
from scoring.rescore import rescore
from scoring.storage import redact, redact_text
from scoring.verify import Rescored, find_run, raise_if_different

logger = logging.getLogger("jobs.verify")

_SHOWN_PROBLEMS = 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def verify(
    output: Annotated[str, typer.Option(help="Folder or URI that jobs.score wrote below.")],
    run_id: Annotated[str | None, typer.Option(help="Name of the run; the one of latest.json if not given.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Published rows to score again; 0 reads the output alone.")] = 200,
) -> None:
    """Recount a published run from its files and rescore a sample of it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    raise typer.Exit(_finish(lambda summary: _verify(output, run_id, sample, summary)))


def _finish(work: Callable[[dict[str, Any]], None]) -> int:
    """Run the work, log an error by its kind, and print the closing JSON line; returns the exit code."""
    summary: dict[str, Any] = {"exit_code": 0, "run_id": None}
    try:
        work(summary)
    except KeyboardInterrupt:
        summary["exit_code"] = IncompleteError.exit_code
        summary["error"] = "interrupted; rerun the same command"
        logger.error("%s", summary["error"])
    except Exception as error:  # the process edge: ours are told, anything else is a bug and comes with its traceback
        is_ours = isinstance(error, ScoringError)
        summary["exit_code"] = error.exit_code if isinstance(error, ScoringError) else 1
        summary["error"] = redact_text(str(error) if is_ours else f"{type(error).__name__}: {error}".strip())
        logger.error("%s", summary["error"], exc_info=None if is_ours else error)
    sys.stderr.flush()
    print(json.dumps(summary), flush=True)
    return int(summary["exit_code"])


def _verify(output: str, run_id: str | None, sample: int, summary: dict[str, Any]) -> None:
    run = find_run(str(Path(output).expanduser()) if output.startswith("~") else output, run_id)
    summary |= {"run_id": run.run_id, "output": redact(run.uri)}
    files = verify_files(run, sample)
    totals = files.totals
    summary |= {"parts": len(files.manifest.files), "shards": len(files.manifest.shards)}
    summary |= {name: getattr(totals, name) for name in ("rows_read", "rows_scored", "rows_quarantined")}
    summary |= {"reasons": dict(totals.reasons), "checksum": files.checksum}
    summary |= _told(files.problems)
    raise_if_different(run, files.problems)
    rescored = Rescored(0, None, 0.0, ())
    if sample:
        rescored = rescore(run, files)
        summary |= {"rows_rescored": rescored.rows, "max_abs_diff": rescored.max_abs_diff, **_told(rescored.problems)}
        raise_if_different(run, rescored.problems)
    _print_checked(summary, rescored)


def _told(problems: tuple[str, ...]) -> dict[str, Any]:
    return {"num_problems": len(problems), "problems": [redact_text(item) for item in problems[:_SHOWN_PROBLEMS]]}


def _print_checked(summary: dict[str, Any], rescored: Rescored) -> None:
    # Wide enough for the path: one that is folded cannot be copied from a log.
    console = Console(width=40 + max(len(summary["output"]), 80), highlight=False)
    checked = Table(show_header=False, title="Verified", title_justify="left")
    reasons = ", ".join(f"{name} {count}" for name, count in summary["reasons"].items()) or "none"
    difference = "none (--sample 0)"
    if rescored.max_abs_diff is not None:
        difference = (
            f"{rescored.rows:,} rows, largest difference {rescored.max_abs_diff:.1e} (limit {rescored.limit:g})"
        )
    elif "rows_rescored" in summary:
        difference = "none: the run has no scored row"
    for name, value in (
        ("run", f"{summary['run_id']} at {summary['output']}"),
        ("parts", f"{summary['parts']:,}, each with the size, sha256 and rows of the manifest, and no other"),
        ("shards", f"{summary['shards']:,}, every row in exactly one part"),
        ("rows", f"{summary['rows_read']:,} = {summary['rows_scored']:,} scored + {summary['rows_quarantined']:,} bad"),
        ("reasons", reasons),
        ("checksum", summary["checksum"]),
        ("rescored", difference),
    ):
        checked.add_row(name, value)
    console.print(checked)


if __name__ == "__main__":
    app()
