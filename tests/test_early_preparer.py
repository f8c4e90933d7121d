"""The preparer that starts before Ray: calls arrive, errors travel, it ends with who started it, and its death costs nothing."""

import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from scoring.config import ScoreConfig, load_config
from scoring.early_preparer import Address, EarlyPreparer, RemotePreparer, serve
from scoring.errors import PredictorError
from scoring.parity import Scores
from scoring.pipeline import PreparerActor
from scoring.preparer import Preparer
from scoring.processes import ProcessMark


class OddError(Exception):
    """One that cannot be made again from its arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


class Stub:
    """A preparer that notes what it is asked."""

    def __init__(self) -> None:
        self.built: list[tuple[str, bool, Sequence[str]]] = []

    def spec(self) -> str:
        raise PredictorError("it was saved before fit(); train it first")

    def build(self, spec_json: str, *, for_gpu: bool, rtx_capabilities: Sequence[str] = ()) -> None:
        self.built.append((spec_json, for_gpu, rtx_capabilities))

    def reference(self, spec_json: str, sample: Any) -> Any:
        if sample is None:
            raise OddError("no ", "sample")
        return np.arange(6, dtype=np.float32).reshape(3, 2)


def never() -> Any:
    raise AssertionError("the one that was started is there")


def serve_until_closed(listener: Listener, stub: Stub) -> None:
    with suppress(OSError):
        serve(listener, stub)


@pytest.fixture
def served() -> Iterator[tuple[Stub, Address]]:
    stub = Stub()
    with tempfile.TemporaryDirectory() as folder:
        address = Address(str(Path(folder) / "socket"), b"secret", ProcessMark.current())
        listener = Listener(address.socket, "AF_UNIX", authkey=address.key)
        threading.Thread(target=serve_until_closed, args=(listener, stub), daemon=True).start()
        yield stub, address
        listener.close()


def test_calls_and_errors_travel(served: tuple[Stub, Address]) -> None:
    stub, address = served
    remote = RemotePreparer(address, never)
    remote.build("spec", for_gpu=True, rtx_capabilities=("SM89",))
    assert stub.built == [("spec", True, ("SM89",))]
    scores = remote.reference("spec", object)  # type: ignore[arg-type]
    assert scores is not None
    assert scores.tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(PredictorError, match="train it first"):
        remote.spec()
    with pytest.raises(RuntimeError, match="OddError: no sample"):
        remote.reference("spec", None)
    remote.build("again", for_gpu=False)
    assert len(stub.built) == 2


def test_who_does_not_know_the_key_gets_nothing_and_the_next_one_is_served(served: tuple[Stub, Address]) -> None:
    stub, address = served
    own = Stub()
    guessed = replace(address, key=b"guess")
    stranger = RemotePreparer(guessed, lambda: own)  # type: ignore[arg-type, return-value]
    stranger.build("a stranger's", for_gpu=False)
    assert (len(own.built), stub.built) == (1, []), "it does its work itself"
    RemotePreparer(address, never).build("spec", for_gpu=False)
    assert len(stub.built) == 1


class Kept:
    """A `Preparer` whose cache has all, or nothing."""

    def __init__(self, scores: Scores | None) -> None:
        self.scores = scores
        self.noted: list[str] = []

    def note(self, inputs: str) -> None:
        self.noted.append(inputs)

    def is_built(self, spec_json: str, *, for_gpu: bool) -> bool:
        return self.scores is not None

    def known_reference(self, spec_json: str, sample: Any) -> Scores | None:
        return self.scores


def test_what_an_earlier_run_kept_does_not_wait_for_the_import(
    served: tuple[Stub, Address], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub, address = served
    actor = PreparerActor(config_for(tmp_path), "0" * 64, address)
    kept = np.ones((1, 2), dtype=np.float32)
    monkeypatch.setattr(actor, "_kept", Kept(kept))
    assert actor.reference("spec", None, "inputs") is kept
    actor.build("spec", for_gpu=True, rtx_capabilities=())
    assert not stub.built
    actor.build("spec", for_gpu=True, rtx_capabilities=("SM89",))
    empty = Kept(None)
    monkeypatch.setattr(actor, "_kept", empty)
    actor.build("spec", for_gpu=False, rtx_capabilities=())
    assert len(stub.built) == 2
    scores = actor.reference("spec", object, "inputs")  # type: ignore[arg-type]
    assert scores is not None
    assert len(scores) == 3
    assert empty.noted == ["inputs"], "a rerun over them need not start it early"
    with pytest.raises(RuntimeError, match="no sample"):
        actor.reference("spec", None, "others")
    assert empty.noted == ["inputs"], "AutoGluon is needed again, as it has given nothing"


def config_for(tmp_path: Path) -> ScoreConfig:
    names = {"input.paths": "in", "predictor.path": "predictor", "output.path": "out"}
    flags: dict[str, object] = {key: str(tmp_path / name) for key, name in names.items()}
    flags["input.paths"] = [flags["input.paths"]]
    return load_config(file=None, flags=flags, overrides=[f"engine.cache={tmp_path / 'cache'}"], cwd=tmp_path)


def test_nothing_is_to_be_built_for_an_engine_that_needs_no_graph(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    named = config.model_copy(update={"engine": config.engine.model_copy(update={"provider": "torch"})})
    assert Preparer(named, "0" * 64).is_built("no spec is read", for_gpu=True)
    with pytest.raises(ValueError, match="Expecting value"):
        Preparer(config, "0" * 64).is_built("no spec is read", for_gpu=True)


def test_the_process_raises_what_its_predictor_does_and_its_death_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    early = EarlyPreparer(config_for(tmp_path), "0" * 64)
    own = Stub()
    remote = RemotePreparer(early.address, lambda: own)  # type: ignore[arg-type, return-value]
    with pytest.raises(PredictorError, match=r"no assets\.json there"):
        remote.spec()
    psutil.Process(early._process.pid).kill()
    remote.build("spec", for_gpu=False)
    assert own.built, "its work is done here"
    early.close()
    assert "was started before Ray is gone" in caplog.text


def test_a_process_that_cannot_even_start_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    early = EarlyPreparer(config_for(tmp_path), "0" * 64)
    own = Stub()
    RemotePreparer(early.address, lambda: own).build("spec", for_gpu=False)  # type: ignore[arg-type, return-value]
    early.close()
    assert early._process.returncode != 0
    assert own.built
    assert "FileNotFoundError" in caplog.text


def test_the_process_ends_with_whoever_started_it(tmp_path: Path) -> None:
    early = EarlyPreparer(config_for(tmp_path), "0" * 64)
    folder = Path(early.address.socket).parent
    early.close()
    assert early._process.returncode == 0
    assert not folder.exists()
