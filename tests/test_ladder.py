"""The ladder's choices, with engines that answer and take as long as they are told: no model, no GPU.

What real engines compute is in test_engine.py; here is which one is used, what is said of the others, and how a compiled one
takes over.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from scoring import engine as ladder
from scoring import takeover
from scoring.decision import Rung
from scoring.engine import choose_engine, shared_engine
from scoring.engines.base import EngineUnavailable
from scoring.engines.build import EngineRequest
from scoring.engines.cache import EngineCache
from scoring.errors import EngineError, ParityError
from scoring.parity import Parity
from scoring.takeover import _COMPARED_BATCHES, Takeover


@dataclass
class StubEngine:
    """Answers with its own name, so that a test sees who scored."""

    provider: str
    precision: Any
    rows_per_s: float = 1000.0
    difference: float = 1e-6
    device: str = "H100"
    is_closed: bool = False

    def submit(self, arrays: Any) -> Any:
        return self.forward(arrays)

    def forward(self, arrays: Any) -> Any:
        assert not self.is_closed, f"{self.provider} was closed"
        return np.full((1, 1), self.rows_per_s, dtype=np.float32)

    def warm_up(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


# What earlier runs timed: (provider, precision) -> rows/s.
KNOWN_RATES: dict[tuple[str, str], float] = {}


class StubGate:
    """The gate's interface over stub engines."""

    reference_name = "told"

    def __init__(self, request: EngineRequest) -> None:
        self._limit = request.max_abs_diff

    def known_rate(self, provider: str, precision: str) -> float | None:
        return KNOWN_RATES.get((provider, precision))

    def reference(self) -> None: ...

    def parity(self, engine: StubEngine) -> Parity:
        return Parity(64, engine.difference, engine.difference, 1.0, 0, 0)

    def time(self, engine: StubEngine) -> float:
        """While others decode."""
        return engine.rows_per_s / 2

    def difference(self, wanted: Any, found: Any) -> str | None:
        """In the run the engines' answers, their own names, may be no further apart than this."""
        return None if abs(wanted[0, 0] - found[0, 0]) <= 50_000 else "far apart"

    def examine(self, engine: StubEngine, build_s: float, *, anew: bool = False) -> Rung:
        parity = self.parity(engine)
        failure = parity.failure(self._limit)
        if failure:
            return Rung(engine.provider, engine.precision, "refused", failure)
        rate = self.time(engine) if anew else engine.rows_per_s
        return Rung(engine.provider, engine.precision, "usable", "fits", rate)


Machine = dict[tuple[str, str], StubEngine | EngineUnavailable]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """An H100 as it was measured, less the compiled engine: change what a test is about."""
    engines: Machine = {
        ("torch", "fp16"): StubEngine("torch", "fp16", 20_000, 1e-3),
        ("cuda", "fp16"): StubEngine("cuda", "fp16", 30_000, 1e-3),
        ("tensorrt", "fp16"): EngineUnavailable("does not run on this H100"),
        ("torch", "fp32"): StubEngine("torch", "fp32", 9_000, 0.0),
        ("cuda", "fp32"): StubEngine("cuda", "fp32", 13_000, 1e-6),
        ("tensorrt", "fp32"): EngineUnavailable("does not run on this H100"),
    }

    def build(request: EngineRequest, provider: str, precision: str) -> tuple[StubEngine, float]:
        engine = engines[provider, precision]
        if isinstance(engine, EngineUnavailable):
            raise engine
        return engine, 1.0

    monkeypatch.setattr(ladder, "build_engine", build)
    monkeypatch.setattr(ladder, "is_exported", lambda request, provider, precision: False)
    # Where a test adds the compiled engine, an earlier run has left it.
    monkeypatch.setattr(ladder, "is_compiled", lambda request, precision: ("torch-compiled", precision) in engines)
    KNOWN_RATES.clear()
    monkeypatch.setattr(ladder, "Gate", StubGate)
    monkeypatch.setattr(ladder, "has_gpu", lambda: True)
    monkeypatch.setattr(takeover, "build_compiled", lambda request, precision: pytest.fail("nothing to compile here"))
    return engines


def request_for(tmp_path: Path, **changes: Any) -> EngineRequest:
    settings: dict[str, Any] = {"rows_left": 500_000, **changes}
    return EngineRequest(cast("Any", None), cast("Any", None), EngineCache(str(tmp_path)), **settings)


