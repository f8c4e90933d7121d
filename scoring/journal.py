"""The journal of batches in flight: what a process was working on when it died, so that the next one knows whom to suspect.

Owns the files (one a batch, there from before code that might end the process gets it until it is back), what they say of
a table's rows, and the watchdog that ends a process whose batch never returns. Knows rows by `source_file` and `source_row`
alone. What is done with a suspect is `guard.py`'s.
"""

import faulthandler
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from scoring.errors import Reason
from scoring.identities import Identities, contains
from scoring.poison import Verdict
from scoring.processes import ProcessMark
from scoring.storage import absolute, is_local, join, list_names, read_bytes, remove_tree, write_bytes

logger = logging.getLogger(__name__)

TIMEOUT_S = 300.0
# Deaths that name a row, the last of them with this row alone, before it is given up: two can be a machine's bad luck.
FATAL_DEATHS = 3
_TICK_S = 1.0
_STALLED = ".stalled"
_KILLED = f"the process that held it ended {FATAL_DEATHS} times without a word, at last with this row alone"


@dataclass(frozen=True)
class Suspicion:
    """What earlier deaths say of a table's rows: how many name each row (n,), and the rows that are not to be touched."""

    deaths: npt.NDArray[np.intp]
    condemned: dict[int, Verdict]


@dataclass
class _Flight:
    """A batch in flight: its file, its rows and since when code has had it (None: it waits for its turn)."""

    name: str
    runs: dict[str, list[list[int]]]
    since: float | None

    def to_json(self, reason: Reason | None = None, message: str = "") -> bytes:
        return json.dumps({"runs": self.runs, "reason": reason, "message": message}).encode()


@dataclass(frozen=True)
class _Death:
    """A flight that its process did not come back from, and why, if it could still say so."""

    runs: dict[str, npt.NDArray[np.int64]]
    verdict: Verdict

    @property
    def is_alone(self) -> bool:
        return sum(int((runs[:, 1] - runs[:, 0] + 1).sum()) for runs in self.runs.values()) == 1


