"""Files by path or URI, through fsspec: list, read, write, create exclusively, replace, redact.

Local paths and object stores answer alike, and nothing here relies on rename except for a local replace. Local files go
past fsspec, which reads '::' and '#' in a name as its own syntax and reports a linked folder as a file. What the files
mean, which suffixes count and when to retry belong to the callers.
"""

import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, cast
from urllib.parse import unquote

import fsspec
from fsspec import AbstractFileSystem

from scoring.errors import ConfigError, InputError

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
_URI = re.compile(f"({_SCHEME})(.*)", re.DOTALL)
_URI_IN_TEXT = re.compile(rf"{_SCHEME}(?:(?!{_SCHEME})\S)*")
_CHAINED = re.compile(rf"[A-Za-z0-9+.-]+::.*{_SCHEME}|{_SCHEME}.*::{_SCHEME}", re.DOTALL)
_FILE_URI = re.compile(r"(?:file|local)://(?:localhost(?=/))?|file:(?=/)", re.IGNORECASE)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
# Azure writes the container where other schemes write the user name; without it two containers would look like one.
_CONTAINER_IN_USERINFO = ("az://", "abfs://", "abfss://")
# Asking these for a folder is useless at best, and creates a bucket at worst.
_WITHOUT_FOLDERS = (*_EXTRAS, "memory", "http", "https")
_VERSION_FIELDS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
_CHUNK_BYTES = 1 << 20
_REMOVALS = 3


@dataclass(frozen=True)
class ListedFile:
    """One file of a listing. A local link to nothing is listed too, as 0 bytes of version 'missing'."""

    uri: str
    """Absolute path of a local file, links not resolved; otherwise the URI as it opens: redact before showing."""
    size_bytes: int
    version: str
    """ETag, or where there is none the time of the last change; in nanoseconds for a local file."""


@dataclass(frozen=True)
class _Entry:
    path: str
    is_folder: bool
    size_bytes: int
    version: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


# --- names


def is_local(uri: str) -> bool:
    """Whether this names a file of this machine: a plain path or a `file://` URI."""
    return _URI.match(uri) is None or _FILE_URI.match(uri) is not None


def absolute(path_or_uri: str, base: Path) -> str:
    """The absolute local path, relative to `base` and links not resolved; a URI of another scheme unchanged.

    `..` is folded by name, as `cd` does. Raises ConfigError for a chained URL.
    """
    if _CHAINED.match(path_or_uri):
        raise ConfigError(f"{redact_text(path_or_uri)}: chained URLs are not supported; name the store's own URI")
    file_uri = _FILE_URI.match(path_or_uri)
    if file_uri:
        return os.path.abspath(base / unquote(path_or_uri[file_uri.end() :]))
    return path_or_uri if _URI.match(path_or_uri) else os.path.abspath(base / path_or_uri)


def join(uri: str, *parts: str) -> str:
    """The location `parts` below `uri`, a local folder or a URI."""
    return "/".join([uri if uri.endswith("://") else uri.rstrip("/"), *(part.strip("/") for part in parts)])


def redact(uri: str) -> str:
    """The URI without user, password and query, as it may be shown and stored; a local path unchanged."""
    match = _URI.match(uri)
    if match is None or _FILE_URI.match(uri):
        return uri
    scheme, rest = match.groups()
    userinfo, host_and_path = _split_userinfo(rest.partition("?")[0])
    if scheme.lower() in _CONTAINER_IN_USERINFO and userinfo:
        host_and_path = f"{userinfo.partition(':')[0]}@{host_and_path}"
    return scheme + host_and_path


def redact_text(text: str) -> str:
    """The text with every URI in it redacted."""
    return _URI_IN_TEXT.sub(lambda match: redact(match.group()), text)


def _split_userinfo(rest: str) -> tuple[str, str]:
    authority = rest.partition("/")[0]
    # A secret written with an unescaped '/' ends the authority early: "key:se/cret@bucket".
    is_cut_short = "@" not in authority and re.search(r":(?!\d*$)", authority) is not None
    userinfo, _, host = (rest if is_cut_short else authority).rpartition("@")
    return userinfo, host if is_cut_short else host + rest[len(authority) :]


# --- listing


def expand(pattern: str) -> list[ListedFile]:
    """List a file, a folder or a glob (`*`, `?`, `[...]`, `**`), sorted by URI; [] where nothing matches.

    Folders are read to any depth, also one that a glob matches. Names that start with '_' or '.' are left out, unless
    the pattern spells that character. A file or folder of exactly this name comes before the glob. Suffixes are the
    caller's business. Raises InputError where a folder cannot be listed, or a name cannot be written as text.
    """
    try:
        found = {entry.path: entry for entry in _expanded(absolute(pattern, Path.cwd()))}
    except OSError as error:
        reason = redact_text(str(error))
        raise InputError(f"{redact(pattern)}: cannot be listed: {reason}; check name and permissions") from error
    return [_listed(found[path]) for path in sorted(found)]


