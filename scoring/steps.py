"""The named steps of writing and publishing, so that a test can kill the process at each of them.

Owns the names. `SCORING_KILL_AT=commit:before` ends the process there with SIGKILL, as a machine that goes away would;
`write_part:after:3` at the third time. Without the variable a step costs one look at the environment.
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

KILL_AT = "SCORING_KILL_AT"

STEPS = (
    "hold",
    "claim",
    "take_over",
    "sweep",
    "write_reads",
    "write_part",
    "write_receipt",
    "write_manifest",
    "commit",
    "publish_config",
    "publish_manifest",
    "publish_success",
    "publish_latest",
    "drop_work",
)

_passed: Counter[str] = Counter()


@contextmanager
def step(name: str) -> Iterator[None]:
    """Mark what happens inside as one step."""
    assert name in STEPS
    _pass(f"{name}:before")
    yield
    _pass(f"{name}:after")


def _pass(moment: str) -> None:
    wanted = os.environ.get(KILL_AT)
    if wanted is None:
        return
    _passed[moment] += 1
    if wanted in (moment, f"{moment}:{_passed[moment]}"):
        os.kill(os.getpid(), signal.SIGKILL)
