"""Verification of a published run: which run, what its manifest says, and how differences are told.

Owns what is said of a run. `recount.py` recomputes its accounts from the files alone, `rescore.py` scores a sample of its rows
once more. Nothing is written, no Ray.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from scoring.accounts import PartFile, ShardAccount
from scoring.errors import ConfigError, VerificationError
from scoring.ledger import MANIFEST_VERSION
from scoring.storage import absolute, exists, join, list_names, read_bytes, redact

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 20
SHOWN_ITEMS = 3


@dataclass(frozen=True)
class PublishedRun:
    """A run's folder below an output."""

    output: str
    run_id: str

    @property
    def uri(self) -> str:
        return join(self.output, "runs", self.run_id)


@dataclass(frozen=True)
class PinnedPredictor:
    """The predictor that scored the run."""

    path: str
    sha256: str


@dataclass(frozen=True)
class StoredFingerprint:
    """What decided the run's scores, each input file's size and version among it."""

    parts: Mapping[str, str]


@dataclass(frozen=True)
class Totals:
    """The run's accounts."""

    rows_read: int
    rows_scored: int
    rows_quarantined: int
    reasons: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """What verification uses of manifest.json; other keys are left alone."""

    version: int
    run_id: str
    fingerprint: StoredFingerprint
    predictor: PinnedPredictor
    files: tuple[PartFile, ...]
    shards: tuple[ShardAccount, ...]
    totals: Totals


@dataclass(frozen=True)
class Recount:
    """What the files hold, counted anew, and every difference from what they should hold.

    `sampled` are the rows to rescore: source_file, source_row, the score columns, and the `part` each was read from.
    """

    manifest: Manifest
    totals: Totals
    checksum: str
    problems: tuple[str, ...]
    sampled: pa.Table | None


@dataclass(frozen=True)
class Rescored:
    """Published scores against AutoGluon's own. `max_abs_diff` as in `parity.py`; None where no row could be compared."""

    rows: int
    max_abs_diff: float | None
    limit: float
    problems: tuple[str, ...]


def find_run(output: str, run_id: str | None) -> PublishedRun:
    """The run that `latest.json` or `run_id` names. Raises ConfigError where there is none, VerificationError for a bad
    `latest.json`."""
    output = absolute(output, Path.cwd())
    names = list_names(join(output, "runs"))
    shown = f"its runs: {some(names)}" if names else "there is no run below it"
    if run_id is not None:
        if run_id not in names:
            raise ConfigError(f"--run-id: {redact(output)} has no run {run_id}; {shown}")
        return PublishedRun(output, run_id)
    if not exists(join(output, "latest.json")):
        raise ConfigError(
            f"--output: {redact(output)} has no latest.json, so no run was published there; {shown}. Name the --output that "
            "jobs.score was given, or a run with --run-id"
        )
    latest = _read_latest(output)
    if latest not in names:
        raise VerificationError(f"{redact(output)}/latest.json names run {latest}, which is not there; {shown}")
    return PublishedRun(output, latest)


def _read_latest(output: str) -> str:
    try:
        document = json.loads(read_bytes(join(output, "latest.json")))
        run_id, manifest = str(document["run_id"]), document["manifest"]
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"{redact(output)}/latest.json: holds no run_id and manifest ({error!r}); name the run with --run-id"
        ) from error
    if manifest != f"runs/{run_id}/manifest.json":
        raise VerificationError(
            f"{redact(output)}/latest.json: names run {run_id} but the manifest {manifest}; name the run with --run-id"
        )
    return run_id


def read_manifest(run: PublishedRun) -> Manifest:
    where = f"{redact(run.uri)}/manifest.json"
    try:
        manifest = TypeAdapter(Manifest).validate_json(read_bytes(join(run.uri, "manifest.json")))
    except FileNotFoundError as error:
        state = "there is a _SUCCESS" if exists(join(run.uri, "_SUCCESS")) else "nor is _SUCCESS: it was not published"
        raise VerificationError(
            f"{where}: is missing ({state}), so nothing says what the run holds; rerun its jobs.score command"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise VerificationError(
            f"{where}: {key}: {first['msg']}; restore the manifest that jobs.score wrote, or score again"
        ) from error
    if manifest.version != MANIFEST_VERSION:
        raise VerificationError(
            f"{where}: version {manifest.version}, this code reads {MANIFEST_VERSION}; verify with the version that wrote it"
        )
    return manifest


def raise_if_different(run: PublishedRun, problems: Sequence[str]) -> None:
    """Raise VerificationError naming the problems, the first 20 in words."""
    if not problems:
        return
    count = f"{len(problems)} difference{'s' if len(problems) > 1 else ''}"
    rest = len(problems) - SHOWN_PROBLEMS
    raise VerificationError(
        "\n".join(
            [
                f"run {run.run_id} at {redact(run.uri)} is not what was published, or never was right: {count}",
                *problems[:SHOWN_PROBLEMS],
                *([f"... and {rest} more"] if rest > 0 else []),
                "restore the run's folder from a copy, or score again under another --run-id",
            ]
        )
    )


def some(items: Sequence[str], num_items: int | None = None) -> str:
    """The first items in words, and how many more there are of `num_items` (default: all are in `items`)."""
    more = (len(items) if num_items is None else num_items) - SHOWN_ITEMS
    return ", ".join(items[:SHOWN_ITEMS]) + (f" and {more} more" if more > 0 else "")