def would_list(pattern: str, uri: str) -> bool:
    """Whether `expand(pattern)` would list a file of this name if it were there; looks at names alone."""
    names = [part for part in uri.split("/") if part]
    parts = [part for part in pattern.split("/") if part]
    is_literal = names[: len(parts)] == parts and _lists([], names[len(parts) :])
    return is_literal or _lists(parts, names)


def _expanded(pattern: str) -> Iterator[_Entry]:
    entry = _entry(pattern)
    if entry is not None and not entry.is_folder:
        yield entry
    elif entry is not None:
        yield from _walk(pattern)
    elif _has_magic(pattern):
        root, parts = _split_glob(pattern)
        if _entry(root or "/") is not None:
            yield from _glob(root, parts)


def _glob(folder: str, parts: Sequence[str]) -> Iterator[_Entry]:
    if "**" in parts[:1]:
        depth = len(folder.rstrip("/")) + 1
        yield from (e for e in _walk(folder) if _lists(parts, e.path[depth:].split("/")))
        return
    for entry in _children(folder):
        if not _is_match(entry.name, parts[0]):
            continue
        if not entry.is_folder and len(parts) == 1:
            yield entry
        elif entry.is_folder:
            yield from _glob(entry.path, parts[1:]) if parts[1:] else _walk(entry.path)


def _lists(parts: Sequence[str], names: Sequence[str]) -> bool:
    """Whether the glob `parts` match the path `names` or a folder above it; below that folder nothing is hidden."""
    if not parts:
        return not any(_is_hidden(name) for name in names)
    if not names:
        return False
    if parts[0] == "**":
        return _lists(parts[1:], names) or (not _is_hidden(names[0]) and _lists(parts, names[1:]))
    return _is_match(names[0], parts[0]) and _lists(parts[1:], names[1:])


def _is_match(name: str, part: str) -> bool:
    return fnmatchcase(name, part) and (not _is_hidden(name) or part.startswith(name[0]))


def _is_hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _has_magic(part: str) -> bool:
    return any(character in part for character in "*?[")


def _split_glob(pattern: str) -> tuple[str, list[str]]:
    """The folder above the first magic component, and the components from there on."""
    scheme, rest = _split_scheme(pattern)
    parts = rest.rstrip("/").split("/")
    first = next(index for index, part in enumerate(parts) if _has_magic(part))
    return scheme + "/".join(parts[:first]), parts[first:]


def _split_scheme(uri: str) -> tuple[str, str]:
    match = _URI.match(uri)
    return (match.group(1), match.group(2)) if match else ("", uri)


def _walk(folder: str) -> Iterator[_Entry]:
    """Every file below, hidden names left out; one flat listing on object stores, where a call a folder is slow."""
    if is_local(folder):
        yield from _walk_local(folder, frozenset())
        return
    fs, root = filesystem(folder)
    for name, info in fs.find(root, detail=True).items():
        below = name[len(root) :].strip("/").split("/")
        if info["type"] != "directory" and not any(_is_hidden(part) for part in below):
            yield _remote_entry(join(folder, *below), info)


