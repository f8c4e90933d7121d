"""A worker process over rows that may kill it, and a driver that starts it anew with the same rows, as Ray does.

The worker gives each window to the guard in a thread of its own, as Ray gives calls to an actor; a row's score is 3 row + 1.
"""

import ctypes
import faulthandler
import json
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from scoring import processes
from scoring.columns import IDENTITY_FIELDS, MARK_FIELDS
from scoring.errors import Stage
from scoring.guard import Guard
from scoring.journal import Journal

# A fresh interpreter imports for seconds on a busy machine, and these tests start fifty.
PROCESSES = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Job:
    """Windows of rows, and what single rows do to the process that touches them."""

    windows: int = 1
    rows: int = 4096
    killers: Mapping[int, str] = field(default_factory=dict)
    timeout_s: float = 60.0
    host: str = ""
    hold_s: float = 0.0
    """How long every call takes."""


@dataclass(frozen=True)
class Outcome:
    """How a job went: restarts, each row's score, and (stage, reason, message) of the rows given up."""

    restarts: int
    scores: dict[int, int]
    bad: dict[int, tuple[str, str, str]]

    def check(self, job: Job) -> None:
        """Every row is scored, once and right, or given up."""
        wanted = {row: 3 * row + 1 for row in range(job.windows * job.rows) if row not in job.killers}
        assert self.scores == wanted


def rows_table(first: int, count: int) -> pa.Table:
    """Rows of two files by turns, as blocks of a run mix them."""
    rows = np.arange(first, first + count)
    columns = [pa.array(np.where(rows % 1000 < 500, "/data/a.parquet", "/data/b.parquet")), rows, np.zeros(count)]
    table = pa.table(
        {item.name: pa.array(column, item.type) for item, column in zip(IDENTITY_FIELDS, columns, strict=True)}
        | {item.name: pa.nulls(count, item.type) for item in MARK_FIELDS}
    )
    return table.cast(pa.schema([*IDENTITY_FIELDS, *MARK_FIELDS])).append_column("model:x", pa.array(rows))


def touch(table: pa.Table, job: Job) -> pa.Table:
    """The work: scores of the rows that carry no reason; some rows end the process, or never return."""
    time.sleep(job.hold_s)
    usable = [reason is None for reason in table["reason"].to_pylist()]
    scores: list[int | None] = []
    for row, is_usable in zip(table["source_row"].to_pylist(), usable, strict=True):
        if is_usable and row in job.killers:
            _kill(job.killers[row])
        scores.append(3 * row + 1 if is_usable else None)
    return table.drop_columns(["model:x"]).append_column("score", pa.array(scores, pa.int64()))


def _kill(kind: str) -> None:
    if kind == "segv":
        # Not os.kill: any thread may get that signal, and this one would go on meanwhile and blame other rows.
        ctypes.string_at(0)
    elif kind == "exit":
        os._exit(3)
    elif kind == "sleep":
        time.sleep(3600)
    elif kind == "hold":  # Python's lock is not given back
        ctypes.PyDLL(None).sleep(3600)
    elif kind == "sticky":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    raise ValueError(f"this row is {kind}")


def run(folder: Path, job: Job, *, max_restarts: int = 20) -> Outcome:
    """Start the worker until it ends well. Its journal is `folder`/journal."""
    for restarts in range(max_restarts + 1):
        if exit_code(start(folder, job)) == 0:
            document = json.loads((folder / "out.json").read_text())
            scores = {row: score for row, score, reason, _, _ in document if reason is None}
            bad = {row: (stage, reason, message) for row, _, reason, stage, message in document if reason is not None}
            assert len(scores) + len(bad) == len(document), "a row came twice"
            return Outcome(restarts, scores, bad)
    raise AssertionError(f"not done after {max_restarts} restarts")


def start(folder: Path, job: Job) -> BaseProcess:
    worker = PROCESSES.Process(target=work, args=(folder, job))
    worker.start()
    return worker


def exit_code(worker: BaseProcess) -> int | None:
    worker.join()
    return worker.exitcode


def work(folder: Path, job: Job) -> None:
    """The worker's life: all of a job's windows, and their rows in `folder`/out.json."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # pytest's, inherited: a killer's stack is no news
    if job.host:
        patch.object(processes, "_machine", lambda: job.host).start()
    guard = Guard(
        lambda table: touch(table, job), Stage.SCORE, Journal(str(folder / "journal"), timeout_s=job.timeout_s)
    )
    found: list[Any] = []

    def score(window: int) -> None:
        table = rows_table(window * job.rows, job.rows)
        done = guard(table)
        assert done["source_row"].equals(table["source_row"]), "rows keep their order"
        names = ("source_row", "score", "reason", "stage", "message")
        found.extend(zip(*(done[name].to_pylist() for name in names), strict=True))

    threads = [threading.Thread(target=score, args=(window,)) for window in range(job.windows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (folder / "out.json").write_text(json.dumps(found))
    guard.close()
