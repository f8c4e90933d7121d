"""Opening an input file to read it: the file that was listed and no later one, read again where a store falters.

Owns that check and the retries. What the bytes mean is `shards.py`'s and `reading.py`'s.
"""

import gzip
import io
import logging
import os
import stat
import time
import zlib
from collections.abc import Callable
from typing import IO, Any, TypeVar, cast

import pyarrow as pa

from scoring.errors import ScoringError
from scoring.storage import ListedFile, is_local, open_input, redact, redact_text

logger = logging.getLogger(__name__)

_TRIES = 3
_FIRST_WAIT_S = 1.0
# SMB and some NFS servers round the time of a change once they have written it out.
_CLOCK_SLACK_NS = 2 * 10**9
_REASON_CHARS = 300

# What a broken file raises where it is opened and read (tried by damaging files of every codec); other errors are bugs.
FILE_ERRORS = (OSError, EOFError, UnicodeDecodeError, zlib.error, pa.ArrowException)

T = TypeVar("T")


class ChangedFileError(OSError):
    """A file is no longer the one that was listed: its rows belong to another run."""


def open_listed(file: ListedFile) -> io.BufferedIOBase:
    """Open an input. Raises OSError where it cannot be read, ChangedFileError where its size or time of change differ.

    Of a file in a store the size alone is compared (drivers spell an ETag in one way when they list and in another when
    they open), and each read is tried `_TRIES` times.
    """
    return _open_local(file, open_input) if is_local(file.uri) else _open_remote(file)


def open_for_arrow(file: ListedFile) -> "pa.NativeFile | io.BufferedIOBase":
    """As `open_listed`, for arrow alone: it reads a local file itself.

    Through a Python object rows of 41 KB took 23 us of a core each to read, so 18.
    """
    return _open_local(file, pa.OSFile) if is_local(file.uri) else _open_remote(file)


def _open_local(file: ListedFile, open_uri: Callable[[str], Any]) -> Any:
    # A pipe among the inputs would block the open for ever.
    if not stat.S_ISREG(os.stat(file.uri).st_mode):
        raise OSError("is not a regular file")
    stream = open_uri(file.uri)
    # Of the name, once it is open: a file that took its place in between is told as well.
    status = os.stat(file.uri)
    if status.st_size != file.size_bytes or not _is_same_time(status.st_mtime_ns, file.version):
        stream.close()
        raise _changed(file, status.st_size)
    return stream


def _is_same_time(mtime_ns: int, version: str) -> bool:
    """A version that is no time is that of a link which led nowhere when it was listed."""
    return version.isdecimal() and abs(mtime_ns - int(version)) <= _CLOCK_SLACK_NS


def open_csv_text(file: ListedFile) -> io.BufferedIOBase:
    """A CSV file's bytes, decompressed where its name ends in .gz."""
    stream = open_listed(file)
    return cast(io.BufferedIOBase, gzip.GzipFile(fileobj=stream)) if is_gzip(file.uri) else stream


def is_gzip(uri: str) -> bool:
    return redact(uri).lower().endswith(".gz")


def describe(error: Exception) -> str:
    """One line of an error's text, without secrets, for a reader who knows which file it is about."""
    # fsspec's own FileNotFoundError says the path and nothing else.
    text = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or str(error)
    return (redact_text(text).strip() or type(error).__name__).splitlines()[0][:_REASON_CHARS]


def _open_remote(file: ListedFile) -> "_RemoteStream":
    stream = _RemoteStream(file.uri, lambda: open_input(file.uri))
    size_bytes = stream.size_bytes
    # A store that does not tell a size lists 0.
    if file.size_bytes and size_bytes is not None and size_bytes != file.size_bytes:
        stream.close()
        raise _changed(file, size_bytes)
    return stream


def _changed(file: ListedFile, size_bytes: int) -> ChangedFileError:
    return ChangedFileError(
        f"changed since it was listed ({file.size_bytes} bytes then, {size_bytes} now); rerun for the file as it is now"
    )


class _RemoteStream(io.BufferedIOBase):
    """A file in a store, opened and read with retries; whatever its driver raises comes out as an OSError.

    Drivers raise their libraries' own classes (botocore, aiohttp, azure), which the callers could not tell from a bug.
    """

    def __init__(self, uri: str, open_again: Callable[[], IO[bytes]]) -> None:
        self._uri = uri
        self._open_again = open_again
        self._position = 0
        self._stream = self._try(open_again, lambda: None)

    @property
    def size_bytes(self) -> int | None:
        """The size as it was when the file was opened; None where the store does not tell."""
        size: int | None = getattr(self._stream, "size", None)
        return size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = self._try(lambda: self._stream.seek(offset, whence), self._reopen)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        data = self._try(lambda: self._stream.read(-1 if size is None else size), self._reopen)
        self._position += len(data)
        return data

    def read1(self, size: int = -1) -> bytes:
        return self.read(size)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()

    def _reopen(self) -> None:
        # A driver's own stream may be left half read.
        before = self.size_bytes
        self._stream = self._open_again()
        if self.size_bytes != before:
            raise ChangedFileError("changed while it was read; rerun for the file as it is now")
        self._stream.seek(self._position)

    def _try(self, action: Callable[[], T], recover: Callable[[], None]) -> T:
        for attempt in range(1, _TRIES + 1):
            try:
                if attempt > 1:
                    recover()
                return action()
            except (ScoringError, ChangedFileError, FileNotFoundError, PermissionError):
                raise  # waiting does not mend these
            except Exception as error:
                if attempt == _TRIES or _is_refusal(error):
                    raise OSError(f"{type(error).__name__}: {describe(error)} (try {attempt} of {_TRIES})") from error
                wait_s = _FIRST_WAIT_S * 2 ** (attempt - 1)
                logger.warning("%s: %s; reading it again in %g s", redact(self._uri), describe(error), wait_s)
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


def _is_refusal(error: Exception) -> bool:
    """Whether a store answered that it will not serve this, as aiohttp, gcsfs and azure tell it; waiting would not help."""
    answers = [getattr(error, name, None) for name in ("status", "code", "status_code")]
    return any(isinstance(answer, int) and 400 <= answer < 500 and answer not in (408, 429) for answer in answers)
