"""A preparer in a process that starts before Ray does: AutoGluon is imported while Ray starts, 9 to 11 s on an H100's host.

Owns that process and how it is spoken to, one call at a time over a socket of this user's. No Ray inside.
"""

import logging
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from scoring.config import ScoreConfig
from scoring.parity import Scores
from scoring.preparer import Preparer
from scoring.processes import ProcessMark
from scoring.sample import Sample

logger = logging.getLogger(__name__)

_POLL_S = 0.1


@dataclass(frozen=True)
class Address:
    """Where a process of this machine listens, soon after its start, and what a caller has to know."""

    socket: str
    key: bytes = field(repr=False)
    process: ProcessMark

    def connect(self) -> Connection:
        """Raises OSError where the process is gone, AuthenticationError for another key."""
        while not Path(self.socket).exists() and self.process.is_running:
            time.sleep(_POLL_S)
        return Client(self.socket, "AF_UNIX", authkey=self.key)


class EarlyPreparer:
    """The process. It ends when this object, or the process that has it, does."""

    def __init__(self, config: ScoreConfig, predictor_hash: str) -> None:
        # OpenMP's threads that spin while they wait would keep Ray from its cores; what AutoGluon prints must not come after the
        # job's closing line.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scoring.early_preparer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            start_new_session=True,  # Ctrl-C is for the job: this one ends with it
        )
        # Not below the cache: a Unix socket's path has 107 characters at most.
        socket = Path(tempfile.mkdtemp(prefix="preparer-")) / "socket"
        self.address = Address(str(socket), secrets.token_bytes(32), ProcessMark.of(self._process.pid))
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone already, which its caller finds out
            pickle.dump((config, predictor_hash, self.address), self._process.stdin)
            self._process.stdin.flush()

    def close(self) -> None:
        """End it now; it is not asked again."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(Path(self.address.socket).parent, ignore_errors=True)


class RemotePreparer:
    """A `Preparer` elsewhere on this machine; where that is gone, what `instead` gives does its work."""

    def __init__(self, address: Address, instead: Callable[[], Preparer]) -> None:
        self._address = address
        self._instead = instead
        self._connection: Connection | None = None
        self._own: Preparer | None = None

    def spec(self) -> str:
        """See `Preparer.spec`."""
        spec: str = self._ask("spec")
        return spec

    def build(self, spec_json: str, *, for_gpu: bool, rtx_capabilities: Sequence[str] = ()) -> None:
        """See `Preparer.build`."""
        self._ask("build", spec_json, for_gpu=for_gpu, rtx_capabilities=rtx_capabilities)

    def reference(self, spec_json: str, sample: Sample | None) -> Scores | None:
        """See `Preparer.reference`."""
        scores: Scores | None = self._ask("reference", spec_json, sample)
        return scores

    def _ask(self, name: str, *arguments: Any, **options: Any) -> Any:
        if self._own is None:
            try:
                if self._connection is None:
                    self._connection = self._address.connect()
                self._connection.send((name, arguments, options))
                is_done, answer = self._connection.recv()
            except (OSError, EOFError, AuthenticationError) as error:
                logger.warning(
                    "preparer: the process that was started before Ray is gone (%s: %s), its work is done here",
                    *(type(error).__name__, error),
                )
                self._own = self._instead()
            else:
                if not is_done:
                    raise answer
                return answer
        return getattr(self._own, name)(*arguments, **options)


def serve(listener: Listener, preparer: Any) -> None:
    """Answer whoever knows the key, one after the other, until the listener is closed (OSError)."""
    while True:
        with suppress(AuthenticationError, EOFError, ConnectionError), listener.accept() as connection:
            while True:
                name, arguments, options = connection.recv()
                connection.send(_answer(preparer, name, arguments, options))


def _answer(preparer: Any, name: str, arguments: Sequence[Any], options: dict[str, Any]) -> tuple[bool, Any]:
    try:
        return True, getattr(preparer, name)(*arguments, **options)
    except Exception as error:
        logger.info("preparer: %s failed", name, exc_info=True)
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error of a library's own that cannot travel
            return False, RuntimeError(f"{type(error).__name__}: {error}")
        return False, error


def _end_with_parent(folder: Path) -> None:
    """Ends this process when the one that started it closes its side, as its end does, however it comes."""
    sys.stdin.buffer.read()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main() -> None:
    """Started by `EarlyPreparer`, which tells it everything on standard input."""
    config, predictor_hash, address = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, args=(Path(address.socket).parent,), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    preparer = Preparer(config, predictor_hash)
    # Who calls before the import is done waits.
    with Listener(address.socket, "AF_UNIX", authkey=address.key) as listener:
        with suppress(Exception):  # it is raised again where it is asked for
            preparer.load()
        serve(listener, preparer)


if __name__ == "__main__":
    main()