def outcomes(decision: Any) -> dict[str, str]:
    return {f"{rung.provider}-{rung.precision}": rung.outcome for rung in decision.rungs}


def test_the_fastest_that_passes_is_used_and_every_rung_is_told(machine: Machine, tmp_path: Path) -> None:
    engine, decision = choose_engine(request_for(tmp_path, rows_left=900_000))
    assert engine is machine["cuda", "fp16"]
    assert outcomes(decision) == {
        "cuda-fp16": "used",
        "tensorrt-fp16": "skipped",
        "torch-fp16": "skipped",
        "torch-compiled-fp16": "skipped",
    }


def test_torch_that_is_not_compiled_holds_no_first_score_back(machine: Machine, tmp_path: Path) -> None:
    machine["torch", "fp16"] = EngineUnavailable("nobody asks for it")
    _, decision = choose_engine(request_for(tmp_path, rows_left=1_700_000))
    rung = next(rung for rung in decision.rungs if rung.provider == "torch")
    assert (rung.outcome, rung.reason) == ("skipped", "not compiled it is slower than what runs graphs")


@pytest.mark.parametrize(("rate", "used"), [(46_000, "torch-compiled"), (10_000, "cuda")])
def test_what_an_earlier_run_compiled_is_a_rung_like_any_other(
    machine: Machine, tmp_path: Path, rate: float, used: str
) -> None:
    machine["torch-compiled", "fp16"] = StubEngine("torch-compiled", "fp16", rate, 1e-3)
    engine, decision = choose_engine(request_for(tmp_path, rows_left=10_000_000))
    assert engine is machine[used, "fp16"], "no takeover: there is nothing to wait for"
    assert (decision.provider, decision.compiles) == (used, False)
    other = "cuda" if used == "torch-compiled" else "torch-compiled"
    assert outcomes(decision)[f"{used}-fp16"] == "used"
    assert outcomes(decision)[f"{other}-fp16"] == "slower"
    assert cast("StubEngine", machine[other, "fp16"]).is_closed


def test_a_run_may_wait_for_the_compiled_engine_for_the_sake_of_later_ones(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["torch-compiled", "fp16"] = StubEngine("torch-compiled", "fp16", 46_000, 1e-3)
    monkeypatch.setattr(ladder, "is_compiled", lambda request, precision: False)
    assert choose_engine(request_for(tmp_path, rows_left=100_000))[0] is machine["cuda", "fp16"]
    engine, decision = choose_engine(request_for(tmp_path, rows_left=100_000, compile="always"))
    assert engine is machine["torch-compiled", "fp16"]
    assert not decision.compiles
    monkeypatch.setattr(ladder, "is_compiled", lambda request, precision: True)
    for provider in ("auto", "torch"):
        request = request_for(tmp_path, rows_left=10_000_000, provider=provider, compile="never")
        engine, decision = choose_engine(request)
        assert engine is machine["cuda" if provider == "auto" else provider, "fp16"]
        assert "torch-compiled-fp16" not in outcomes(decision)


def test_torch_that_was_named_is_relieved_at_once_by_what_an_earlier_run_compiled(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["torch-compiled", "fp16"] = StubEngine("torch-compiled", "fp16", 46_000, 1e-3)
    ready, _ = compiling(monkeypatch, lambda: machine["torch", "fp16"])
    ready.set()
    request = request_for(tmp_path, provider="torch")
    engine, decision = choose_engine(request)
    assert isinstance(engine, Takeover), "500,000 rows take 25 s"
    assert decision.compiles
    del machine["torch-compiled", "fp16"]
    assert choose_engine(request)[0] is machine["torch", "fp16"], "compiling takes longer"


def test_what_earlier_runs_timed_is_not_built_to_be_found_slower(machine: Machine, tmp_path: Path) -> None:
    KNOWN_RATES.update({("torch", "fp16"): 20_000, ("cuda", "fp16"): 30_000})
    machine["torch", "fp16"] = EngineUnavailable("nobody asks for it")
    engine, decision = choose_engine(request_for(tmp_path, rows_left=900_000))
    assert engine is machine["cuda", "fp16"]
    told = [str(rung) for rung in decision.rungs]
    assert told[0].startswith("cuda-fp16 used, 30,000 rows/s")
    assert told[1] == "torch-fp16 slower, 20,000 rows/s: timed by an earlier run"


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({"rows_left": 800_000}, "cuda"),
        ({"rows_left": 1_000_000}, "torch-compiled"),
        ({"rows_left": 1_000, "compile": "always"}, "torch-compiled"),
        ({"rows_left": None}, "torch-compiled"),
    ],
)
def test_the_compiled_engine_is_used_where_its_rate_pays_for_its_start(
    machine: Machine, tmp_path: Path, changes: dict[str, Any], used: str
) -> None:
    machine["torch-compiled", "fp16"] = StubEngine("torch-compiled", "fp16", 46_000, 1e-3)
    KNOWN_RATES.update({("cuda", "fp16"): 30_000, ("torch-compiled", "fp16"): 46_000})
    other = "cuda" if used == "torch-compiled" else "torch-compiled"
    del machine[other, "fp16"]  # not built
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "is_compiled", lambda request, precision: True)
        engine, decision = choose_engine(request_for(tmp_path, **changes))
    assert engine is machine[used, "fp16"]
    assert not decision.compiles
    rung = next(rung for rung in decision.rungs if rung.provider == other)
    if used == "cuda":
        wanted = "torch-compiled-fp16 skipped, 46,000 rows/s: 800000 rows take 27.4 s with its start, 26.7 s on cuda"
    else:
        wanted = "cuda-fp16 slower, 30,000 rows/s: timed by an earlier run"
    assert str(rung) == wanted


