"""The engine cache on its own: keys, one build, damage, foreign entries and a cache at a URI."""

import json
import threading
from pathlib import Path

import fsspec
import pytest

from scoring.engines.cache import EngineCache, Key

KEY = Key("graph", {"weights": "abc", "precision": "fp16"})


class Builder:
    """Builds an entry of one file and counts."""

    def __init__(self, content: str = "built") -> None:
        self.count = 0
        self._content = content

    def __call__(self, folder: Path) -> None:
        self.count += 1
        (folder / "model.onnx").write_text(self._content)


def test_an_entry_is_built_once_and_found_again(tmp_path: Path) -> None:
    build = Builder()
    first = EngineCache(str(tmp_path)).get(KEY, build)
    assert EngineCache(str(tmp_path)).get(KEY, build) == first
    assert (build.count, (first / "model.onnx").read_text()) == (1, "built")


@pytest.mark.parametrize("change", [{"weights": "abd"}, {"precision": "fp32"}, {"gpu": "H100"}])
def test_a_key_that_differs_in_any_part_is_another_entry(tmp_path: Path, change: dict[str, str]) -> None:
    build = Builder()
    cache = EngineCache(str(tmp_path))
    other = Key(KEY.kind, {**KEY.parts, **change})
    assert cache.get(KEY, build) != cache.get(other, build)
    assert build.count == 2


@pytest.mark.parametrize("damage", ["truncate", "no done", "foreign", "changed", "garbled done"])
def test_a_half_written_or_foreign_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    build = Builder()
    cache = EngineCache(str(tmp_path))
    folder = cache.get(KEY, build)
    done = folder / "done.json"
    if damage == "truncate":
        (folder / "model.onnx").write_text("bui")
    elif damage == "changed":
        (folder / "model.onnx").write_text("bUilt")
    elif damage == "no done":
        done.unlink()
    elif damage == "garbled done":
        done.write_text('{"kind": "gra')
    else:
        document = json.loads(done.read_text())
        done.write_text(json.dumps({**document, "parts": {**document["parts"], "weights": "another"}}))
    assert (cache.get(KEY, build) / "model.onnx").read_text() == "built"
    assert build.count == 2


def test_threads_that_ask_at_once_wait_for_one_build(tmp_path: Path) -> None:
    build = Builder()
    threads = [threading.Thread(target=EngineCache(str(tmp_path)).get, args=(KEY, build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.count == 1


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = EngineCache(str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "model.onnx").write_text("half")
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        cache.get(KEY, fail)
    assert [path.name for path in (cache.local / "graph").iterdir()] == [f"{KEY.digest}.lock"]
    assert (cache.get(KEY, Builder()) / "model.onnx").read_text() == "built"


def test_a_cache_at_a_uri_saves_other_machines_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = [Builder(), Builder()]
    for machine, build in zip(("one", "two"), builds, strict=True):
        monkeypatch.setenv("HOME", str(tmp_path / machine))
        folder = EngineCache("memory://engine-cache").get(KEY, build)
        assert folder.is_relative_to(tmp_path / machine), "each node has a local copy"
        assert (folder / "model.onnx").read_text() == "built"
    assert [build.count for build in builds] == [1, 0]
    store = fsspec.filesystem("memory")
    assert not store.exists(f"/engine-cache/engines/{KEY.path}.lock")


def test_a_damaged_copy_at_a_uri_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "one"))
    EngineCache("memory://damaged-cache").get(KEY, Builder())
    fsspec.filesystem("memory").pipe(f"/damaged-cache/engines/{KEY.path}/model.onnx", b"other")
    monkeypatch.setenv("HOME", str(tmp_path / "two"))
    build = Builder()
    assert (EngineCache("memory://damaged-cache").get(KEY, build) / "model.onnx").read_text() == "built"
    assert build.count == 1
