"""`python -m jobs.benchmark`: engines and pipelines side by side, in one run on the same rows.

    python -m jobs.benchmark forward  [--quick] [--output DIR]
    python -m jobs.benchmark tutorial [--quick] [--output DIR]
    python -m jobs.benchmark pipeline [--quick] [--output DIR] [--only A,D-exact,...] [--rows N] [--repeats N]

A table for people, and one JSON document as the last line. Figures are ratios within one run on one machine; no speed is
asserted anywhere.
"""

import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True)
# The JSON document has standard output to itself.
console = Console(stderr=True, highlight=False, width=160)
logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "onnxruntime-gpu", "onnx", "transformers", "timm", "autogluon.multimodal", "ray", "pyarrow")
_REPEATS = 3
_QUEUED = 8

Quick = Annotated[bool, typer.Option(help="Small models, few rows: minutes on two cores.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder for the models, the JSON and the charts (default: a new one).")
]
Models = Annotated[Path | None, typer.Option(help="Folder of predictors made before by jobs.bench_models.")]


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    import torch

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": versions,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
    }


def measure(
    step: Callable[[], object],
    rows: int,
    *,
    seconds: float,
    finish: Callable[[], object],
    repeats: int = _REPEATS,
    warm_ups: int = 3,
) -> dict[str, float]:
    """Median and spread of rows/s over timed stretches; `finish` waits for the device."""
    for _ in range(warm_ups):
        step()
    finish()
    rates = []
    for _ in range(repeats):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            # Some in a queue, as a run has them; an endless one would let the clock run ahead of the device.
            for _ in range(_QUEUED):
                step()
            count += _QUEUED
            finish()
        rates.append(rows * count / (time.perf_counter() - start))
    return {"rows_per_s": round(statistics.median(rates), 1), "min": round(min(rates), 1), "max": round(max(rates), 1)}


@app.callback()
def benchmark() -> None:
    """Engines and pipelines side by side, in one run on the same rows."""


@app.command()
def forward(
    quick: Quick = False,
    output: Output = None,
    models: Models = None,
    only: Annotated[str | None, typer.Option(help="Engines to measure, by commas, as the table names them.")] = None,
) -> None:
    """The network alone, inputs on the device: rows/s of every engine at every token count, beside upstream's ways."""
    import torch

    from jobs.bench_models import SEED_MODEL, build_predictor
    from scoring.engines.build import EngineRequest, has_gpu
    from scoring.engines.cache import EngineCache
    from scoring.predictor import extract_spec, load_predictor

    _set_up()
    folder = output or Path(tempfile.mkdtemp(prefix="benchmark-"))
    predictor = load_predictor(
        build_predictor(SEED_MODEL, (models or folder / "models") / SEED_MODEL, "small" if quick else "usual")
    )
    spec = extract_spec(predictor)
    rows, seconds = (32, 0.3) if quick else (512, 1.0)
    tokens = (32, 64) if quick else (32, 64, 128, 256)
    if not has_gpu():
        torch.set_num_threads(os.cpu_count() or 1)
    request = EngineRequest(
        lambda: predictor, spec, EngineCache(str(folder / "cache")), batch_rows=rows, num_threads=os.cpu_count() or 1
    )
    results = [
        result
        for name, run in _forward_engines(request, only)
        for result in _measure_forward(name, run, request, rows, tokens, seconds)
    ]
    document = {**describe_machine(), "command": "forward", "quick": quick, "rows": rows, "results": results}
    _print_forward(results, tokens, rows)
    _finish(document, folder, "forward.json")


def _forward_engines(request: Any, only: str | None) -> Iterator[tuple[str, Any]]:
    """Every way to run the network here, or those of `only`: ours by provider and precision, and what upstream does or
    would do."""
    from scoring.engines.base import EngineUnavailable
    from scoring.engines.build import build_engine, has_gpu
    from scoring.engines.compiled import build_compiled

    ways: list[tuple[str, Callable[[], Any]]] = [
        ("torch fp32 (reference)", lambda: build_engine(request, "torch", "fp32")[0])
    ]
    if has_gpu():
        ways += [
            ("upstream's torch: fp16 autocast", lambda: _Autocast(request)),
            ("upstream's ONNX: fp32, as exported", lambda: _plain_onnx(request)),
            ("cuda fp32", lambda: build_engine(request, "cuda", "fp32")[0]),
            ("cuda fp16", lambda: build_engine(request, "cuda", "fp16")[0]),
            ("torch fp16", lambda: build_engine(request, "torch", "fp16")[0]),
            ("torch-compiled fp16", lambda: build_compiled(request, "fp16")),
            ("tensorrt fp16", lambda: build_engine(request, "tensorrt", "fp16")[0]),
        ]
    else:
        ways.append(("cpu fp32", lambda: build_engine(request, "cpu", "fp32")[0]))
    wanted = {name.strip() for name in only.split(",")} if only else {name for name, _ in ways}
    for name, build in ways:
        if name not in wanted:
            continue
        start = time.perf_counter()
        try:
            engine = build()
        except EngineUnavailable as error:
            logger.warning("%s: %s", name, error)
            yield name, str(error)
            continue
        logger.info("%s: built in %.1f s", name, time.perf_counter() - start)
        yield name, engine
        engine.close()