def test_a_compiled_engine_that_nobody_timed_is_tried_in_runs_that_may_gain_by_it(
    machine: Machine, tmp_path: Path
) -> None:
    machine["torch-compiled", "fp16"] = StubEngine("torch-compiled", "fp16", 46_000, 1e-3)
    KNOWN_RATES["cuda", "fp16"] = 30_000
    engine, decision = choose_engine(request_for(tmp_path, rows_left=500_000))
    assert engine is machine["cuda", "fp16"], "17 s: less than 20"
    assert outcomes(decision)["torch-compiled-fp16"] == "skipped"
    assert choose_engine(request_for(tmp_path, rows_left=700_000))[0] is machine["torch-compiled", "fp16"]


def test_the_engine_that_was_fastest_is_checked_again_and_passed_over(machine: Machine, tmp_path: Path) -> None:
    KNOWN_RATES.update({("torch", "fp16"): 20_000, ("cuda", "fp16"): 30_000})
    cast("StubEngine", machine["cuda", "fp16"]).difference = 0.02
    engine, decision = choose_engine(request_for(tmp_path))
    assert engine is machine["torch", "fp16"]
    assert outcomes(decision)["cuda-fp16"] == "refused"
    assert outcomes(decision)["torch-fp16"] == "used"


def test_an_engine_that_is_not_the_reference_is_passed_over(machine: Machine, tmp_path: Path) -> None:
    cast("StubEngine", machine["cuda", "fp16"]).difference = 0.02
    engine, decision = choose_engine(request_for(tmp_path))
    assert engine is machine["torch", "fp16"]
    assert outcomes(decision)["cuda-fp16"] == "refused"
    refused = next(rung for rung in decision.rungs if rung.provider == "cuda")
    assert "differs from the fp32 reference by 2.00e-02 on 64 rows, limit 0.005" in refused.reason


def test_fp32_is_tried_where_no_fp16_passes(machine: Machine, tmp_path: Path) -> None:
    for provider in ("torch", "cuda"):
        cast("StubEngine", machine[provider, "fp16"]).difference = 0.02
    engine, decision = choose_engine(request_for(tmp_path))
    assert engine is machine["cuda", "fp32"]
    assert outcomes(decision)["torch-fp16"] == outcomes(decision)["cuda-fp16"] == "refused"


def test_a_build_that_costs_more_than_it_saves_is_skipped(machine: Machine, tmp_path: Path) -> None:
    engine, decision = choose_engine(request_for(tmp_path, rows_left=2_000))
    assert engine is machine["cuda", "fp16"]
    skipped = next(rung for rung in decision.rungs if rung.provider == "tensorrt")
    assert (skipped.outcome, skipped.reason) == ("skipped", "2000 rows take 0.1 s on cuda-fp16, this build about 60 s")