def _walk_local(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[_Entry]:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder above itself would go round for ever
        return
    for entry in _children(folder):
        if _is_hidden(entry.name):
            continue
        yield from _walk_local(entry.path, above | {here}) if entry.is_folder else (entry,)


def _children(folder: str) -> list[_Entry]:
    if is_local(folder):
        folder = folder or "/"
        return [_local_entry(os.path.join(folder, name)) for name in sorted(os.listdir(folder))]
    fs, root = filesystem(folder)
    below = [(info["name"][len(root) :].strip("/"), info) for info in fs.ls(root, detail=True)]
    return [_remote_entry(join(folder, name), info) for name, info in below if name]


def _entry(uri: str) -> _Entry | None:
    try:
        if is_local(uri):
            return _local_entry(uri) if os.path.lexists(uri) else None
        fs, path = filesystem(uri)
        return _remote_entry(uri, fs.info(path))
    except FileNotFoundError:
        return None


def _local_entry(path: str) -> _Entry:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return _Entry(path, is_folder=False, size_bytes=0, version="missing")
    return _Entry(path, stat.S_ISDIR(status.st_mode), status.st_size, str(status.st_mtime_ns))


def _remote_entry(uri: str, info: dict[str, object]) -> _Entry:
    version = next((info[field] for field in _VERSION_FIELDS if info.get(field) is not None), "")
    # memory:// gives one file's time as a datetime or as a number, depending on the call.
    text = str(version.timestamp() if isinstance(version, datetime) else version).strip('"')
    return _Entry(uri, info["type"] == "directory", int(cast(int, info.get("size") or 0)), text)


def _listed(entry: _Entry) -> ListedFile:
    if not entry.path.isascii():
        try:
            entry.path.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{entry.path!r}: the file name is not valid UTF-8; rename it") from error
    return ListedFile(entry.path, entry.size_bytes, entry.version)


# --- reading and writing


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system and the path within it. Raises ConfigError where its driver is missing."""
    if is_local(uri):
        return fsspec.filesystem("file"), absolute(uri, Path.cwd())
    scheme = _split_scheme(uri)[0].removesuffix("://").lower()
    try:
        driver = fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{redact(uri)}: {_driver_advice(scheme, str(error))}") from error
    # Not url_to_fs: it would split a key at '::'.
    fs = fsspec.filesystem(scheme, **driver._get_kwargs_from_urls(uri))
    # Listings are cached for each process, and another process may have written since.
    fs.invalidate_cache()
    return fs, driver._strip_protocol(uri)


def open_input(uri: str, mode: str = "rb") -> IO[bytes]:
    """Open for reading; raises FileNotFoundError or another OSError."""
    fs, path = filesystem(uri)
    return cast(IO[bytes], open(path, mode) if is_local(uri) else fs.open(path, mode))


def read_bytes(uri: str) -> bytes:
    """The whole file; raises FileNotFoundError or another OSError."""
    fs, path = filesystem(uri)
    return Path(path).read_bytes() if is_local(uri) else cast(bytes, fs.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Write the file and the folders above it. A reader can see half of a local one: see `replace`."""
    fs, path = _writable(uri)
    if is_local(uri):
        Path(path).write_bytes(data)
    else:
        fs.pipe_file(path, data)


def create_exclusive(uri: str, data: bytes) -> bool:
    """Write the file only if there is none: True for the one caller that made it, False where it exists.

    It appears with its bytes in it, but on a local file system without hard links: there a reader can see it empty until the
    bytes follow, and for good if the writer dies.
    """
    fs, path = _writable(uri)
    if is_local(uri):
        return _link_exclusive(Path(path), data)
    try:
        # Not pipe_file(mode="create"): not every driver makes that exclusive.
        with fs.open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def _link_exclusive(target: Path, data: bytes) -> bool:
    if os.path.lexists(target):
        return False
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            file.write(data)
        try:
            os.link(unfinished, target)
        except FileExistsError:
            return False
        except OSError:  # no hard links here
            try:
                with target.open("xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
        return True
    finally:
        unfinished.unlink(missing_ok=True)


def replace(uri: str, data: bytes) -> None:
    """Write the file so that a reader sees the old bytes or the new ones, never a mix. Creates the folders above."""
    fs, path = _writable(uri)
    if not is_local(uri):
        fs.pipe_file(path, data)  # one put
        return
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    return _entry(absolute(uri, Path.cwd())) is not None


def remove_tree(uri: str) -> None:
    """Remove a file, or a folder and all below; nothing there is fine."""
    fs, path = filesystem(uri)
    if not is_local(uri):
        if fs.exists(path):
            fs.rm(path, recursive=True)
    elif os.path.isdir(path) and not os.path.islink(path):
        _remove_folder(path)
    else:
        Path(path).unlink(missing_ok=True)


def _remove_folder(path: str) -> None:
    """Tries again: processes that end late put files there and take them away meanwhile."""
    for left in reversed(range(_REMOVALS)):
        try:
            shutil.rmtree(path)
        except OSError:
            if not left:
                raise
        if not os.path.exists(path):
            return


def list_names(uri_dir: str) -> list[str]:
    """Names right below a folder, sorted, but those starting with '.' (unfinished replaces); [] without a folder."""
    try:
        names = [entry.name for entry in _children(absolute(uri_dir, Path.cwd()))]
    except FileNotFoundError:
        return []
    return sorted(name for name in names if not name.startswith("."))


def sha256_file(uri: str) -> str:
    """Hex digest of the file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open_input(uri) as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _writable(uri: str) -> tuple[AbstractFileSystem, str]:
    fs, path = filesystem(uri)
    if is_local(uri):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    elif not uri.lower().startswith(tuple(f"{scheme}://" for scheme in _WITHOUT_FOLDERS)):
        fs.makedirs(fs._parent(path), exist_ok=True)
    return fs, path


def _driver_advice(scheme: str, reason: str) -> str:
    if scheme in _EXTRAS:
        return f"the driver for {scheme}:// is not installed; run 'uv sync --extra {_EXTRAS[scheme]}'"
    return f"no driver for {scheme}:// ({reason}); use a local path, s3://, gs:// or az://"
