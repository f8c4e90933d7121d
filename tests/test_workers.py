"""The workers of a Ray that `jobs` starts: they are kept while a run lasts."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

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
