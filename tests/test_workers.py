"""The workers of a Ray that `jobs` starts: they are kept while a run lasts, and do not look for cycles in their blocks."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scoring.decoding import DecodePlan
from scoring.pipeline import FeatureWorker
from tests.conftest import REPOSITORY
from tests.test_sizing import PLAIN, config

# More workers than CPUs, as reads and writes of a quarter of one are, before and after a pause.
_SCRIPT = """
import jobs, os, time, ray

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=0.25)
def task():
    time.sleep(3)
    return os.getpid()

def workers():
    return set(ray.get([task.remote() for _ in range(4)]))

workers()
before = workers()
time.sleep(4)
print(len(before), len(workers() - before))
"""


@pytest.mark.ray
def test_workers_that_wait_a_moment_for_their_next_task_are_not_started_anew() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", _SCRIPT]
    told = subprocess.run(command, env=own, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120)
    num, num_new = map(int, told.stdout.split()[-2:])
    assert num > 1
    assert num_new == 0


def test_a_feature_worker_looks_for_cycles_seldom_and_not_in_what_it_has_loaded(tmp_path: Path) -> None:
    generations: list[int] = []

    def seen(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    def make_rows() -> None:
        generations.clear()
        rows = [[[token] for token in range(4)] for _ in range(2048)]  # as lists a row and column
        assert len(rows) == 2048

    (tmp_path / "journal").mkdir()
    thresholds = gc.get_threshold()
    gc.callbacks.append(seen)
    try:
        make_rows()
        assert generations, "Python's own thresholds"
        worker = FeatureWorker(PLAIN.to_json(), config(tmp_path), DecodePlan(), str(tmp_path / "journal" / "features"))
        make_rows()
        assert generations == []
        assert gc.get_freeze_count() > 10_000
        del worker
    finally:
        gc.callbacks.remove(seen)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
