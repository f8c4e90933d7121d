"""Storage on real files and on memory://, which stands in for an object store."""

import hashlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest

from scoring.errors import ConfigError, InputError
from scoring.storage import (
    ListedFile,
    absolute,
    create_exclusive,
    exists,
    expand,
    filesystem,
    is_local,
    join,
    list_names,
    open_input,
    read_bytes,
    redact,
    redact_text,
    remove_tree,
    replace,
    sha256_file,
    would_list,
    write_bytes,
)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "root")
        return
    folder = f"memory://{uuid.uuid4().hex}/root"
    yield folder
    remove_tree(folder.removesuffix("/root"))


def fill(root: str, *names: str) -> None:
    for name in names:
        write_bytes(join(root, name), name.encode())


def names_below(root: str, pattern: str) -> list[str]:
    return [file.uri.removeprefix(f"{root}/") for file in expand(pattern)]


# --- names


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("/a/b", True),
        ("a/b", True),
        ("file:///a", True),
        ("file:/a", True),
        ("/a/s3://b", True),
        ("s3://b/x", False),
        ("memory://x", False),
        ("https://h/x", False),
    ],
)
def test_is_local(uri: str, local: bool) -> None:
    assert is_local(uri) is local


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", "/base/a/b"),
        ("./a/../b/", "/base/b"),
        ("/a//b", "/a/b"),
        ("a::b#c?d", "/base/a::b#c?d"),
        ("file:///a%20b", "/a b"),
        ("file://localhost/a", "/a"),
        ("file:/a", "/a"),
        ("s3://b/../x", "s3://b/../x"),
        ("s3://b/a::b", "s3://b/a::b"),
    ],
)
def test_absolute(text: str, expected: str) -> None:
    assert absolute(text, Path("/base")) == expected


def test_chained_url_is_refused_without_its_secret() -> None:
    with pytest.raises(ConfigError, match="chained URLs are not supported") as caught:
        absolute("simplecache::s3://key:hush@b/x", Path("/base"))
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "parts", "expected"),
    [
        ("/a", ("b", "c"), "/a/b/c"),
        ("/a/", ("b/",), "/a/b"),
        ("/", ("a",), "/a"),
        ("s3://b/x/", ("y",), "s3://b/x/y"),
        ("/a", (), "/a"),
    ],
)
def test_join(uri: str, parts: Sequence[str], expected: str) -> None:
    assert join(uri, *parts) == expected


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://bucket/a/b@c.csv", "s3://bucket/a/b@c.csv"),
        ("s3://key:hush@bucket/a", "s3://bucket/a"),
        ("s3://key:hu/sh@bucket/a", "s3://bucket/a"),
        ("s3://key:hu@sh@bucket/a", "s3://bucket/a"),
        ("https://hush@host:8080/a@b?sig=hush#x", "https://host:8080/a@b"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("abfs://box@account.example/a?sig=hush", "abfs://box@account.example/a"),
        ("abfss://box:hush@account.example/a", "abfss://box@account.example/a"),
        ("az://box/a", "az://box/a"),
        ("/a/b@c?d=1", "/a/b@c?d=1"),
        ("memory://a/b", "memory://a/b"),
    ],
)
def test_redact(uri: str, shown: str) -> None:
    assert redact(uri) == shown


def test_redact_text_finds_every_uri() -> None:
    text = (
        "cannot copy 's3://k:hush@b/x' to ['https://u:hush@h/y?sig=hush','gs://t:hush@c/z']: "
        "HTTPS://u:hu'sh@h, a@b.example:1 simplecache::s3://k:hush@b"
    )
    shown = redact_text(text)
    assert "hush" not in shown
    assert "hu'sh" not in shown
    assert shown.startswith("cannot copy 's3://b/x' to ['https://h/y")
    assert "gs://c/z" in shown
    assert "a@b.example:1" in shown


# --- listing


def test_a_file_is_listed_with_its_size(root: str) -> None:
    fill(root, "a.csv")
    (file,) = expand(join(root, "a.csv"))
    assert (file.uri, file.size_bytes) == (f"{root}/a.csv", 5)


def test_nothing_there_is_an_empty_list(root: str) -> None:
    fill(root, "a.csv")
    assert expand(join(root, "b.csv")) == []
    assert expand(join(root, "b*.csv")) == []
    assert expand(join(root, "none", "*.csv")) == []
    assert expand(join(root, "none", "**", "*.csv")) == []


