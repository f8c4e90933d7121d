"""Run a test module's `__main__` with Triton's interpreter, which has to be chosen before Triton is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).parents[1]


def run_interpreted(module: str) -> Any:
    """The JSON document on the last line that `python -m module` printed, kernels interpreted on the CPU."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=_REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