class _Autocast:
    """The network as upstream runs it on a GPU: fp32 weights under fp16 autocast."""

    def __init__(self, request: Any) -> None:
        from scoring.engines.build import build_engine

        self._engine = build_engine(request, "torch", "fp32")[0]

    def run(self, tensors: list[Any]) -> Any:
        import torch

        with torch.autocast("cuda", dtype=torch.float16):
            return self._engine.run(tensors)  # type: ignore[attr-defined]

    def warm_up(self) -> None:
        self._engine.warm_up()

    def close(self) -> None:
        self._engine.close()


def _plain_onnx(request: Any) -> Any:
    """The exported graph without any fusion, in ONNX Runtime's CUDA provider with its default TF32: what upstream's call
    would run if its export worked."""
    from scoring.engines.build import build_graph
    from scoring.engines.onnx_engine import OnnxGpuEngine

    graph = build_graph(request, "fp32", "tensorrt")
    return OnnxGpuEngine(graph, request.spec, "fp32", request.shapes, provider="cuda", options={"device_id": 0})


def _measure_forward(
    name: str, engine: Any, request: Any, rows: int, tokens: tuple[int, ...], seconds: float
) -> list[dict[str, Any]]:
    import numpy as np
    import torch

    from scoring.engines.build import build_engine
    from scoring.engines.torch_engine import CUDA, to_tensor
    from scoring.flat import describe_inputs, synthetic_arrays
    from scoring.outputs import Outputs

    if isinstance(engine, str):
        return [{"engine": name, "unavailable": engine}]
    on_gpu = torch.cuda.is_available()
    outputs = Outputs(request.spec)
    reference = build_engine(request, "torch", "fp32")[0]
    engine.warm_up()
    results = []
    for length in tokens:
        arrays = synthetic_arrays(request.spec, rows=rows, tokens=length, seed=length)
        names = [item.name for item in describe_inputs(request.spec)]
        wanted = outputs.comparable(reference.forward(arrays))
        try:
            if on_gpu:
                tensors = [to_tensor(arrays[item], CUDA) for item in names]
                torch.cuda.synchronize()
                found = engine.run(tensors).cpu().numpy()
                rate = measure(lambda: engine.run(tensors), rows, seconds=seconds, finish=torch.cuda.synchronize)  # noqa: B023
            else:
                found = engine.forward(arrays)
                rate = measure(lambda: engine.forward(arrays), rows, seconds=seconds, finish=lambda: None)  # noqa: B023
        except Exception as error:
            logger.exception("%s at %d tokens", name, length)
            results.append({"engine": name, "tokens": length, "unavailable": f"{type(error).__name__}: {error}"[:500]})
            continue
        difference = float(np.abs(outputs.comparable(found) - wanted).max())
        results.append({"engine": name, "tokens": length, **rate, "max_abs_diff": difference})
        logger.info("%s at %d tokens: %.0f rows/s, max difference %.1e", name, length, rate["rows_per_s"], difference)
    reference.close()
    return results


