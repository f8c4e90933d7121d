"""Rows that raise, run out of memory or come back without a number: what is called how often, and what becomes of the others.

Scores are formulas of the row; the engine is a stub. Rows that end the process are test_journal.py's.
"""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from scoring import features, scorer
from scoring.errors import EngineError, ParityError, Reason, ScoringError, Stage
from scoring.features import FeatureBuilder
from scoring.guard import Guard
from scoring.ledger import AttemptFolder, Taken
from scoring.poison import MAX_HALVINGS, Fault, Rows, describe, fault_of, is_sticky, split
from scoring.sample import Sample
from scoring.scorer import ActorSetup, Scorer
from scoring.spec import FeatureSpec, NumericalColumn
from tests.flights import rows_table
from tests.test_sizing import config

Values = npt.NDArray[np.int64]


# --- errors


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("Failed to allocate memory for requested buffer of size 1073741824"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        pa.ArrowMemoryError("malloc of size 99 failed"),
    ],
)
def test_running_out_of_memory_is_told_apart(error: Exception) -> None:
    assert fault_of(error).reason is Reason.OUT_OF_MEMORY


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "CUDA error: unspecified launch failure",
        "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=h",
        "Triton Error [CUDA]: misaligned address",
        "CUDA error: cudaErrorIllegalAddress",
        "CUDA error: uncorrectable ECC error encountered",
        "cuda: CUDA_ERROR_LAUNCH_FAILED",
    ],
)
def test_an_error_that_costs_the_gpu_is_nobodys_fault_and_is_raised_again(message: str) -> None:
    error = RuntimeError(message)
    assert is_sticky(error)
    with pytest.raises(RuntimeError) as caught:
        fault_of(error)
    assert caught.value is error


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory", "CUDA error: invalid argument", "the text 'illegal memory access' is not a number"],
)
def test_other_errors_cost_no_process(message: str) -> None:
    assert not is_sticky(ValueError(message))


def test_an_error_raised_on_purpose_is_no_rows_fault() -> None:
    with pytest.raises(EngineError):
        fault_of(EngineError("no engine"))


def test_an_error_is_told_in_one_line_without_its_secrets() -> None:
    error = ValueError("bad\n  cell in s3://key:secret@bucket/x?token=1 " + 500 * "x")
    assert describe(error).startswith("ValueError: bad cell in s3://bucket/x xxx")
    assert len(describe(error)) == 300
    assert describe(MemoryError()) == "MemoryError"


# --- splitting


@dataclass
class Formula:
    """score(row) = 7 row - 3; raises for some rows, and for more rows than fit."""

    bad: frozenset[int] = frozenset()
    fits: int | None = None
    large: frozenset[int] = frozenset()
    """Rows that do not fit beside any other, nor alone."""
    calls: list[int] = field(default_factory=list)

    def __call__(self, rows: Rows) -> Values:
        self.calls.append(len(rows))
        if self.large & set(rows.tolist()) or (self.fits is not None and len(rows) > self.fits):
            raise MemoryError(f"{len(rows)} rows")
        if wrong := self.bad & set(rows.tolist()):
            raise ValueError(f"cannot do {min(wrong)}")
        return 7 * rows - 3


def check(found: Any, rows: Rows, bad: set[int]) -> None:
    assert set(found.bad) == bad
    done = np.concatenate([part for part, _ in found.parts]) if found.parts else np.empty(0, dtype=np.intp)
    values = np.concatenate([part for _, part in found.parts]) if found.parts else np.empty(0, dtype=np.intp)
    np.testing.assert_array_equal(np.sort(done), [row for row in rows if row not in bad])
    np.testing.assert_array_equal(values, 7 * done - 3)


@pytest.mark.parametrize("count", [*range(2, 34), 100, 511, 512, 513])
def test_a_row_that_raises_costs_two_calls_a_halving_wherever_it_is(count: int) -> None:
    rows = np.arange(1000, 1000 + count)
    for bad in rows.tolist():
        score = Formula(frozenset({bad}))
        found = split(rows, score)
        check(found, rows, {bad})
        assert found.bad[bad] == (Reason.SCORE_ERROR, f"ValueError: cannot do {bad}")
        assert len(score.calls) - 1 <= 2 * math.log2(count), bad


def test_one_row_in_a_thousand_costs_two_calls_a_halving_each() -> None:
    rng = np.random.default_rng(3)
    bad = frozenset(rng.choice(100_352, 100, replace=False).tolist())
    extra = 0
    for start in range(0, 100_352, 512):
        rows = np.arange(start, start + 512)
        score = Formula(bad)
        check(split(rows, score), rows, set(bad) & set(rows.tolist()))
        extra += len(score.calls) - 1
    assert extra <= 2 * 9 * len(bad)
    print(f"extra calls a raising row: {extra / len(bad):.1f}, in batches of 512")