def test_no_engine_at_all_is_an_error_that_names_every_rung(machine: Machine, tmp_path: Path) -> None:
    for engine in machine.values():
        if isinstance(engine, StubEngine):
            engine.difference = 1.0
    with pytest.raises(
        EngineError, match=r"cuda-fp16 refused.*tensorrt-fp16 unavailable.*torch-fp16 refused.*cuda-fp32"
    ):
        choose_engine(request_for(tmp_path))


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_a_named_engine_never_falls_back(machine: Machine, tmp_path: Path, precision: str) -> None:
    with pytest.raises(EngineError, match=r"tensorrt cannot run here: does not run on this H100.*engine.provider=auto"):
        choose_engine(request_for(tmp_path, provider="tensorrt", precision=precision))


def test_a_named_engine_goes_from_fp16_to_fp32_and_then_ends(machine: Machine, tmp_path: Path) -> None:
    half, single = (cast("StubEngine", machine["cuda", precision]) for precision in ("fp16", "fp32"))
    half.difference = 0.02
    assert choose_engine(request_for(tmp_path, provider="cuda"))[0] is single
    with pytest.raises(ParityError, match="cuda was refused: fp16 differs"):
        choose_engine(request_for(tmp_path, provider="cuda", precision="fp16"))
    single.difference = 0.01
    with pytest.raises(ParityError, match=r"fp16 differs.*fp32 differs"):
        choose_engine(request_for(tmp_path, provider="cuda"))


def test_actors_of_one_run_share_one_decision(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "engines" / "H100.json")
    (tmp_path / "engines").mkdir()
    (tmp_path / "open").touch()
    _, first = shared_engine(request_for(tmp_path), uri)
    # The clock of another actor would have preferred torch.
    other = machine["torch", "fp16"]
    assert isinstance(other, StubEngine)
    other.rows_per_s = 90_000
    engine, second = shared_engine(request_for(tmp_path), uri)
    assert second == first
    assert engine is machine["cuda", "fp16"]
    cast("Any", engine).difference = 0.5
    with pytest.raises(ParityError, match="although another actor's copy passed"):
        shared_engine(request_for(tmp_path, reference=lambda: np.zeros((64, 1))), uri)
    # A rerun's actors have no reference: the first attempt's examined the engine.
    assert shared_engine(request_for(tmp_path), uri)[0] is engine


