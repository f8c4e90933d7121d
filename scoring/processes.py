"""Processes as files name them: told from any other, also from a later one with the same number, and whether they still run.

Owns that mark alone; what follows from a death is `lock.py`'s and `journal.py`'s.
"""

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

# The kernel's idea of when a process started moves by a second when the clock is set.
_CLOCK_SLACK_S = 2.0


@dataclass(frozen=True)
class ProcessMark:
    """A process: this boot of its machine, its number there, and when it started (seconds since the epoch)."""

    machine: str
    pid: int
    started: float

    @staticmethod
    def current() -> "ProcessMark":
        return ProcessMark.of(os.getpid())

    @staticmethod
    def of(pid: int) -> "ProcessMark":
        """Of a process that runs here."""
        process = psutil.Process(pid)
        return ProcessMark(_machine(), process.pid, process.create_time())

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine, so that one can tell whether it runs."""
        return self.machine == _machine()

    @property
    def is_running(self) -> bool:
        """Whether it runs, on this machine: a zombie does not, nor a process that another one's number has gone to."""
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < _CLOCK_SLACK_S
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True  # it is there, and not ours to look at


@cache
def _machine() -> str:
    """This boot of this machine, and whose process numbers its pids are: containers of one host have their own."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if os.path.islink(path) else Path(path).read_text().strip())
        except OSError:  # not Linux
            parts.append("")
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]
