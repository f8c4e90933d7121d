"""`jobs.benchmark pipeline`: the quick comparison as a user starts it, its rows, and the arithmetic on what it samples."""

import json
import os
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import bench_flow, bench_limits, bench_pipeline, bench_score, score
from jobs.bench_data import GROUP_ROWS, Recipe, make_cut, repeat_cut
from jobs.bench_document import failures, open_document, ratios
from jobs.bench_peers import measure_predict_proba
from jobs.bench_pipeline import LEVERS, chosen_parts
from jobs.bench_profile import summarize
from jobs.bench_score import ScoreJob
from jobs.bench_series import mean_between, steady_rate, thin_mean, thin_out
from jobs.bench_setup import Bench, Request
from jobs.bench_watch import GpuProbe, Watched, _read_logs, process_kind, watch
from jobs.bench_wire import NarrowingScoringActor, WideFeatureWorker, to_float32, to_uint8
from scoring import pipeline
from scoring.config import ScoreConfig, load_config
from scoring.decoding import DecodePlan
from scoring.engines.base import Shapes
from scoring.errors import ConfigError
from scoring.sizing import size_pools
from scoring.spec import FeatureSpec
from tests.conftest import REPOSITORY


def run_quick(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.benchmark", "pipeline", "--quick", "--output", str(folder), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert document == json.loads((folder / "pipeline.json").read_text())
    return document


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_quick_comparison_accounts_for_every_row_and_agrees_with_predict_proba(tmp_path: Path) -> None:
    document = run_quick(tmp_path)
    parts = document["parts"]
    assert {name: entry["rows"] for name, entry in parts.items()} == dict.fromkeys(("A", "D-exact", "L"), 256)
    assert all(entry["rows_per_s"] > 0 for entry in parts.values())
    ours = parts["D-exact"]
    assert ours["is_accounted"]
    assert (ours["rows_scored"], ours["rows_quarantined"]) == (256, 0)
    assert ours["rows_compared"] == 256
    assert ours["max_abs_diff"] <= 1e-4
    assert ours["flips"] == 0
    assert {"driver", "feature workers", "scoring actors"} <= set(ours["memory"])
    assert sum(actor["rows"] for actor in ours["actors"]) == 256
    assert 0 < ours["ready_s"] < ours["first_score_s"] < ours["wall_s"]
    assert "D/A" in document["ratios"]["D-exact"]
    assert 0 < document["parts"]["L"]["padding_pct"] < 100
    assert (tmp_path / "pipeline.png").stat().st_size > 0
    assert "score actor=" in "".join(file.read_text() for file in (tmp_path / "work" / "logs").iterdir())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_ours_is_held_against_both_limits(tmp_path: Path) -> None:
    document = run_quick(tmp_path, "--only", "D-exact,L,P")
    assert document["parts"]["P"]["rows"] == 256
    assert document["parts"]["P"]["rows_per_s"] > 0
    assert "D/min(L,P)" in document["ratios"]["D-exact"]


GOOD: dict[str, Any] = {
    "rows_per_s": 5.0,
    "rows": 10,
    "rows_scored": 10,
    "rows_quarantined": 0,
    "rows_bad_injected": 0,
    "reasons": {},
    "is_accounted": True,
    "rows_compared": 10,
    "max_abs_diff": 1e-6,
}


@pytest.mark.parametrize("quick", [True, False])
def test_a_run_fails_when_rows_are_not_accounted_for(quick: bool) -> None:
    def failed(**changes: Any) -> list[str]:
        return failures(
            {"quick": quick, "parts": {"D-exact": {**GOOD, **changes}, "L": {"unavailable": "no"}}}, ["D-exact"]
        )

    assert not failed()
    assert "10 rows read, 9 scored and 0 quarantined" in failed(rows_scored=9, is_accounted=False)[0]
    bad = {"by_layout": {"paths": {**GOOD, "rows_quarantined": 1, "is_accounted": False}}}
    assert failures({"quick": quick, "parts": {"bad": bad}}, ["bad"])[0].startswith("paths: 10 rows read")


def test_a_quick_run_fails_on_scores_that_differ_and_on_parts_without_figures() -> None:
    def failed(quick: bool, entry: dict[str, Any]) -> list[str]:
        return failures({"quick": quick, "parts": {"D-exact": entry}}, ["D-exact"])

    differing = {**GOOD, "max_abs_diff": 2e-4}
    assert "differ from predict_proba(realtime=True) by 0.0002" in failed(True, differing)[0]
    assert failed(True, {**GOOD, "max_abs_diff": None})
    assert failed(True, {"unavailable": "no engine"}) == ["D-exact: no engine"]
    assert not failed(False, differing), "fp16 and fast pixels differ by more: reported, not refused"
    assert not failed(False, {"unavailable": "no engine"})
    # As one run on an H100 had it, and ended with 0.
    assert "by 0.395 over 10 rows, the limit is 0.01" in failed(False, {**GOOD, "max_abs_diff": 0.395})[0]
    assert failed(False, {**GOOD, "max_abs_diff": None}), "rows that could not be matched are not upstream's"


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        make_cut(tmp_path / name, Recipe(rows=40, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    contents = [cut.parquet[0].read_bytes() for cut in (first, again, other)]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
    made_at = first.parquet[0].stat().st_mtime_ns
    assert make_cut(tmp_path / "a", Recipe(rows=40, seed=1)) == first
    assert first.parquet[0].stat().st_mtime_ns == made_at, "a cut that is there is not made again"
    assert len(pd.read_parquet(make_cut(tmp_path / "a", Recipe(rows=30, seed=1)).parquet[0])) == 30


def test_both_layouts_hold_the_same_rows_and_texts_are_long(tmp_path: Path) -> None:
    cut = make_cut(tmp_path / "cut", Recipe(rows=GROUP_ROWS + 10))
    assert pq.read_metadata(cut.parquet[0]).num_row_groups == 2
    as_bytes, as_paths = pd.read_parquet(cut.parquet[0]), pd.read_csv(cut.csv[0])
    assert list(as_bytes.columns) == list(as_paths.columns)
    assert as_bytes["PetID"].tolist() == as_paths["PetID"].tolist()
    for content, path in zip(as_bytes["Images"].head(50), as_paths["Images"].head(50), strict=True):
        assert (content is None and pd.isna(path)) or content == Path(path).read_bytes()
    words = as_bytes["Description"].dropna().str.split().str.len()
    assert 34 <= words.median() <= 46
    assert words.max() > 150
    assert 0.01 < as_bytes["Images"].isna().mean() < 0.05


def test_bad_images_are_as_many_as_it_says_and_unusual_ones_decode(tmp_path: Path) -> None:
    from scoring.images import BadImageError, decode_image

    cut = make_cut(tmp_path / "cut", Recipe(rows=400, bad=True))
    assert (cut.num_bad, cut.num_unusual) == (4, 3)
    bad = 0
    for content in pd.read_parquet(cut.parquet[0])["Images"].dropna():
        try:
            decode_image(content, max_pixels=10**8)
        except BadImageError:
            bad += 1
    assert bad == cut.num_bad
    paths = pd.read_csv(cut.csv[0])["Images"].dropna()
    assert sum(not Path(path).exists() for path in paths) == 2, "half of the bad ones are not there"
    assert paths.str.contains("unusual").sum() == cut.num_unusual


def test_size_classes_and_cuts_without_images(tmp_path: Path) -> None:
    from PIL import Image

    make_cut(tmp_path / "sizes", Recipe(rows=40, images="sizes"))
    sizes = [Image.open(path).size for path in (tmp_path / "sizes" / "images").glob("*.jpg")]
    shares = {size: sizes.count(size) for size in set(sizes)}
    assert shares == {(320, 240): 4, (500, 375): 24, (800, 600): 10, (1600, 1200): 2}
    plain = make_cut(tmp_path / "plain", Recipe(rows=20, images="none", median_words=130))
    assert "Images" not in pd.read_parquet(plain.parquet[0]).columns
    assert not (tmp_path / "plain" / "images").exists()


def test_rows_are_repeated_by_whole_files_under_new_names(tmp_path: Path) -> None:
    cut = make_cut(tmp_path / "cut", Recipe(rows=30, images="none"))
    folder, rows = repeat_cut(cut, 100, tmp_path / "input")
    files = sorted(folder.iterdir())
    assert rows == 120
    assert len({file.name for file in files}) == 4
    assert sum(pq.read_metadata(file).num_rows for file in files) == 120
    assert repeat_cut(cut, 30, tmp_path / "input", layout="paths")[1] == 30
    assert [file.suffix for file in folder.iterdir()] == [".csv"]


def test_steady_rate_leaves_out_the_start_and_the_end() -> None:
    # 10 rows/s but for a slow start and a slow end.
    landed = [(100.0 + i, 10.0 * i) for i in range(1, 10)] + [(200.0, 100.0)]
    assert steady_rate(landed) == pytest.approx(10)
    ahead = [(float(at), 100.0 * at) for at in range(1, 5)] + [(4.0 + at, 400.0 + 10.0 * at) for at in range(1, 61)]
    assert steady_rate(ahead, since=0.5) == pytest.approx(10), "what was prepared ahead is scored by then"
    assert steady_rate([(5.0, 256.0)]) is None, "one part says nothing"
    assert steady_rate([]) is None
    assert steady_rate([(1.0, 50.0), (1.0, 60.0), (2.0, 100.0)]) is None, "points of one moment have no rate"


def test_series_are_thinned_without_losing_their_ends_or_means() -> None:
    series = [(float(i), float(i % 2)) for i in range(1000)]
    thin = thin_out(series, points=100)
    assert (len(thin), thin[0], thin[-1]) == (100, [0.0, 0.0], [999.0, 1.0])
    assert {value for _, value in thin_mean(series, points=100)} == {0.5}
    assert len(thin_mean(series, points=300)) <= 300
    assert thin_out(series[:3]) == [[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]
    assert mean_between(series, 2.0, 3.0) == 0.5
    assert mean_between([], 0.0, 1.0) is None


HEAD: dict[str, Any] = {"device": "cpu", "cores": 2, "quick": True, "seed": 0, "date": "2026-01-02"}


def test_a_document_goes_on_with_what_is_there_and_refuses_another_machines(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.json"
    assert open_document(path, HEAD)["parts"] == {}
    path.write_text(json.dumps({**HEAD, "date": "2026-01-01", "parts": {"A": {"rows_per_s": 1.0}}, "ratios": {}}))
    found = open_document(path, HEAD)
    assert found["parts"] == {"A": {"rows_per_s": 1.0}}
    assert found["date"] == "2026-01-02"
    with pytest.raises(ConfigError, match="device 'cpu', now 'NVIDIA H100'"):
        open_document(path, {**HEAD, "device": "NVIDIA H100"})


def test_ratios_compare_ours_with_each_peer_and_the_lower_limit() -> None:
    parts: dict[str, Any] = {
        "A": {"rows_per_s": 10.0},
        "C": {"unavailable": "no"},
        "D-exact": {"rows_per_s": 50.0, "steady_rows_per_s": 80.0},
        "D-gpu": {"unavailable": "no"},
        "L": {"rows_per_s": 400.0},
        "P": {"rows_per_s": 200.0, "by_decode": {"exact": {"rows_per_s": 100.0}}},
    }
    expected = {"D/A": 5.0, "D/min(L,P)": 0.5, "steady/A": 8.0, "steady/min(L,P)": 0.8}
    assert ratios(parts) == {"D-exact": expected}
    parts["D-exact"]["steady_rows_per_s"] = None
    assert ratios(parts) == {"D-exact": {"D/A": 5.0, "D/min(L,P)": 0.5}}


def test_a_decoder_whose_features_were_not_measured_is_not_held_against_anothers() -> None:
    parts: dict[str, Any] = {
        "D-exact": {"rows_per_s": 50.0, "steady_rows_per_s": 80.0},
        "D-gpu": {"rows_per_s": 300.0, "steady_rows_per_s": 320.0},
        "L": {"rows_per_s": 800.0},
        "P": {"rows_per_s": 400.0, "by_decode": {"gpu": {"rows_per_s": 400.0}, "exact": {"unavailable": "no"}}},
    }
    assert ratios(parts) == {"D-exact": {}, "D-gpu": {"D/min(L,P)": 0.75, "steady/min(L,P)": 0.8}}


def test_parts_keep_their_order_and_an_unknown_one_is_named() -> None:
    assert chosen_parts(Request(Path("."), only=("L", "A"))) == ("A", "L")
    assert chosen_parts(Request(Path("."), quick=True)) == ("A", "D-exact", "L")
    assert "levers" not in chosen_parts(Request(Path(".")))
    with pytest.raises(ConfigError, match="no part 'B'; the parts are A, A\\+, C"):
        chosen_parts(Request(Path("."), only=("B",)))


def test_every_lever_is_a_configuration_that_loads(tmp_path: Path) -> None:
    flags = {"input.paths": ["/data"], "predictor.path": "/model", "output.path": "/scores"}
    for lever in LEVERS:
        overrides = [f"{key}={value}" for key, value in lever.settings.items()]
        assert isinstance(load_config(file=None, flags=flags, overrides=overrides, cwd=tmp_path), ScoreConfig)
    assert len({lever.name for lever in LEVERS}) == len(LEVERS) >= 7


def test_levers_go_on_where_they_were_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(job: Any, *_: object, **__: object) -> dict[str, Any]:
        measured.append(str(job))
        return {"rows_per_s": float(len(measured))}

    monkeypatch.setattr(bench_pipeline, "measure_score", measure)
    monkeypatch.setattr(Bench, "job", lambda _, settings: ScoreJob((), 1, tmp_path, tmp_path, settings))
    kept: dict[str, Any] = {"levers": {"levers": {LEVERS[0].name: {"rows_per_s": 7.0}}}}
    bench = Bench(Request(tmp_path), HEAD, kept, kept.__setitem__)
    levers = bench_pipeline.PARTS["levers"](bench)["levers"]
    assert list(levers) == [lever.name for lever in LEVERS]
    assert levers[LEVERS[0].name] == {"rows_per_s": 7.0}
    assert len(measured) == len(LEVERS) - 1
    assert kept["levers"]["levers"] == levers, "each is kept at once"
    bench_pipeline.PARTS["levers"](bench)
    assert len(measured) == 2 * len(LEVERS) - 1, "with all there, all are measured anew"


def test_the_run_of_the_median_steady_rate_stands_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that land in a lump make one run look three times as fast as it was."""
    common = {"late_rows_per_s": 1.0, "first_score_s": 1.0, "ready_s": 1.0, "wall_s": 9.0}
    runs = [
        {"rows_per_s": rate, "steady_rows_per_s": steady, **common} for rate, steady in ((2, 12.0), (1, 4.8), (3, 4.7))
    ]
    monkeypatch.setattr(bench_score, "_run_once", lambda _: runs.pop(0))
    (tmp_path / "cache" / "engines").mkdir(parents=True)
    entry = bench_score.measure_score(ScoreJob((tmp_path,), 1, tmp_path, tmp_path), 3, warm_up=True)
    assert (entry["steady_rows_per_s"], entry["min"], entry["max"]) == (4.8, 1, 3)
    assert [run["steady_rows_per_s"] for run in entry["runs"]] == [12.0, 4.8, 4.7]


def test_a_job_on_few_cores_with_other_sizes_is_still_our_command(tmp_path: Path) -> None:
    job = ScoreJob((tmp_path,), 1, tmp_path, tmp_path, {"images.decode": "gpu"})
    assert job.command(tmp_path)[1:3] == ["-m", "jobs.score"]
    changed = replace(job, flow={"calls": 1}, cores=4).command(tmp_path)
    assert changed[:3] == ["taskset", "--cpu-list", "0-3"]
    assert changed[4:8] == ["-m", "jobs.bench_flow", "calls=1", "--"]
    assert "resources.cpus=4" in changed
    assert "images.decode=gpu" in changed


def test_other_sizes_reach_the_plan_and_leave_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(score, "app", lambda args: seen.append((args, pipeline.size_flow)))  # type: ignore[attr-defined]
    before = pipeline.size_flow  # type: ignore[attr-defined]
    bench_flow.main(["calls=1", "window_rows=512", "--", "--dry-run"])
    ((arguments, size_flow),) = seen
    assert arguments == ["--dry-run"]
    flags = {"input.paths": ["/data"], "predictor.path": "/model", "output.path": "/scores"}
    config = load_config(file=None, flags=flags, overrides=[], cwd=tmp_path)
    spec = FeatureSpec("y", "binary", (0, 1), (), (), (), (), (), (), (), (), False)
    pools = size_pools(config, [{"CPU": 16.0, "GPU": 1.0}])
    flow = size_flow(config, spec, pools, DecodePlan(), 10**6)
    assert (flow.calls, flow.window_rows, flow.block_rows) == (1, 512, 4096)
    assert pipeline.size_flow is before  # type: ignore[attr-defined]


def test_pixels_that_travel_as_fp32_come_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [bytes(range(256)), b"", None, bytes(reversed(range(256)))]
    column = pa.chunked_array(
        [pa.array(contents, pa.large_binary()).slice(1), pa.array(contents[:1], pa.large_binary())]
    )
    table = pa.table({"row": range(4), "feat:image:pixels": column})
    wide = to_float32(table)
    floats = np.frombuffer(wide["feat:image:pixels"][3].as_py(), dtype=np.float32)
    np.testing.assert_allclose(floats, np.arange(256) / 255, rtol=1e-6)
    back = [content or b"" for content in to_uint8(wide)["feat:image:pixels"].to_pylist()]
    assert back == [content or b"" for content in column.to_pylist()]
    assert wide["row"] == table["row"]
    seen: list[Any] = []
    monkeypatch.setattr(score, "app", lambda args: seen.append((pipeline.FeatureWorker, pipeline.ScoringActor)))
    bench_flow.main(["float32_pixels=1", "--"])
    assert seen == [(WideFeatureWorker, NarrowingScoringActor)]
    assert pipeline.FeatureWorker is not WideFeatureWorker


def test_processes_are_told_apart_by_their_titles() -> None:
    assert process_kind("ray::MapWorker(MapBatches(FeatureWorker)).submit") == "feature workers"
    assert process_kind("ray::MapWorker(MapBatches(ScoringActor))") == "scoring actors"
    assert process_kind("ray::IDLE") == "other ray workers"
    assert process_kind("/env/site-packages/ray/core/src/ray/raylet/raylet --x") == "ray system"
    assert process_kind("/usr/bin/python -c x") == "other"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The driver's library with two GPUs, 40 and 60 % busy, without JPEG engines."""

    class BrokenError(Exception):
        pass

    def fail(*_: object) -> None:
        raise BrokenError

    gpu = types.SimpleNamespace(
        NVMLError=BrokenError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetUtilizationRates=lambda i: types.SimpleNamespace(gpu=40 + 20 * i),
        nvmlDeviceGetMemoryInfo=lambda i: types.SimpleNamespace(used=2**30),
        nvmlDeviceGetJpgUtilization=fail,
        NVML_CLOCK_SM=1,
        nvmlDeviceGetClockInfo=lambda i, kind: (1980, 420)[i] if kind == 1 else 0,
        # Idle, and slowed down by heat.
        nvmlDeviceGetCurrentClocksEventReasons=lambda i: (0x1, 0x24)[i],
    )
    monkeypatch.setitem(sys.modules, "pynvml", gpu)
    return gpu


def test_gpu_probe_keeps_the_drivers_figures_and_does_without(nvml: types.SimpleNamespace) -> None:
    probe = GpuProbe()
    probe.take(1.234)
    assert probe.busy == [(1.23, 50)]
    assert probe.jpeg == []
    assert (probe.clock, probe.hot) == ([(1.23, 1200)], [(1.23, 50.0)])
    assert probe.peak_mib == 2048
    nvml.nvmlDeviceGetCurrentClocksEventReasons = nvml.nvmlDeviceGetJpgUtilization
    probe.take(2.0)
    assert (len(probe.busy), len(probe.hot)) == (2, 1)
    nvml.nvmlInit = nvml.nvmlDeviceGetJpgUtilization
    absent = GpuProbe()
    absent.take(1.0)
    assert absent.busy == []


def test_a_peer_of_this_process_tells_how_busy_the_gpu_was(nvml: types.SimpleNamespace) -> None:
    settings = types.SimpleNamespace(
        num_workers_inference=2, per_gpu_batch_size=8, inference_batch_size_ratio=4, precision=32
    )

    def predict_proba(rows: pd.DataFrame) -> None:
        assert len(rows) == 100
        # Until the driver was asked: 0.1 s.
        deadline = time.monotonic() + 30
        asked.clear()
        while not asked and time.monotonic() < deadline:
            time.sleep(0.01)

    asked: list[int] = []
    memory = nvml.nvmlDeviceGetMemoryInfo

    def told_memory(gpu: int) -> Any:
        asked.append(gpu)
        return memory(gpu)

    nvml.nvmlDeviceGetMemoryInfo = told_memory
    learner = types.SimpleNamespace(_config=types.SimpleNamespace(env=settings))
    predictor = types.SimpleNamespace(_learner=learner, predict_proba=predict_proba)
    entry = measure_predict_proba(predictor, pd.DataFrame({"a": range(100)}), 2)
    assert entry["gpu_busy_pct"] == 50.0
    assert len(entry["series"]["gpu_busy"]) >= 2
    assert {value for _, value in entry["series"]["gpu_busy"]} == {50.0}
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu-probe"]


def test_preparation_alone_takes_no_more_rows_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ScoreJob] = []

    def measure(job: ScoreJob) -> dict[str, Any]:
        seen.append(job)
        return {"rows_per_s": 10.0 * len(seen)}

    monkeypatch.setattr(bench_limits, "measure_feature_limit", measure)
    monkeypatch.setattr(bench_pipeline, "_PREPARED_ROWS", 2 * GROUP_ROWS)
    monkeypatch.setattr(bench_pipeline, "_GPU_PREPARED_ROWS", 4 * GROUP_ROWS)
    parts = {"D-exact": GOOD, "D-gpu": GOOD}
    bench = Bench(Request(tmp_path, None, rows=8 * GROUP_ROWS), {"device": "cpu"}, parts, lambda *_: None)
    bench.__dict__["seed_predictor"] = tmp_path / "predictor"
    bench.__dict__["seed_cut"] = make_cut(tmp_path / "cut", Recipe(rows=GROUP_ROWS, images="none"))
    entry = bench_pipeline.PARTS["P"](bench)
    assert [dict(job.settings) for job in seen] == [{"images.decode": "exact"}, {"images.decode": "gpu"}]
    for job, groups in zip(seen, (2, 4), strict=True):
        files = [file for folder in job.inputs for file in folder.iterdir()]
        assert job.rows == sum(pq.read_metadata(file).num_rows for file in files) == groups * GROUP_ROWS
    assert entry["rows_per_s"] == 20.0
    assert entry["by_decode"]["exact"]["rows_per_s"] == 10.0


def test_watching_counts_parts_as_they_land_and_stops_what_takes_too_long(tmp_path: Path) -> None:
    script = """
import pathlib, subprocess, sys, time, json
import pyarrow as pa, pyarrow.parquet as pq
run = pathlib.Path(sys.argv[1]) / "runs" / "r"
for kind, number in (("scores", 0), ("quarantine", 0), ("scores", 1)):
    (run / kind).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"a": [1, 2, 3]}), run / kind / f"part-{number}.parquet")
    time.sleep(0.5)
for number in range(2):
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 1.5: pass", "ray::Write"])
print("words"); print(json.dumps({"rows_read": 9}))
time.sleep(float(sys.argv[2]))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    watched = watch([*command, "0"], tmp_path, timeout_s=60, environment={})
    assert watched.code == 0
    assert watched.summary == {"rows_read": 9}
    assert [rows for _, rows in watched.landed] == [3, 6, 9]
    assert watched.memory["driver"]["peak_mib"] > 10
    assert watched.cpu["driver"]["num"] == 1
    assert watched.cpu["other ray workers"]["num"] == 2, "one after the other"
    assert 1.5 <= watched.cpu["other ray workers"]["cpu_s"] <= 4.5
    assert watched.spilled_mib == 0
    stopped = watch([*command, "600"], tmp_path / "other", timeout_s=4, environment={})
    assert stopped.code != 0
    assert stopped.wall_s < 30


def test_what_an_actor_says_of_itself_is_kept_line_by_line(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    form = "2026-11-28 10:00:{} INFO score actor=a1 provider=cuda rows={} rows_per_s=9 window={} wait_pct={} stage_pct=4 batch=8"
    lines = [
        form.format("10,000", 100, 10, 50),
        "others",
        form.format("20,500", 300, 20, 25),
        form.format("21,000", 310, 5, 24),
    ]
    (logs / "worker-1.err").write_text("\n".join(lines) + " final=true\n")
    watched = Watched(0, 1.0, {}, "")
    _read_logs(logs, datetime(2026, 11, 28, 10, 0, 0).timestamp(), watched)
    (actor,) = watched.actors
    assert [actor[name] for name in ("actor", "provider", "rows", "wait_pct", "stage_pct")] == [
        "a1",
        "cuda",
        310,
        24,
        4,
    ]
    assert [(item["at_s"], item["rows"], item["window"], item["wait_pct"]) for item in actor["lines"]] == [
        (10.0, 100, 10, 50),
        (20.5, 300, 20, 25),
    ]


def test_padding_is_what_batches_have_beyond_their_rows_tokens() -> None:
    shapes = Shapes((2, 4), (8, 16))
    lengths = np.array([10, 3, 8, 16, 5])
    # Sorted: 3, 5, 8, 10 as 4 x 16, and 16 as 2 x 16.
    assert bench_limits.padding_pct(lengths, shapes, 4, None) == round(100 * (1 - 42 / 96), 1)
    # 2 x 8, 2 x 16 and 2 x 16.
    assert bench_limits.padding_pct(lengths, shapes, 4, 32) == round(100 * (1 - 42 / 80), 1)
    assert bench_limits.padding_pct(np.zeros(5, dtype=np.int64), shapes, 4, None) is None


def test_a_trace_says_how_busy_the_gpu_was_and_what_a_window_asks_of_it() -> None:
    def event(category: str, name: str, start: float, length: float) -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": start, "dur": length}

    events: list[dict[str, Any]] = [
        event("kernel", "conv", 0, 4_000),
        event("kernel", "resize", 3_000, 2_000),  # beside the other
        event("gpu_memcpy", "HtoD", 8_000, 2_000),
        event("cuda_runtime", "cudaLaunchKernel", 0, 100),
        event("cuda_runtime", "cudaLaunchKernel", 50, 300),
        event("cpu_op", "aten::add", 0, 9_999),
        {"name": "a process' name", "ph": "M"},
    ]
    found = summarize(events, windows=2)
    assert found["gpu_busy_pct"] == 70.0, "5 of 10 ms in kernels, two at once count once, and 2 of copies"
    assert found["kernels"][:3] == [
        {"name": "conv", "count": 0.5, "ms": 2.0},
        {"name": "resize", "count": 0.5, "ms": 1.0},
        {"name": "HtoD", "count": 0.5, "ms": 1.0},
    ]
    assert found["calls"][0] == {"name": "cudaLaunchKernel", "count": 1.0, "ms": 0.2}
    assert summarize([], windows=1)["gpu_busy_pct"] is None