def test_where_every_row_raises_each_is_called_alone_once() -> None:
    rows = np.arange(64)
    score = Formula(frozenset(range(64)))
    check(split(rows, score), rows, set(range(64)))
    assert score.calls.count(1) == 64
    assert len(score.calls) <= 2 * 64


def test_a_batch_that_raised_is_not_called_again_and_a_passing_error_costs_no_row() -> None:
    rows = np.arange(8)
    score = Formula()
    check(split(rows, score, fault=Fault(Reason.SCORE_ERROR, "was in a hurry")), rows, set())
    assert 8 not in score.calls


@pytest.mark.parametrize("factor", [2, 4, 16])
def test_too_large_a_batch_is_halved_until_it_fits_and_no_row_is_lost(factor: int) -> None:
    rows = np.arange(512)
    score = Formula(fits=512 // factor)
    found = split(rows, score)
    check(found, rows, set())
    assert found.fits == 512 // factor
    # What was found out is not tried again.
    assert score.calls == [*(512 // 2**step for step in range(int(math.log2(factor)))), *[512 // factor] * factor]


def test_a_row_that_does_not_fit_alone_is_out_of_memory_and_its_neighbours_say_nothing_of_the_batch() -> None:
    rows = np.arange(512)
    found = split(rows, Formula(large=frozenset({77})))
    check(found, rows, {77})
    assert found.bad[77][0] is Reason.OUT_OF_MEMORY
    assert found.fits is None


# --- tables


def doubled(table: pa.Table, fails: Callable[[list[int]], Exception | None]) -> pa.Table:
    """The guarded work of these tests: 2 x of the rows that carry no reason, and `model:x` is gone."""
    rows = table["source_row"].to_pylist()
    usable = [reason is None for reason in table["reason"].to_pylist()]
    values = table["model:x"].to_pylist()
    assert all((value is None) != fine for value, fine in zip(values, usable, strict=True)), "cells are blanked"
    error = fails([row for row, fine in zip(rows, usable, strict=True) if fine])
    if error is not None:
        raise error
    done = pa.array([2 * value if fine else None for value, fine in zip(values, usable, strict=True)], pa.int64())
    return table.drop_columns(["model:x"]).append_column("done", done)


def test_a_guard_marks_the_row_and_keeps_all_others_in_their_order() -> None:
    def fails(rows: list[int]) -> Exception | None:
        return KeyError("no such word") if {3, 77} & set(rows) else None

    guard = Guard(lambda table: doubled(table, fails), Stage.FEATURES, None)
    table = rows_table(0, 100)
    done = guard(table)
    assert done["source_row"].equals(table["source_row"])
    assert done["source_file"].equals(table["source_file"])
    assert done["done"].to_pylist() == [None if row in (3, 77) else 2 * row for row in range(100)]
    marks = done.select(["stage", "reason", "message"]).to_pylist()
    assert marks[3] == {"stage": "features", "reason": "score_error", "message": "KeyError: 'no such word'"}
    assert [row for row, mark in enumerate(marks) if mark["reason"]] == [3, 77]


def test_a_guard_remembers_what_fits_in_steps_and_not_below_a_sixteenth() -> None:
    given: list[int] = []

    def fails(rows: list[int]) -> Exception | None:
        given.append(len(rows))
        return MemoryError() if len(rows) > 10 else None

    guard = Guard(lambda table: doubled(table, fails), Stage.FEATURES, None)
    largest = []
    for _ in range(7):
        given.clear()
        assert guard(rows_table(0, 320))["done"].to_pylist() == [2 * row for row in range(320)]
        largest.append(max(given))
    assert largest == [320, 160, 80, 40, 20, 20, 20]


def test_an_error_on_purpose_and_a_lost_gpu_without_a_journal_end_the_run() -> None:
    for error in (ScoringError("a bug"), RuntimeError("CUDA error: device-side assert triggered")):
        guard = Guard(lambda table, error=error: doubled(table, lambda rows: error), Stage.SCORE, None)  # type: ignore[misc]
        with pytest.raises(type(error), match=str(error)):
            guard(rows_table(0, 10))


NUMBERS = FeatureSpec(
    "y", "regression", (), (NumericalColumn("x", 0.0, None, None),), (), (), (), ("mlp",), (), (), (), False
)


def test_an_error_in_the_feature_builder_costs_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = features.scale_numbers

    def raises(values: pa.ChunkedArray, column: NumericalColumn) -> Any:
        if 13.0 in values.to_pylist():
            raise IndexError("unlucky")
        return scale(values, column)

    monkeypatch.setattr(features, "scale_numbers", raises)
    guard = Guard(FeatureBuilder(NUMBERS, cast("Any", None)), Stage.FEATURES, None)
    table = rows_table(0, 50)
    table = table.set_column(table.num_columns - 1, "model:x", table["model:x"].cast(pa.float64()))
    built = guard(table)
    assert "model:x" not in built.column_names
    assert built["feat:numerical"].to_pylist() == [[0.0 if row == 13 else float(row)] for row in range(50)]
    assert [row for row, reason in enumerate(built["reason"].to_pylist()) if reason] == [13]
    assert built["stage"][13].as_py() == "features"


# --- the scorer


@dataclass
class StubEngine:
    """score(x) = 3 x + 0.5, and what the test makes it do beside that."""

    raises: frozenset[float] = frozenset()
    sticky: frozenset[float] = frozenset()
    nan: frozenset[float] = frozenset()
    spoils: frozenset[float] = frozenset()
    """Rows beside which nothing is finite, themselves included, unless they are alone."""
    fits: int = 10**6
    provider: str = "stub"
    precision: Any = "fp32"
    device: str = "cpu"
    submitted: list[int] = field(default_factory=list)
    forwarded: list[int] = field(default_factory=list)

    def submit(self, arrays: Any) -> Any:
        self.submitted.append(len(arrays["numerical"]))
        return self._logits(arrays["numerical"][:, 0])

    def forward(self, arrays: Any) -> Any:
        self.forwarded.append(len(arrays["numerical"]))
        return self._logits(arrays["numerical"][:, 0])

    def _logits(self, values: npt.NDArray[np.float32]) -> Any:
        found = set(values.tolist())
        if self.sticky & found:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if len(values) > self.fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")
        if self.raises & found:
            raise RuntimeError("index out of range in self")
        logits = (3 * values + 0.5).astype(np.float32)
        logits[np.isin(values, list(self.nan))] = np.nan
        if self.spoils & found and len(values) > 1:
            logits[:] = np.inf
        return logits.reshape(-1, 1)

    def warm_up(self) -> None: ...

    def close(self) -> None:
        pass


class StubOutputs:
    def __init__(self, spec: FeatureSpec) -> None:
        pass

    def columns(self, logits: Any) -> list[Any]:
        return [logits[:, 0]]

    def comparable(self, logits: Any) -> Any:
        return logits


@dataclass
class StubDecision:
    name: str = "stub"
    reason: str = "told"


def scorer_with(
    engine: StubEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: ActorSetup | None = None
) -> Scorer:
    monkeypatch.setattr(scorer, "has_gpu", lambda: False)
    monkeypatch.setattr(scorer, "_decide", lambda request, setup: (engine, StubDecision()))
    monkeypatch.setattr(scorer, "Outputs", StubOutputs)
    return Scorer(tmp_path, NUMBERS, config(tmp_path, "batch.rows=64"), setup or ActorSetup("test"))


def features_table(count: int) -> pa.Table:
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(count), pa.float32()), 1)
    return rows_table(0, count).drop_columns(["model:x"]).append_column("feat:numerical", values)


def bad_rows(scored: pa.Table, count: int) -> dict[int, str]:
    """The rows given up and why; all others have their right score."""
    reasons = scored["reason"].to_pylist()
    assert scored["source_row"].to_pylist() == list(range(count))
    wanted = [None if reasons[row] else 3 * row + 0.5 for row in range(count)]
    assert scored["prediction"].to_pylist() == wanted
    assert not any(name.startswith("feat:") for name in scored.column_names)
    return {row: reason for row, reason in enumerate(reasons) if reason}


def test_a_clean_window_is_submitted_once_a_batch_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StubEngine()
    scored = scorer_with(engine, tmp_path, monkeypatch).score(features_table(200))
    assert bad_rows(scored, 200) == {}
    assert (engine.submitted, engine.forwarded) == ([64, 64, 64, 8], [])


def test_no_more_windows_are_prepared_at_once_than_the_gpus_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = scorer_with(StubEngine(), tmp_path, monkeypatch)
    subject._windows = threading.Semaphore(2)
    stage, inside, most = subject._staging.stage, [], []

    def staged(table: pa.Table) -> Any:
        inside.append(table)
        most.append(len(inside))
        time.sleep(0.05)
        found = stage(table)
        inside.pop()
        return found

    monkeypatch.setattr(subject._staging, "stage", staged)
    with ThreadPoolExecutor(6) as pool:
        windows = list(pool.map(subject.score, [features_table(50)] * 12))
    assert [bad_rows(window, 50) for window in windows] == [{}] * 12
    assert max(most) == 2


def test_a_row_that_the_engine_raises_on_costs_two_calls_a_halving_of_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StubEngine(raises=frozenset({70.0, 199.0}))
    scored = scorer_with(engine, tmp_path, monkeypatch).score(features_table(200))
    assert bad_rows(scored, 200) == {70: "score_error", 199: "score_error"}
    assert scored["stage"][70].as_py() == "score"
    assert scored["message"][70].as_py() == "RuntimeError: index out of range in self"
    # One in a batch of 64, one in a batch of 8; the other two batches are left alone.
    assert engine.submitted == [64, 64, 64, 8]
    assert len(engine.forwarded) <= 2 * 6 + 2 * 3


def test_rows_that_are_not_finite_get_one_more_chance_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StubEngine(nan=frozenset({5.0}), spoils=frozenset({150.0}))
    scored = scorer_with(engine, tmp_path, monkeypatch).score(features_table(200))
    assert bad_rows(scored, 200) == {5: "score_nonfinite"}
    assert scored["message"][5].as_py() == "the model's output is not finite on stub-fp32-cpu"
    assert engine.forwarded == [1] * 65, "the row itself and the 64 of the spoilt batch"


def test_out_of_memory_makes_the_batches_smaller_for_the_rest_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StubEngine(fits=16)
    subject = scorer_with(engine, tmp_path, monkeypatch)
    sizes = []
    for _ in range(4):
        engine.submitted.clear()
        assert bad_rows(subject.score(features_table(128)), 128) == {}
        sizes.append(max(engine.submitted))
    assert sizes == [64, 32, 16, 16]


def test_batches_are_halved_four_times_at_most_and_rows_that_never_fit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StubEngine(fits=1)
    subject = scorer_with(engine, tmp_path, monkeypatch)
    for _ in range(7):
        engine.submitted.clear()
        assert bad_rows(subject.score(features_table(64)), 64) == {}
    assert max(engine.submitted) == 64 >> MAX_HALVINGS
    engine.fits = 0
    assert bad_rows(subject.score(features_table(3)), 3) == dict.fromkeys(range(3), "out_of_memory")


def test_an_error_while_a_window_is_staged_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StubEngine()
    subject = scorer_with(engine, tmp_path, monkeypatch)
    stage = subject._staging.stage

    def raises(table: pa.Table) -> Any:
        usable = zip(table["source_row"].to_pylist(), table["reason"].to_pylist(), strict=True)
        if (42, None) in usable:
            raise TypeError("cannot be padded")
        return stage(table)

    monkeypatch.setattr(subject._staging, "stage", raises)
    scored = subject.score(features_table(100))
    assert bad_rows(scored, 100) == {42: "score_error"}
    assert scored["message"][42].as_py() == "TypeError: cannot be padded"


def test_rows_given_up_before_are_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StubEngine()
    subject = scorer_with(engine, tmp_path, monkeypatch)
    monkeypatch.setattr(subject._staging, "_load_images", lambda table: pytest.fail("its images are left alone"))
    table = features_table(3)
    marked = table.set_column(table.column_names.index("reason"), "reason", pa.array(["process_killed"] * 3))
    scored = subject.score(marked)
    assert scored["prediction"].null_count == 3
    assert engine.submitted == []


def test_an_engine_that_passed_and_then_scores_otherwise_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StubEngine()
    attempt = AttemptFolder(str(tmp_path), "1-a")
    attempt.begin(Taken(), {})
    features = features_table(10)
    reference = np.array([[3 * row + 0.5] for row in range(10)], dtype=np.float32)
    setup = ActorSetup(
        "ab12", sample=Sample(features, features), reference=lambda: reference, decisions=attempt.decisions_uri
    )
    subject = scorer_with(engine, tmp_path, monkeypatch, setup)
    assert bad_rows(subject.score(features_table(200)), 200) == {}
    assert not attempt.is_spoiled
    monkeypatch.setattr(engine, "_logits", lambda values: (3 * values + 0.6).astype(np.float32).reshape(-1, 1))
    with pytest.raises(ParityError, match="10 rows of the sample differ"):
        subject.score(features_table(200))
    assert attempt.is_spoiled
    assert attempt.decisions()["spoiled-ab12"]["error"] == "ParityError"
    assert len(engine.submitted) == 8, "no row is to blame: nothing is split"


def test_a_lost_gpu_is_no_rows_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StubEngine(sticky=frozenset({7.0}))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        scorer_with(engine, tmp_path, monkeypatch).score(features_table(100))
    assert engine.forwarded == [], "nothing is tried on a GPU that is lost"