def _print_forward(results: list[dict[str, Any]], tokens: tuple[int, ...], rows: int) -> None:
    table = Table(title=f"Forward only, {rows} rows, inputs on the device: rows/s by tokens", title_justify="left")
    for column in ("engine", *map(str, tokens), "largest difference"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name in dict.fromkeys(result["engine"] for result in results):
        mine = {result.get("tokens"): result for result in results if result["engine"] == name}
        if None in mine:
            table.add_row(name, f"not run: {mine[None]['unavailable'][:100]}")
            continue
        rates = [
            f"{mine[length]['rows_per_s']:,.0f}" if "rows_per_s" in mine[length] else "failed" for length in tokens
        ]
        worst = max((item.get("max_abs_diff", 0.0) for item in mine.values()), default=0.0)
        table.add_row(name, *rates, f"{worst:.1e}")
    console.print(table)


_TUTORIAL_BATCH = 2
_TUTORIAL_TRIALS = 10


@app.command()
def tutorial(quick: Quick = False, output: Output = None, models: Models = None) -> None:
    """AutoGluon's TensorRT tutorial: rows/s of `predict_proba` before and after optimising, two rows a call, ten calls."""
    import numpy as np
    import pandas as pd

    from jobs.bench_models import SEED_MODEL, build_predictor
    from scoring.engine import optimize_for_inference
    from scoring.predictor import load_predictor

    _set_up()
    folder = output or Path(tempfile.mkdtemp(prefix="benchmark-"))
    made = (models or folder / "models") / SEED_MODEL
    path = build_predictor(SEED_MODEL, made, "small" if quick else "usual")
    rows = pd.read_parquet(made / "rows.parquet").head(_TUTORIAL_BATCH)
    plain, fast = load_predictor(path), load_predictor(path)
    start = time.perf_counter()
    decision = optimize_for_inference(fast, cache=str(folder / "cache"))
    optimise_s = time.perf_counter() - start
    results = []
    for mode, realtime in (("as shipped", False), ("realtime=True", True)):
        answers = [model.predict_proba(rows, realtime=realtime) for model in (plain, fast)]
        np.testing.assert_allclose(answers[1], answers[0], atol=0.01)
        rates = [_time_calls(model, rows, realtime) for model in (plain, fast)]
        difference = float(np.abs(np.asarray(answers[1]) - np.asarray(answers[0])).max())
        results.append({"mode": mode, "plain": rates[0], "optimised": rates[1], "max_abs_diff": difference})
    used = type(fast._learner._model).__name__
    document = {
        **describe_machine(),
        "command": "tutorial",
        "quick": quick,
        "engine": json.loads(decision.to_json()),
        "module": used,
        "optimise_s": round(optimise_s, 1),
        "batch": _TUTORIAL_BATCH,
        "calls": _TUTORIAL_TRIALS,
        "results": results,
    }
    _print_tutorial(results, decision.name)
    _draw_tutorial(results, decision.name, folder)
    _finish(document, folder, "tutorial.json")


def _time_calls(predictor: Any, rows: Any, realtime: bool) -> float:
    """The tutorial's figure: rows/s over ten calls, after one that is not counted."""
    predictor.predict_proba(rows, realtime=realtime)
    start = time.perf_counter()
    for _ in range(_TUTORIAL_TRIALS):
        predictor.predict_proba(rows, realtime=realtime)
    return round(_TUTORIAL_TRIALS * len(rows) / (time.perf_counter() - start), 2)


def _print_tutorial(results: list[dict[str, Any]], engine: str) -> None:
    title = f"predict_proba, {_TUTORIAL_BATCH} rows a call: rows/s ({engine})"
    table = Table(title=title, title_justify="left")
    for column in ("mode", "before", "after", "factor", "largest difference"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for item in results:
        factor = f"{item['optimised'] / item['plain']:.2f}"
        table.add_row(
            item["mode"], f"{item['plain']:.1f}", f"{item['optimised']:.1f}", factor, f"{item['max_abs_diff']:.1e}"
        )
    console.print(table)


def _draw_tutorial(results: list[dict[str, Any]], engine: str, folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(8, 3.5))
    for axis, item in zip(axes, results, strict=True):
        bars = axis.bar(["before", "after"], [item["plain"], item["optimised"]], color=["#8a8f98", "#2f6fde"])
        axis.bar_label(bars, fmt="%.1f")
        axis.set_title(item["mode"])
        axis.set_ylabel("rows/s")
    figure.suptitle(f"predict_proba, {_TUTORIAL_BATCH} rows a call, {engine}")
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "tutorial.png", dpi=120)


@app.command()
def pipeline(
    quick: Quick = False,
    output: Output = None,
    models: Models = None,
    rows: Annotated[int | None, typer.Option(min=64, help="Rows of ours (default 300,000 with a GPU).")] = None,
    only: Annotated[str | None, typer.Option(help="Parts to measure, by commas; the others are kept.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Runs of each part (default 3; quick: 1).")] = None,
) -> None:
    """The whole job beside `predict_proba`, tuned and in Ray, and its two limits: forward alone, preprocessing alone."""
    _set_up()
    from jobs.bench_chart import draw, print_results
    from jobs.bench_document import failures
    from jobs.bench_pipeline import chosen_parts, run_parts
    from jobs.bench_setup import Request
    from scoring.errors import ConfigError

    folder = output or Path(tempfile.mkdtemp(prefix="benchmark-"))
    names = tuple(name.strip() for name in (only or "").split(",") if name.strip())
    request = Request(folder, models, quick, rows, names, repeats)
    try:
        measured = chosen_parts(request)
        document = run_parts(request, describe_machine())
    except ConfigError as error:
        console.print(f"[red]{error}[/]", soft_wrap=True)
        raise typer.Exit(ConfigError.exit_code) from error
    print_results(document, console)
    for path in draw(document, folder):
        console.print(f"written: {path}", soft_wrap=True)
    problems = failures(document, measured)
    for problem in problems:
        console.print(f"[red]{problem}[/]", soft_wrap=True)
    _finish(document, folder, "pipeline.json")
    raise typer.Exit(1 if problems else 0)


def _set_up() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _finish(document: Mapping[str, Any], folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"written: {folder / name}")
    print(json.dumps(document))


if __name__ == "__main__":
    app()