def test_an_actor_of_another_node_begins_without_what_was_compiled_here(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = str(tmp_path / "engines" / "H100.json")
    (tmp_path / "engines").mkdir()
    (tmp_path / "open").touch()
    compiled = StubEngine("torch-compiled", "fp16", 46_000, 1e-3)
    machine["torch-compiled", "fp16"] = compiled
    assert shared_engine(request_for(tmp_path), uri)[0] is compiled
    assert shared_engine(request_for(tmp_path), uri)[0] is compiled, "an actor of the same node"
    del machine["torch-compiled", "fp16"]
    ready, join = compiling(monkeypatch, lambda: compiled)
    engine, decision = shared_engine(request_for(tmp_path), uri)
    assert isinstance(engine, Takeover)
    assert decision.provider == "torch-compiled"
    assert engine.forward({})[0, 0] == 30_000, "cuda's"
    assert "torch-compiled-fp16-H100 was compiled on another node" in caplog.text
    ready.set()
    join()
    assert engine.settle() is not None
    assert engine.forward({})[0, 0] == 46_000


def test_an_actor_that_cannot_have_the_shared_engine_says_so(machine: Machine, tmp_path: Path) -> None:
    uri = str(tmp_path / "engines" / "H100.json")
    (tmp_path / "engines").mkdir()
    (tmp_path / "open").touch()
    shared_engine(request_for(tmp_path), uri)
    machine["cuda", "fp16"] = EngineUnavailable("no driver")
    with pytest.raises(EngineError, match=r"cuda-fp16-H100 runs in another actor of this run and not here: no driver"):
        shared_engine(request_for(tmp_path), uri)


def test_an_engine_that_raises_without_a_word_costs_its_rung_alone(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = machine["cuda", "fp16"]
    examine = StubGate.examine

    def fail(gate: StubGate, engine: StubEngine, build_s: float) -> Rung:
        if engine is broken:
            raise AssertionError
        return examine(gate, engine, build_s)

    monkeypatch.setattr(StubGate, "examine", fail)
    engine, decision = choose_engine(request_for(tmp_path))
    assert engine is machine["torch", "fp16"]
    assert next(rung for rung in decision.rungs if rung.provider == "cuda").reason == "AssertionError"
    assert cast("StubEngine", broken).is_closed


def test_an_actor_that_loads_after_the_run_has_ended_writes_nothing(machine: Machine, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "_work"
    engine, _ = shared_engine(request_for(tmp_path / "cache"), str(folder / "H100.json"))
    assert engine is machine["cuda", "fp16"]
    assert not folder.exists()


def compiling(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Any]) -> tuple[threading.Event, Callable[[], None]]:
    """Let the compile wait for its event; returns the event and how to wait for its thread."""
    ready = threading.Event()

    def build_compiled(request: EngineRequest, precision: str) -> Any:
        ready.wait(10)
        return build()

    monkeypatch.setattr(takeover, "build_compiled", build_compiled)

    def join() -> None:
        for thread in threading.enumerate():
            if thread.name == "compile":
                thread.join(10)

    return ready, join


@pytest.mark.parametrize(
    ("rows_per_s", "difference", "outcome"),
    [(46_000, 1e-3, "used"), (10_000, 1e-3, "slower"), (46_000, 0.1, "refused")],
)
def test_the_compiled_engine_takes_over_when_it_is_ready_faster_and_right(
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows_per_s: float,
    difference: float,
    outcome: str,
) -> None:
    compiled = StubEngine("torch-compiled", "fp16", rows_per_s, difference)
    ready, join = compiling(monkeypatch, lambda: compiled)
    engine, decision = choose_engine(request_for(tmp_path, rows_left=10_000_000))
    assert isinstance(engine, Takeover)
    assert outcomes(decision)["torch-compiled-fp16"] == "pending"
    assert engine.settle() is None, "not ready: the first batch does not wait"
    assert engine.forward({})[0, 0] == 30_000
    ready.set()
    join()
    assert engine.forward({})[0, 0] == 30_000, "between settles the engine stays"
    rung = engine.settle()
    assert rung is not None
    assert (rung.provider, rung.outcome) == ("torch-compiled", outcome)
    is_used = outcome == "used"
    assert engine.forward({})[0, 0] == (rows_per_s if is_used else 30_000)
    assert engine.provider == ("torch-compiled" if is_used else "cuda")
    first = cast("StubEngine", machine["cuda", "fp16"])
    assert (compiled.is_closed, first.is_closed) == (not is_used, False)
    assert engine.settle() is None, "told once"
    assert engine.undone() is None
    for _ in range(_COMPARED_BATCHES):
        assert not first.is_closed, "both score the first batches"
        assert engine.submit({})[0, 0] == (rows_per_s if is_used else 30_000)
    assert first.is_closed == is_used


@pytest.mark.parametrize("breaks", ["differs", "fails"])
def test_a_compiled_engine_that_is_wrong_in_the_run_is_relieved_by_the_first_one(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    compiled = StubEngine("torch-compiled", "fp16", 60_000.0)
    ready, _ = compiling(monkeypatch, lambda: compiled)
    engine, _ = choose_engine(request_for(tmp_path, rows_left=10_000_000))
    assert isinstance(engine, Takeover)
    ready.set()
    while (rung := engine.settle()) is None:
        time.sleep(0.01)
    assert rung.outcome == "used"
    assert engine.submit({})[0, 0] == 60_000
    if breaks == "differs":
        compiled.rows_per_s = 90_000.0
    else:
        compiled.is_closed = True  # it raises
    assert engine.submit({})[0, 0] == 30_000, "the batch in which it shows has the first one's scores"
    assert (engine.provider, compiled.is_closed) == ("cuda", True)
    rung = engine.undone()
    assert rung is not None
    assert (rung.provider, rung.outcome) == ("torch-compiled", "refused")
    assert (
        "went back to cuda-fp16 in the run: " + ("far apart" if breaks == "differs" else "AssertionError")
        in rung.reason
    )
    assert engine.undone() is engine.settle() is None, "told once"
    assert engine.submit({})[0, 0] == 30_000


def test_a_compile_that_fails_leaves_the_first_engine(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise RuntimeError("no compiler on this machine\nmore")

    ready, _ = compiling(monkeypatch, fail)
    engine, _ = choose_engine(request_for(tmp_path, rows_left=10_000_000))
    assert isinstance(engine, Takeover)
    ready.set()
    rung = engine.settle(wait=True)
    assert rung is not None
    assert (rung.outcome, rung.reason) == ("unavailable", "RuntimeError: no compiler on this machine")
    assert engine.forward({})[0, 0] == 30_000