def test_folder_is_read_to_any_depth_without_hidden_names(root: str) -> None:
    fill(root, "b.csv", "a/x.csv", "a/b/c/y.txt", "day=1/hour=_2/z.parquet")
    fill(root, "_SUCCESS", ".c.csv", "_tmp/x.csv", "a/.git/x.csv", "a/_x.csv")
    assert names_below(root, root) == ["a/b/c/y.txt", "a/x.csv", "b.csv", "day=1/hour=_2/z.parquet"]
    assert names_below(root, root + "/") == names_below(root, root)


def test_hidden_names_above_the_folder_do_not_matter(root: str) -> None:
    below = join(root, "_staging", ".v1")
    fill(below, "a.csv", "b/c.csv")
    assert names_below(below, below) == ["a.csv", "b/c.csv"]
    assert names_below(below, join(below, "*.csv")) == ["a.csv"]


TREE = (
    "a.csv",
    "b.csv",
    "b.txt",
    "_c.csv",
    "d=1/x.csv",
    "d=1/e/y.csv",
    "d=2/x.csv",
    "d=2/_t/x.csv",
    "s.csv/p0",
    "s.csv/_p1",
)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.csv", ["a.csv", "b.csv", "s.csv/p0"]),
        ("?.csv", ["a.csv", "b.csv", "s.csv/p0"]),
        ("[!a].csv", ["b.csv", "s.csv/p0"]),
        ("_*.csv", ["_c.csv"]),
        ("d=*", ["d=1/e/y.csv", "d=1/x.csv", "d=2/x.csv"]),
        ("d=*/", ["d=1/e/y.csv", "d=1/x.csv", "d=2/x.csv"]),
        ("d=*/*.csv", ["d=1/x.csv", "d=2/x.csv"]),
        ("*/x.csv", ["d=1/x.csv", "d=2/x.csv"]),
        ("d=2/_*/x.csv", ["d=2/_t/x.csv"]),
        ("**/x.csv", ["d=1/x.csv", "d=2/x.csv"]),
        ("**/*.csv", ["a.csv", "b.csv", "d=1/e/y.csv", "d=1/x.csv", "d=2/x.csv", "s.csv/p0"]),
        ("d=1/**", ["d=1/e/y.csv", "d=1/x.csv"]),
        ("*/**/y.csv", ["d=1/e/y.csv"]),
        ("**/e", ["d=1/e/y.csv"]),
    ],
)
def test_glob(root: str, pattern: str, expected: list[str]) -> None:
    fill(root, *TREE)
    assert names_below(root, join(root, pattern) + ("/" if pattern.endswith("/") else "")) == expected


@pytest.mark.parametrize(
    "pattern",
    ["", "*", "*.csv", "_*.csv", "d=*", "d=*/*.csv", "d=2/_*/x.csv", "**/x.csv", "**", "**/e", "a.csv", "*/**/y.csv"],
)
def test_would_list_says_what_expand_does(root: str, pattern: str) -> None:
    fill(root, *TREE)
    full = join(root, pattern) if pattern else root
    listed = set(names_below(root, full))
    assert {name for name in TREE if would_list(full, join(root, name))} == listed


def test_file_name_with_glob_characters_is_found_literally(root: str) -> None:
    fill(root, "a[1].csv", "a1.csv", "b*.csv", "b2.csv", "f[x]/a.csv", "fx/a.csv")
    assert names_below(root, join(root, "a[1].csv")) == ["a[1].csv"]
    assert names_below(root, join(root, "b*.csv")) == ["b*.csv"]
    assert names_below(root, join(root, "f[x]")) == ["f[x]/a.csv"]
    assert names_below(root, join(root, "f?x]", "*.csv")) == ["f[x]/a.csv"]
    assert names_below(root, root) == ["a1.csv", "a[1].csv", "b*.csv", "b2.csv", "f[x]/a.csv", "fx/a.csv"]


def test_local_name_with_a_chain_mark_is_listed_and_read(tmp_path: Path) -> None:
    fill(str(tmp_path), "a::b.csv")
    (file,) = expand(str(tmp_path))
    assert file.uri == f"{tmp_path}/a::b.csv"
    assert read_bytes(file.uri) == b"a::b.csv"


