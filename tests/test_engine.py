"""Engines on the zoo's predictors: parity, the tutorial's flow, upstream's deployment test, the cache and the gate.

One subprocess imports AutoGluon once and runs all parts; the tests read its figures. What needs a GPU is in test_gpu.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import engines
from tests.predictors import Predictor

pytestmark = pytest.mark.timeout(1200)

COMPARED = (
    "binary_fusion",
    "preset_fusion",
    "multiclass_fusion",
    "regression",
    "text_only",
    "image_only",
    "ft_transformer",
)
# Numbers and categories, texts of 2 to 512 tokens, one image a row and two.
CUT_ANEW = ("ft_transformer", "text_only", "preset_fusion", "multiclass_fusion")
FP32_LIMIT = 1e-4
FP16_LIMIT = 5e-3


@pytest.fixture(scope="module")
def figures(zoo: Mapping[str, Predictor], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Every part on the seed model's kind, and the comparison on every predictor."""
    folder = tmp_path_factory.mktemp("engines")
    parts = {name: ["compare_engines"] for name in COMPARED}
    parts["binary_fusion"] += ["run_tutorial", "deploy", "build_ahead", "mistrust", "share_cache", "start_together"]
    parts["preset_fusion"] += ["build_ahead"]
    for name in CUT_ANEW:
        parts[name] += ["cut_anew"]
    jobs = [(name, zoo[name].path, zoo[name].rows, parts[name]) for name in COMPARED]
    return engines.run(folder / "figures.json", folder / "cache", jobs)


@pytest.mark.parametrize("name", COMPARED)
def test_every_engine_equals_the_reference_on_the_predictors_own_rows(name: str, figures: Mapping[str, Any]) -> None:
    found = figures["compare_engines"][name]
    print(f"{name}: {found}")
    assert found["spread"] > 1e-3, "constant scores would prove nothing"
    assert found["reference"] == "predict_proba(realtime=True) in fp32", "not our own network against itself"
    for engine in ("torch-fp32", "cpu-fp32"):
        parity = found["engines"][engine]
        assert parity["rows"] == engines.CPU_ROWS
        assert parity["max_abs_diff"] <= FP32_LIMIT
        assert parity["label_flips"] == parity["non_finite"] == 0
    # What a GPU would run in half, run here: it shows overflow and a wrong conversion, not the GPU's own rounding.
    for engine in ("cuda's graph-fp16", "tensorrt's graph-fp16"):
        parity = found["engines"][engine]
        assert 0 < parity["max_abs_diff"] <= FP16_LIMIT
        assert parity["label_flips"] == parity["non_finite"] == 0
    rungs = found["engines"]["auto"]["rungs"]
    assert [rung.split()[0] for rung in rungs] == ["cpu-fp32", "torch-fp32"], "the ladder names every rung"
    assert sum(" used" in rung for rung in rungs) == 1


@pytest.mark.parametrize("name", CUT_ANEW)
def test_on_the_cpu_a_row_has_the_same_logits_bit_for_bit_in_every_batch(name: str, figures: Mapping[str, Any]) -> None:
    found = figures["cut_anew"][name]
    print(f"{name}: {found}")
    assert set(found) == {"torch", "cpu"}
    for engine in found.values():
        assert engine["rows"] >= 40
        assert engine["spread"] > 1e-3, "constant logits would prove nothing"
        assert engine["differ"] == 0


def test_the_tutorial_runs_as_written_with_categorical_columns(figures: Mapping[str, Any]) -> None:
    found = figures["run_tutorial"]["binary_fusion"]
    assert found["class_name"] == "EngineModule"
    assert found["spread"] > 1e-3
    assert found["max_abs_diff"] <= 0.01
    assert max(found["max_abs_diff"], found["realtime_diff"]) <= FP32_LIMIT
    plain, fast = found["metrics"]
    assert plain == fast
    assert found["again"] == "cpu-fp32-cpu", "predictor.optimize_for_inference is ours, and takes upstream's names"
    assert "reload it with MultiModalPredictor.load()" in found["refusal"]
    assert found["restored_diff"] <= 1e-6, "a predictor saved afterwards is the one that was fitted"


def test_upstreams_deployment_test_passes_on_ours_and_fails_on_upstreams_call(figures: Mapping[str, Any]) -> None:
    found = figures["deploy"]["binary_fusion"]
    assert set(found["max_abs_diff"]) == {"2", "4", "8"}
    assert max(found["max_abs_diff"].values()) <= 0.01
    # When this fails, upstream has repaired its export, and the README can say so.
    assert "'tuple' object has no attribute 'dtype'" in found["upstream"]


@pytest.mark.parametrize("name", ["binary_fusion", "preset_fusion"])
def test_the_fp16_graph_builds_with_tensorrt_for_rtx_without_a_gpu(name: str, figures: Mapping[str, Any]) -> None:
    built = figures["build_ahead"][name]
    print(f"{name}: {built}")
    assert set(built) == {"SM80", "SM89"}
    assert all(item["bytes"] > 1_000_000 for item in built.values())


def test_eight_processes_on_an_empty_cache_build_once_and_a_second_start_builds_nothing(
    figures: Mapping[str, Any],
) -> None:
    found = figures["start_together"]["binary_fusion"]
    assert found["first"]["built"] == ["export", "graph"]
    assert found["second"]["built"] == []
    assert len(found["first"]["sums"]) == 1, "all eight answer alike"
    assert found["second"]["sums"] == found["first"]["sums"]


def test_two_predictors_of_one_shape_keep_their_own_scores_in_one_cache(figures: Mapping[str, Any]) -> None:
    found = figures["share_cache"]["binary_fusion"]
    assert found["first"]["logits"] != found["second"]["logits"]
    assert max(found[name]["own_diff"] for name in ("first", "second")) <= FP32_LIMIT


def test_an_engine_whose_weights_were_scaled_is_refused(figures: Mapping[str, Any]) -> None:
    found = figures["mistrust"]["binary_fusion"]
    assert found["said"].startswith(
        "ParityError: engine.provider: cpu was refused: fp32 differs from the fp32 reference by"
    )
    assert "limit 0.005" in found["said"]
    assert found["honest"] == "cpu-fp32-cpu", "the same request passes with the graph as exported"


def test_a_named_engine_that_cannot_run_ends_the_job_with_4_and_the_reason(
    score: Any, zoo: Mapping[str, Predictor], tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("here cuda can run")
    predictor = zoo["ft_transformer"]
    run = score(
        *("--input", predictor.rows, "--predictor", predictor.path, "--output", tmp_path / "out"),
        *("--set", "engine.provider=cuda"),
    )
    assert run.code == 4, run.log
    assert "engine.provider: cuda cannot run here: no GPU is visible to this process" in run.error
    assert "engine.provider=auto" in run.error
    assert not (tmp_path / "out" / "latest.json").exists()
