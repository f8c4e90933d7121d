"""The engine cache: what takes seconds to minutes to build, built once, however many actors start.

Owns entries (a folder of files under a kind and a key), the lock around a build and the check of what is read back. An
entry counts only with its `done.json`, which names every file's size and sha256: a half-written or foreign one is built
anew. A cache that is a URI has a local copy on each node.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from scoring.storage import (
    create_exclusive,
    exists,
    is_local,
    join,
    read_bytes,
    redact,
    remove_tree,
    write_bytes,
)

logger = logging.getLogger(__name__)

_DONE = "done.json"
# Longer than any build seen (TensorRT: 100 s); a remote lock that old belongs to a machine that is gone.
_REMOTE_LOCK_S = 900.0
_POLL_S = 2.0


@dataclass(frozen=True)
class Key:
    """What an entry depends on, all of it: the parts are hashed, and kept readable in `done.json`."""

    kind: str
    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        text = json.dumps({"kind": self.kind, **self.parts}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def path(self) -> str:
        return f"{self.kind}/{self.digest}"


class EngineCache:
    """Entries under `uri` (a folder, or a URI with a local copy). Thread- and process-safe."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._remote = None if is_local(uri) else uri
        self.local = Path("~/.cache/multimodal-scorer" if self._remote else uri).expanduser() / "engines"

    def get(self, key: Key, build: Callable[[Path], None]) -> Path:
        """The entry's folder, built by `build(folder)` if nobody has; others wait for the one who builds."""
        folder = self.local / key.path
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if _is_whole(folder, key):
                logger.info("engine cache: %s found", key.path)
                return folder
            if self._remote and self._download(key, folder):
                return folder
            with _RemoteLock(self._remote, key) as waited:
                if waited and self._download(key, folder):
                    return folder
                self._build(key, folder, build)
        return folder

    def find(self, key: Key) -> Path | None:
        """The entry's folder if somebody has built it."""
        folder = self.local / key.path
        if _is_whole(folder, key):
            return folder
        if self._remote is None:
            return None
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            return folder if _is_whole(folder, key) or self._download(key, folder) else None

    def _build(self, key: Key, folder: Path, build: Callable[[Path], None]) -> None:
        start = time.perf_counter()
        staging = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
        staging.mkdir()
        try:
            build(staging)
            _write_done(staging, key)
            shutil.rmtree(folder, ignore_errors=True)
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        logger.info("engine cache: %s built in %.1f s", key.path, time.perf_counter() - start)
        if self._remote:
            self._upload(key, folder)

    def _upload(self, key: Key, folder: Path) -> None:
        assert self._remote is not None
        try:
            names = sorted(path.name for path in folder.iterdir() if path.name != _DONE)
            for name in [*names, _DONE]:
                write_bytes(join(self._remote, "engines", key.path, name), (folder / name).read_bytes())
        except OSError as error:
            logger.warning("engine.cache: cannot keep %s in %s: %s", key.path, redact(self._remote), error)

    def _download(self, key: Key, folder: Path) -> bool:
        assert self._remote is not None
        source = join(self._remote, "engines", key.path)
        staging = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
        try:
            if not exists(join(source, _DONE)):
                return False
            staging.mkdir()
            done = read_bytes(join(source, _DONE))
            for name in json.loads(done)["files"]:
                (staging / name).write_bytes(read_bytes(join(source, name)))
            (staging / _DONE).write_bytes(done)
            if not _is_whole(staging, key):
                return False
            shutil.rmtree(folder, ignore_errors=True)
            staging.rename(folder)
        except (OSError, ValueError, KeyError) as error:
            logger.warning("engine.cache: cannot read %s from %s: %s", key.path, redact(self._remote), error)
            return False
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        logger.info("engine cache: %s fetched", key.path)
        return True


def _write_done(folder: Path, key: Key) -> None:
    files = {path.name: _describe(path) for path in folder.iterdir()}
    document = {"kind": key.kind, "parts": dict(key.parts), "files": files}
    (folder / _DONE).write_text(json.dumps(document, indent=1))


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as stream:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _is_whole(folder: Path, key: Key) -> bool:
    """Whether the entry is this key's and every file is as it was written."""
    if not folder.is_dir():
        return False
    try:
        document = json.loads((folder / _DONE).read_text())
        is_ours = document["kind"] == key.kind and document["parts"] == dict(key.parts)
        is_same = all(_describe(folder / name) == facts for name, facts in document["files"].items())
    except (OSError, ValueError, KeyError):
        is_ours = is_same = False
    if not (is_ours and is_same):
        logger.warning("engine cache: %s is damaged or not ours; it is built again", folder)
    return is_ours and is_same


class _RemoteLock:
    """One builder among nodes: a small object at the cache's URI. Entering returns whether another held it first."""

    def __init__(self, remote: str | None, key: Key) -> None:
        self._uri = join(remote, "engines", f"{key.path}.lock") if remote else None
        self._holds = False

    def __enter__(self) -> bool:
        if self._uri is None:
            return False
        waited = False
        me = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}).encode()
        try:
            while not create_exclusive(self._uri, me):
                waited = True
                if self._is_stale():
                    remove_tree(self._uri)
                else:
                    time.sleep(_POLL_S)
            self._holds = True
        except OSError as error:
            logger.warning("engine.cache: cannot lock %s (%s); building without", redact(self._uri), error)
        return waited

    def _is_stale(self) -> bool:
        assert self._uri is not None
        try:
            return time.time() - float(json.loads(read_bytes(self._uri))["time"]) > _REMOTE_LOCK_S
        except (OSError, ValueError, KeyError):
            return False  # gone, or being written

    def __exit__(self, *_: object) -> None:
        if self._uri is not None and self._holds:
            remove_tree(self._uri)
