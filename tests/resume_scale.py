"""What resuming a run of many shards costs: start-up and memory against a fresh run of what is left; figures as JSON.

    python -m tests.resume_scale FOLDER [SHARDS]

Every shard is a file of 100 rows; 99 % of them have receipts. Measured is the driver's work before the first row is read:
listing, footers, plan, the hold, the attempt and what is left. Rows and Ray are not involved.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scoring import run as runs
from scoring.accounts import PartFile, ReadNote, Receipt, ShardReceipt, identity_checksum
from scoring.pipeline import Plan
from tests.ledger_run import make_plan

ROWS = 100
_RECEIPT_SHARDS = 20


def write_files(folder: Path, numbers: Sequence[int]) -> None:
    folder.mkdir(parents=True)
    table = pa.table({"x": [str(row) for row in range(ROWS)]})
    for number in numbers:
        pq.write_table(table, folder / f"{number:06d}.parquet")


def start_up(work: Path) -> tuple[float, Plan]:
    """Seconds from nothing to the plan of what is left, and that plan."""
    start = time.perf_counter()
    plan = make_plan(work)
    mark = plan.fingerprint
    plan.run.check_fingerprint(mark.digest, mark.differences)
    hold = plan.run.hold()
    assert hold is not None
    plan.run.claim(mark.digest, mark.parts, mark.differences)
    left = runs._left(plan, plan.run.begin(hold))
    seconds = time.perf_counter() - start
    hold.release()
    return seconds, left


def leave_receipts(work: Path, done: int) -> None:
    """What a killed driver left: parts, receipts and notes of the first `done` shards, 20 shards a task."""
    plan = make_plan(work)
    hold = plan.run.hold()
    assert hold is not None
    plan.run.claim(plan.fingerprint.digest, plan.fingerprint.parts, plan.fingerprint.differences)
    attempt = plan.run.begin(hold)
    shards = plan.inputs.shards[:done]
    rows = np.arange(ROWS)
    for task, first in enumerate(range(0, done, _RECEIPT_SHARDS)):
        group = shards[first : first + _RECEIPT_SHARDS]
        path = attempt.write_part("scores", task, b"")
        file = PartFile(path, ROWS * len(group), 0, "0" * 64, attempt.attempt, "formula")
        accounts = {
            shard.index: ShardReceipt(((0, ROWS),), (), identity_checksum(shard.file.source_file, rows))
            for shard in group
        }
        attempt.write_receipt(Receipt(attempt.attempt, task, (file,), accounts, {}, 0.0))
        attempt.write_reads(group[0].index, {shard.index: ReadNote(ROWS) for shard in group})
    hold.release()


def measure(folder: Path, shards: int) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    rest = shards // 100
    write_files(folder / "rest" / "data", range(shards - rest, shards))
    write_files(folder / "all" / "data", range(shards))
    start_up(folder / "rest")  # imports and page cache
    shutil.rmtree(folder / "rest" / "out")
    fresh_s, fresh = start_up(folder / "rest")
    leave_receipts(folder / "all", shards - rest)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resumed_s, left = start_up(folder / "all")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [shard.file.uri[-14:] for shard in left.inputs.shards] == [
        shard.file.uri[-14:] for shard in fresh.inputs.shards
    ]
    listing = time.perf_counter()
    make_plan(folder / "all")
    listing = time.perf_counter() - listing
    return {
        "shards": shards,
        "done": shards - rest,
        "fresh_s": round(fresh_s, 2),
        "resumed_s": round(resumed_s, 2),
        "of_that_listing_and_footers_s": round(listing, 2),
        "driver_peak_mib": round(peak / 1024),
        "driver_peak_before_mib": round(before / 1024),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10_000)))
