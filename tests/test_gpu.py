"""On a machine with a GPU: `pytest -m gpu`. Without one these tests fail, they do not skip."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import beside, engines, gpu, pixels
from tests.predictors import Predictor

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

COMPARED = ("binary_fusion", "preset_fusion", "regression", "text_only", "image_only", "ft_transformer")
LIMITS = {"fp32": 1e-4, "fp16": 5e-3}


def gpu_name() -> str:
    import torch

    assert torch.cuda.is_available(), "this test needs a GPU"
    return str(torch.cuda.get_device_name(0))


def test_scores_on_the_gpu_equal_the_cpu_reference(tmp_path: Path) -> None:
    name = gpu_name()
    document = gpu.check(tmp_path / "demo", 1_000)
    used = [engine for engines_of_part in document["engine"]["used"] for engine in engines_of_part.split(", ")]
    assert used
    assert all(engine.endswith(name) for engine in used)
    assert document["totals"]["rows_scored"] == 998
    assert document["against_cpu_fp32"]["max_abs_diff"] <= LIMITS["fp16"]


def test_every_engine_equals_the_reference(zoo: Mapping[str, Predictor], tmp_path: Path) -> None:
    gpu_name()
    jobs = [(name, zoo[name].path, zoo[name].rows, ["compare_engines"]) for name in COMPARED]
    figures = engines.run(tmp_path / "out.json", tmp_path / "cache", jobs)["compare_engines"]
    for name in COMPARED:
        print(f"{name}: {figures[name]}")
        for engine in ("torch-fp32", "cuda-fp32", "torch-fp16", "cuda-fp16"):
            parity = figures[name]["engines"][engine]
            assert parity["max_abs_diff"] <= LIMITS[engine[-4:]], f"{name} on {engine}"
            assert parity["label_flips"] == parity["non_finite"] == 0
        rungs = figures[name]["engines"]["auto"]["rungs"]
        assert any(rung.startswith("tensorrt-fp16") for rung in rungs), "the ladder names TensorRT, with the reason"


def test_the_tutorial_runs_with_the_compiled_engine(zoo: Mapping[str, Predictor], tmp_path: Path) -> None:
    name = gpu_name()
    seed = zoo["binary_fusion"]
    jobs = [("binary_fusion", seed.path, seed.rows, ["run_tutorial"])]
    found = engines.run(tmp_path / "out.json", tmp_path / "cache", jobs)["run_tutorial"]["binary_fusion"]
    assert found["used"] == f"torch-compiled-fp16-{name}"
    assert found["max_abs_diff"] <= 0.01


def test_pixels_of_every_way_are_pillows_and_all_find_the_same_bad_rows(tmp_path: Path) -> None:
    gpu_name()
    found = pixels.check(tmp_path / "cut", 2_000)
    print(found)
    assert found["bad_reference"] == found["bad_injected"] > 0
    for way, least, most in (("exact", 1.0, 0), ("fast", 0.99, 2), ("gpu", 0.999, 2), ("gpu, half on cores", 0.999, 2)):
        assert found[way]["equal"] >= least, way
        assert found[way]["max"] <= most, way
        assert found[way]["same_bad"], way


def test_threads_beside_each_other_score_as_one_alone(tmp_path: Path) -> None:
    gpu_name()
    found = beside.check(tmp_path)
    print(found)
    assert found["windows"] > found["calls"]
    assert found["alone"] == found["beside"] == {"pixels": 0, "logits": 0}