@pytest.mark.parametrize("name", ["a#b.csv", "a b.csv", "ä.csv", "100%25.csv"])
def test_odd_names_are_listed_and_read(root: str, name: str) -> None:
    fill(root, name)
    (file,) = expand(root)
    assert file.uri == f"{root}/{name}"
    assert read_bytes(file.uri) == name.encode()
    assert expand(file.uri) == [file]


def test_listing_is_the_same_whichever_way_a_file_was_named(root: str) -> None:
    fill(root, "a/x.csv")
    listings = [expand(join(root, *parts)) for parts in ([], ["a"], ["a", "x.csv"], ["*", "*.csv"], ["**", "*.csv"])]
    assert all(listing == listings[0] and len(listing) == 1 for listing in listings)


def test_version_changes_with_the_content(root: str) -> None:
    fill(root, "a.csv")
    (before,) = expand(root)
    assert expand(root) == [before]
    replace(before.uri, b"b.csv")
    (after,) = expand(root)
    assert after.size_bytes == before.size_bytes
    assert after.version != before.version


def test_local_version_is_the_modification_time(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"x")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    assert expand(str(path)) == [ListedFile(str(path), 1, "1700000000123456789")]


def test_file_of_another_process_is_seen_at_once(tmp_path: Path) -> None:
    root = str(tmp_path)
    fill(root, "a.csv")
    assert len(expand(root)) == 1
    subprocess.run([sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", join(root, "b.csv")], check=True)
    assert names_below(root, root) == ["a.csv", "b.csv"]


def test_linked_files_and_folders_keep_the_name_of_the_link(tmp_path: Path) -> None:
    fill(str(tmp_path / "blobs"), "one", "d/two")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.csv").symlink_to(tmp_path / "blobs" / "one")
    (data / "linked").symlink_to(tmp_path / "blobs" / "d")
    (data / "lost.csv").symlink_to(tmp_path / "nowhere")
    files = {file.uri.removeprefix(f"{data}/"): file for file in expand(str(data))}
    assert list(files) == ["a.csv", "linked/two", "lost.csv"]
    assert files["a.csv"].size_bytes == 3
    assert (files["lost.csv"].size_bytes, files["lost.csv"].version) == (0, "missing")


def test_link_to_a_folder_above_does_not_go_round(tmp_path: Path) -> None:
    fill(str(tmp_path), "a/x.csv")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert names_below(str(tmp_path), str(tmp_path)) == ["a/x.csv"]
    assert names_below(str(tmp_path), f"{tmp_path}/**/*.csv") == ["a/x.csv"]


def test_relative_pattern_is_listed_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path), "a.csv")
    monkeypatch.chdir(tmp_path)
    assert [file.uri for file in expand("*.csv")] == [f"{tmp_path}/a.csv"]
    assert [file.uri for file in expand(f"file://{tmp_path}")] == [f"{tmp_path}/a.csv"]


def test_folder_that_cannot_be_listed_is_an_input_error(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(InputError, match=f"{loop}: cannot be listed"):
        expand(str(loop))


def test_name_that_is_not_text_is_an_input_error(tmp_path: Path) -> None:
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv"))).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    with pytest.raises(InputError, match="not valid UTF-8; rename it"):
        expand(str(tmp_path))


# --- drivers


@pytest.mark.parametrize(
    ("uri", "extra", "module"),
    [
        ("s3://key:hush@b/x", "s3", "s3fs"),
        ("gs://b/x", "gcs", "gcsfs"),
        ("gcs://b/x", "gcs", "gcsfs"),
        ("az://b/x", "azure", "adlfs"),
        ("abfs://b/x", "azure", "adlfs"),
        ("abfss://b@a/x", "azure", "adlfs"),
    ],
)
def test_missing_driver_names_the_extra(uri: str, extra: str, module: str) -> None:
    if find_spec(module):
        pytest.skip(f"{module} is installed")
    with pytest.raises(ConfigError, match=f"is not installed; run 'uv sync --extra {extra}'") as caught:
        filesystem(uri)
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError):
        expand(uri)


def test_unknown_scheme_names_those_that_work() -> None:
    with pytest.raises(ConfigError, match=r"no driver for nope:// .*use a local path, s3://, gs:// or az://"):
        read_bytes("nope://b/x")


# --- reading and writing


