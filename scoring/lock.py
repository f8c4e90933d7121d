"""Who may act on a place, one holder after another: a chain of numbered entries, each made by exclusive create.

Owns the chain, the heartbeat and the takeover. The last entry is the holder's; whoever follows makes the next one, and of two
that try only one can. So a holder that slept through its lease finds an entry after its own when it wakes up, and whatever it
wanted to put there, a commit above all, is refused by the same exclusive create that would have made it.

A holder of this host whose process is gone is followed at once. Of any other the heartbeat is watched for one lease.
"""

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scoring.errors import LockError
from scoring.processes import ProcessMark
from scoring.storage import create_exclusive, exists, join, list_names, read_bytes, redact, remove_tree, replace

logger = logging.getLogger(__name__)

# A heartbeat that stands still for so long is a dead holder's. Object stores answer within a second or two; a Python process
# has been seen to pause for 8 s on a machine that swapped.
LEASE_S = 30.0
_BEATS = 4
_POLLS = 20


@dataclass(frozen=True)
class Entry:
    """One entry of a chain, as it was read; empty where its maker died before it wrote."""

    number: int
    document: Mapping[str, Any]

    @property
    def is_released(self) -> bool:
        return bool(self.document.get("released"))


class Chain:
    """The entries below one folder or URI."""

    def __init__(self, uri: str, what: str, lease_s: float = LEASE_S) -> None:
        self._uri = uri
        self._what = what
        self._lease_s = lease_s

    def tail(self) -> Entry | None:
        """The last entry."""
        names = [name for name in list_names(self._uri) if name.endswith(".json")]
        return self._read(max(int(name.removesuffix(".json")) for name in names)) if names else None

    def append(self, after: int, document: Mapping[str, Any]) -> bool:
        """Make the entry that follows number `after` (-1: the first); False where somebody else has."""
        return create_exclusive(self.uri_of(after + 1), json.dumps(document).encode())

    def acquire(self, *, waits: bool = False) -> "Hold":
        """Become the holder. Raises LockError where another one lives, unless `waits`."""
        me = {"host": socket.gethostname(), **asdict(ProcessMark.current()), "token": uuid.uuid4().hex, "beat": 0}
        while True:
            last = self.tail()
            if last is not None and not self._may_follow(last, waits=waits):
                continue
            number = -1 if last is None else last.number
            if self.append(number, me):
                return Hold(self, number + 1, me, self._lease_s)

    def _may_follow(self, last: Entry, *, waits: bool) -> bool:
        """Whether the last entry's holder is gone; False: look again, something has changed. Raises LockError."""
        if last.is_released:
            return True
        mark = _mark_of(last.document)
        if mark is not None and mark.is_here and not mark.is_running:
            logger.warning(
                "%s: its holder, process %s of this host, is gone; taking over", self._what, last.document["pid"]
            )
            return True
        start = time.monotonic()
        while time.monotonic() - start < self._lease_s:
            time.sleep(self._lease_s / _POLLS)
            now = self.tail()
            if now is None or now.number != last.number or now.is_released:
                return False
            if now.document != last.document:
                if waits:
                    return False
                raise LockError(
                    f"{self._what} at {redact(self._uri)} is held by process {now.document.get('pid')} on "
                    f"{now.document.get('host')}, which is alive; wait for it, or stop it and run the same command again"
                )
        logger.warning(
            "%s: process %s on %s showed no sign of life for %.0f s; taking over",
            self._what,
            last.document.get("pid"),
            last.document.get("host"),
            self._lease_s,
        )
        return True

    def forget_before(self, number: int) -> None:
        """Remove entries that nobody needs any more: all before the holder's own."""
        for name in list_names(self._uri):
            if name.endswith(".json") and int(name.removesuffix(".json")) < number:
                remove_tree(join(self._uri, name))

    def _read(self, number: int) -> Entry:
        try:
            return Entry(number, json.loads(read_bytes(self.uri_of(number))))
        except (FileNotFoundError, ValueError):  # removed meanwhile, or its maker died before it wrote
            return Entry(number, {})

    def uri_of(self, number: int) -> str:
        """The entry's own file."""
        return join(self._uri, f"{number:08d}.json")

    @property
    def what(self) -> str:
        """What the chain is for, in messages."""
        return self._what


class Hold:
    """One holder's time: a thread keeps the heartbeat going until `release`."""

    def __init__(self, chain: Chain, number: int, document: Mapping[str, Any], lease_s: float) -> None:
        self.chain = chain
        self.number = number
        self._document = dict(document)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(lease_s / _BEATS,), name="heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LockError if another one has followed."""
        if not self._is_ours():
            raise LockError(
                f"{self.chain.what}: another process took over while this one did not answer; what it does counts, this one "
                "ends. Run the same command again to see that run's result"
            )

    def _is_ours(self) -> bool:
        # A chain that is gone was dropped by who followed: a heartbeat would bring it back.
        return exists(self.chain.uri_of(self.number)) and not exists(self.chain.uri_of(self.number + 1))

    def _beat(self, interval_s: float) -> None:
        while not self._is_over.wait(interval_s):
            try:
                if not self._is_ours():
                    logger.warning("%s: another process took over", self.chain.what)
                    return
                self._document["beat"] += 1
                replace(self.chain.uri_of(self.number), json.dumps(self._document).encode())
            except OSError as error:  # the next beat may get through; if none does, another process takes over
                logger.warning("%s: the heartbeat failed: %s", self.chain.what, error)

    def release(self) -> None:
        """Stop the heartbeat and let the next one follow at once."""
        self._is_over.set()
        self._thread.join()
        # Not where the whole chain is gone with the work it guarded.
        if exists(self.chain.uri_of(self.number)):
            replace(self.chain.uri_of(self.number), json.dumps({**self._document, "released": True}).encode())

    def end(self) -> None:
        """Stop the heartbeat alone: the chain is about to be removed."""
        self._is_over.set()
        self._thread.join()


def _mark_of(document: Mapping[str, Any]) -> ProcessMark | None:
    try:
        return ProcessMark(document["machine"], document["pid"], document["started"])
    except KeyError:  # its maker died before it wrote
        return None