class Journal:
    """One process's part of the journal in `folder` (a path or URI), which the processes of one kind of work share.

    Makes the folder, but none above it: where that is gone the attempt is over, and this process only starts too late. A batch
    that takes longer than `timeout_s` ends the process. A flight that cannot be written down is flown all the same.
    """

    def __init__(self, folder: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._is_local = is_local(folder)
        self._folder = absolute(folder, Path.cwd())
        self._timeout_s = timeout_s
        self._me = _name_of(ProcessMark.current())
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._flights: dict[int, _Flight] = {}
        self._deaths: dict[str, _Death] = {}
        self._closed = threading.Event()
        self._stalled: IO[bytes] | None = None
        if self._is_local and self._make_folder():
            self._stalled = open(join(self._folder, f"{self._me}{_STALLED}"), "wb")  # noqa: SIM115 -- open for life
            # A fork would take over the timer's locks without the thread that gives them back, and wait for it for ever.
            os.register_at_fork(before=faulthandler.cancel_dump_traceback_later)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watchdog.start()

    def _make_folder(self) -> bool:
        try:
            with suppress(FileExistsError):
                os.mkdir(self._folder)
        except FileNotFoundError:
            logger.warning("journal: %s cannot be made, the run's attempt is over", self._folder)
            return False
        return True

    def close(self) -> None:
        """Stop watching. May be called by a finalizer, which runs in any thread."""
        self._closed.set()
        if threading.current_thread() is not self._watchdog:
            self._watchdog.join()
        if self._stalled is not None:
            self._stalled.close()
            # The last one leaves nothing behind, also where no attempt's folder is dropped around it.
            with suppress(OSError):
                os.unlink(self._stalled.name)
                os.rmdir(self._folder)

    # --- flights

    @contextmanager
    def flight(self, rows: Identities) -> Iterator[None]:
        """Names the rows for as long as the calling thread works on them."""
        name = f"{self._me}~{next(self._numbers)}~{rows.buckets():x}"
        flight = _Flight(name, rows.runs(), time.monotonic())
        self._put(flight.name, flight.to_json())
        with self._lock:
            self._flights[threading.get_ident()] = flight
        try:
            yield
        finally:
            with self._lock:
                del self._flights[threading.get_ident()]
            self._remove(flight.name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The thread waits for its turn: its rows are not what takes long. Afterwards they have all of `timeout_s` again."""
        flight = self._flights.get(threading.get_ident())
        if flight is not None:
            flight.since = None
        try:
            yield
        finally:
            if flight is not None:
                flight.since = time.monotonic()

    def note(self, reason: Reason, message: str) -> None:
        """Say of the thread's flight why its process is about to end."""
        flight = self._flights.get(threading.get_ident())
        if flight is not None:
            self._put(flight.name, flight.to_json(reason, message))

    # --- deaths

    def suspicion(self, rows: Identities) -> Suspicion | None:
        """What the flights of dead processes say of these rows; None, as nearly always, if they name none."""
        deaths = np.zeros(rows.num_rows, dtype=np.intp)
        alone: dict[int, Verdict] = {}
        for death in self._deaths_near(rows.buckets()):
            for name in death.runs.keys() & rows.files.keys():
                file = rows.files[name]
                named = file.places[contains(death.runs[name], file.numbers)]
                deaths[named] += 1
                if death.is_alone:
                    alone |= dict.fromkeys(named.tolist(), death.verdict)
        if not deaths.any():
            return None
        # The row was alone in the last of them: that one was tried because others had named it before.
        return Suspicion(deaths, {row: verdict for row, verdict in alone.items() if deaths[row] >= FATAL_DEATHS})

    def _deaths_near(self, buckets: int) -> list[_Death]:
        # The name alone tells most flights of others apart: reading each would cost more than the batch's own file.
        mine = f"{self._me}~"
        names = [name for name in self._names() if _may_share(name, buckets) and not name.startswith(mine)]
        for name in names:
            if name not in self._deaths:
                machine, pid, started, *_ = name.split("~")
                mark = ProcessMark(machine, int(pid), float(started))
                # Ray gives rows to another node only when it has given up the first.
                is_dead = not (mark.is_here and mark.is_running)
                if is_dead and (death := self._read(name, mark)) is not None:
                    self._deaths[name] = death
        return [self._deaths[name] for name in names if name in self._deaths]

    def _read(self, name: str, mark: ProcessMark) -> _Death | None:
        """None where the flight came back after all, or its process died over the file, before it had the rows."""
        try:
            document = json.loads(read_bytes(join(self._folder, name)))
        except (OSError, ValueError):
            return None
        runs = {file: np.array(pairs, dtype=np.int64) for file, pairs in document["runs"].items()}
        if document["reason"] is not None:
            return _Death(runs, (Reason(document["reason"]), document["message"]))
        has_stalled = self._is_local and _size(join(self._folder, f"{_name_of(mark)}{_STALLED}")) > 0
        return _Death(runs, self._too_long() if has_stalled else (Reason.PROCESS_KILLED, _KILLED))

    def _too_long(self) -> Verdict:
        return Reason.TIMEOUT, f"no answer within {self._timeout_s:g} s"

    # --- the watchdog

    def _watch(self) -> None:
        tick_s = min(_TICK_S, self._timeout_s / 4)
        while True:
            if self._stalled is not None:
                # Code that never returns and holds Python's lock stops this thread too; that timer is C's.
                faulthandler.dump_traceback_later(self._timeout_s + 2 * tick_s, exit=True, file=self._stalled)
            if self._closed.wait(tick_s):
                faulthandler.cancel_dump_traceback_later()
                return
            with self._lock:
                flights = list(self._flights.values())
                oldest = time.monotonic() - self._timeout_s
                late = [flight for flight in flights if flight.since is not None and flight.since < oldest]
                if late:
                    self._end_process(flights, late)

    def _end_process(self, flights: Sequence[_Flight], late: Sequence[_Flight]) -> None:
        """Threads cannot be ended one by one. Ray starts a new process and gives it the same rows."""
        for flight in flights:
            if flight in late:
                self._put(flight.name, flight.to_json(*self._too_long()))
            else:
                self._remove(flight.name)
        logger.critical(
            "journal: no answer within %g s; ending the process: %s", self._timeout_s, list(late[0].runs)[:3]
        )
        os._exit(1)

    # --- files

    def _names(self) -> list[str]:
        try:
            # Not list_names: it asks for each file's size.
            return os.listdir(self._folder) if self._is_local else list_names(self._folder)
        except OSError:
            return []

    def _put(self, name: str, data: bytes) -> None:
        try:
            if self._is_local:
                # Not write_bytes: a folder that is gone belongs to an attempt that is over, and stays gone.
                Path(self._folder, name).write_bytes(data)
            else:
                write_bytes(join(self._folder, name), data)
        except OSError as error:
            logger.warning("journal: %s: a row that kills the process would not be found", error)

    def _remove(self, name: str) -> None:
        try:
            if self._is_local:
                os.unlink(join(self._folder, name))
            else:
                remove_tree(join(self._folder, name))
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("journal: %s", error)


def _name_of(mark: ProcessMark) -> str:
    return f"{mark.machine}~{mark.pid}~{mark.started:.0f}"


def _may_share(name: str, buckets: int) -> bool:
    return not name.endswith(_STALLED) and int(name.rpartition("~")[2], 16) & buckets != 0


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