def test_write_creates_folders_and_reads_back(root: str) -> None:
    uri = join(root, "a", "b", "c.bin")
    assert not exists(uri)
    write_bytes(uri, b"\x00one")
    write_bytes(uri, b"two")
    assert exists(uri)
    assert exists(join(root, "a"))
    assert read_bytes(uri) == b"two"
    with open_input(uri) as file:
        assert file.read(2) == b"tw"
    assert sha256_file(uri) == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"


def test_sha256_of_a_file_longer_than_one_piece(root: str) -> None:
    data = os.urandom((1 << 21) + 7)
    write_bytes(join(root, "big"), data)
    assert sha256_file(join(root, "big")) == hashlib.sha256(data).hexdigest()


def test_missing_file_is_file_not_found(root: str) -> None:
    for read in (read_bytes, open_input, sha256_file):
        with pytest.raises(FileNotFoundError):
            read(join(root, "none"))


def test_create_exclusive_writes_once(root: str) -> None:
    uri = join(root, "locks", "lock")
    assert create_exclusive(uri, b"first") is True
    assert create_exclusive(uri, b"second") is False
    assert read_bytes(uri) == b"first"


def test_create_exclusive_has_one_winner_among_threads(tmp_path: Path) -> None:
    num_threads = 8
    barrier = Barrier(num_threads)
    uris = [str(tmp_path / "locks" / str(i)) for i in range(50)]

    def race(me: int) -> list[bool]:
        wins = []
        for uri in uris:
            barrier.wait(timeout=30)
            wins.append(create_exclusive(uri, str(me).encode()))
        return wins

    with ThreadPoolExecutor(num_threads) as pool:
        wins = list(pool.map(race, range(num_threads)))
    for i, uri in enumerate(uris):
        winners = [me for me in range(num_threads) if wins[me][i]]
        assert len(winners) == 1
        assert read_bytes(uri) == str(winners[0]).encode()


def test_replace_is_seen_whole_by_readers(tmp_path: Path) -> None:
    uri = str(tmp_path / "latest.json")
    versions = [bytes([65 + i]) * 200_000 for i in range(4)]
    replace(uri, versions[0])
    is_done = Event()

    def read_all() -> set[bytes]:
        seen = set()
        while not is_done.is_set():
            seen.add(read_bytes(uri))
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read_all) for _ in range(2)]
        for i in range(100):
            replace(uri, versions[i % 4])
        is_done.set()
        seen = set().union(*(reader.result(timeout=30) for reader in readers))
    assert seen
    assert seen <= set(versions)
    assert os.listdir(tmp_path) == ["latest.json"]


def test_replace_creates_folders_and_overwrites(root: str) -> None:
    uri = join(root, "deep", "er", "x")
    replace(uri, b"one")
    replace(uri, b"2")
    assert read_bytes(uri) == b"2"
    assert list_names(join(root, "deep", "er")) == ["x"]


def test_replace_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "below").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        replace(str(target), b"new")
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(target) == ["below"]


def test_list_names_skips_unfinished_replaces(root: str) -> None:
    fill(root, "b", "a", "_SUCCESS", "d/e", ".x.123.tmp")
    assert list_names(root) == ["_SUCCESS", "a", "b", "d"]
    assert list_names(join(root, "none")) == []


def test_remove_tree_removes_that_and_nothing_else(root: str) -> None:
    fill(root, "a/b/c", "a/d", "ab", "e")
    remove_tree(join(root, "a"))
    remove_tree(join(root, "e"))
    remove_tree(join(root, "none"))
    assert list_names(root) == ["ab"]
    assert not exists(join(root, "a"))


def test_remove_tree_bears_with_one_who_still_writes_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    remove = os.rmdir
    late = iter(["one", "two"])

    def rmdir(path: str, **kwargs: Any) -> None:
        if str(path) == str(folder) and (name := next(late, None)):
            (folder / name).touch()
        remove(path, **kwargs)

    monkeypatch.setattr(os, "rmdir", rmdir)
    remove_tree(str(folder))
    assert not folder.exists()
    assert next(late, None) is None


def test_remove_tree_of_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    fill(str(tmp_path), "real/x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove_tree(str(tmp_path / "link"))
    assert list_names(str(tmp_path)) == ["real"]
    assert exists(str(tmp_path / "real" / "x"))


def test_import_needs_no_heavy_module() -> None:
    code = (
        "import sys, scoring.config, scoring.storage, scoring.errors\n"
        "print(sorted({'ray', 'torch', 'autogluon', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
