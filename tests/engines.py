"""Engines on real predictors, in one process that imports AutoGluon once; figures as JSON.

    python -m tests.engines OUT.json CACHE NAME=PREDICTOR:ROWS.parquet:PART,PART [...]

The parts: `compare_engines` (a predictor on every engine here, against the fp32 network on its own rows), `run_tutorial` (the
TensorRT tutorial's flow), `deploy` (upstream's deployment test, re-expressed), `build_ahead` (TensorRT for RTX without a
GPU), `share_cache`, `mistrust` (a deliberately wrong engine), `start_together` and `cut_anew` (a row in other batches).
"""

import json
import logging
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from scoring.spec import FeatureSpec
from tests.upstream import build_features, reference

REPOSITORY = Path(__file__).resolve().parents[1]
TUTORIAL_ROWS = 24
CPU_ROWS = 64


def run(out: Path, cache: Path, jobs: Sequence[tuple[str, Path, Path, Sequence[str]]]) -> dict[str, Any]:
    """Run (name, predictor, rows, parts) in one subprocess: pytest's own process never imports AutoGluon."""
    arguments = [f"{name}={predictor}:{rows}:{','.join(parts)}" for name, predictor, rows, parts in jobs]
    command = [sys.executable, "-m", "tests.engines", str(out), str(cache), *arguments]
    done = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    document: dict[str, Any] = json.loads(out.read_text())
    return document


class Subject:
    """A predictor, its rows, and their features where they are asked for."""

    def __init__(self, name: str, predictor: Path, rows: Path, cache: Path) -> None:
        from scoring.predictor import extract_spec, load_predictor

        self.name, self.path, self.rows_path, self.cache = name, predictor, rows, cache
        self.predictor = load_predictor(predictor)
        self.spec: FeatureSpec = extract_spec(self.predictor)
        self.rows = pd.read_parquet(rows)

    def batches(self, max_rows: int = 64) -> list[Any]:
        return self.batches_and_reference(max_rows, with_reference=False)[0]

    def batches_and_reference(self, max_rows: int = 64, *, with_reference: bool = True) -> tuple[list[Any], Any]:
        """Micro-batches of the good rows, and what `predict_proba(realtime=True)` says of them, in the batches' order."""
        from scoring.collate import micro_batches
        from scoring.engines.build import has_gpu

        good, is_good = self.good_features()
        # On two cores an image costs 10 ms an engine.
        count = good.num_rows if has_gpu() else CPU_ROWS
        good = good.slice(0, count)
        batches = list(micro_batches(good, self.spec, max_rows, self.request().shapes))
        scores = None
        if with_reference:
            order = np.concatenate([places for places, _ in batches])
            scores = self._upstream(self.rows[np.array(is_good)].head(count).reset_index(drop=True))[order]
        return [arrays for _, arrays in batches], scores

    def good_features(self) -> tuple[pa.Table, list[bool]]:
        """Features of the rows that have them, and which rows those are."""
        features = build_features(self.spec, self.rows_path)
        is_good = [reason is None for reason in features["reason"].to_pylist()]
        return features.filter(pa.array(is_good)), is_good

    def _upstream(self, frame: pd.DataFrame) -> Any:
        wanted = reference(self.predictor, frame)
        if self.spec.label_scaler is None:
            return wanted[[f"proba_{label}" for label in self.spec.class_labels]].to_numpy(np.float32)
        return (wanted[["prediction"]].to_numpy() / self.spec.label_scaler.unit).astype(np.float32)

    def request(self, **changes: Any) -> Any:
        from dataclasses import replace

        from scoring.engines.build import EngineRequest
        from scoring.engines.cache import EngineCache

        return replace(
            EngineRequest(lambda: self.predictor, self.spec, EngineCache(str(self.cache)), batch_rows=64), **changes
        )


def compare_engines(subject: Subject) -> dict[str, Any]:
    """{engine: parity figures or why it is not there}, for every provider and precision that this machine has."""
    from scoring.engine import choose_engine
    from scoring.errors import EngineError
    from scoring.gate import Gate
    from scoring.takeover import Takeover

    batches, wanted = subject.batches_and_reference()
    gate = Gate(subject.request(sample=lambda: batches, reference=lambda: wanted))
    table: dict[str, Any] = {}
    for name, build in _ways(
        subject.request(sample=lambda: batches), is_usual=subject.name in ("seed", "preset")
    ).items():
        try:
            engine = build()
            table[name] = gate.parity(engine).to_dict()
            engine.close()
        except Exception as error:
            table[name] = {"failed": f"{type(error).__name__}: {error}"[:400]}
    try:
        # So many rows that an export pays and, on a GPU, a compile does not.
        engine, decision = choose_engine(
            subject.request(sample=lambda: batches, reference=lambda: wanted, rows_left=500_000)
        )
        if isinstance(engine, Takeover):
            engine.settle(wait=True)
        table["auto"] = {"chosen": decision.name, "rungs": [str(rung) for rung in decision.rungs]}
        engine.close()
    except EngineError as error:
        table["auto"] = {"failed": str(error)}
    return {
        "engines": table,
        "reference": gate.reference_name,
        "spread": float(wanted.std(axis=0).max()),
        "problem_type": subject.spec.problem_type,
    }


def _ways(request: Any, *, is_usual: bool) -> dict[str, Callable[[], Any]]:
    """Every engine of this machine by name; without a GPU the fp16 graph of the cuda engine runs on the CPU."""
    from scoring.engines.build import build_engine, build_graph, has_gpu
    from scoring.engines.compiled import build_compiled
    from scoring.engines.onnx_engine import OnnxCpuEngine

    ways: dict[str, Callable[[], Any]] = {"torch-fp32": lambda: build_engine(request, "torch", "fp32")[0]}
    if not has_gpu():
        ways["cpu-fp32"] = lambda: build_engine(request, "cpu", "fp32")[0]
        ways["cuda's graph-fp16"] = lambda: OnnxCpuEngine(build_graph(request, "fp16", "onnxruntime"), 1)
        ways["tensorrt's graph-fp16"] = lambda: OnnxCpuEngine(build_graph(request, "fp16", "tensorrt"), 1)
        return ways
    ways["cuda-fp32"] = lambda: build_engine(request, "cuda", "fp32")[0]
    ways["torch-fp16"] = lambda: build_engine(request, "torch", "fp16")[0]
    ways["cuda-fp16"] = lambda: build_engine(request, "cuda", "fp16")[0]
    if is_usual:  # a minute each: for the models that benchmarks are made of
        ways["torch-compiled-fp16"] = lambda: build_compiled(request, "fp16")
    return ways


def run_tutorial(subject: Subject) -> dict[str, Any]:
    """Load, predict, optimise, predict twice, `assert_allclose(atol=0.01)`, `evaluate` on both, and what fit() says."""
    from scoring.engine import optimize_for_inference
    from scoring.predictor import load_predictor

    rows = subject.rows.head(TUTORIAL_ROWS)
    plain = load_predictor(subject.path)
    before = plain.predict_proba(rows)
    # Both classes, each with half of the rows that are likelier to be of it: a fit may give all rows one label, and then
    # there is nothing to evaluate.
    low, high = subject.spec.class_labels
    is_high = before[high] > before[high].median()
    labelled = rows.assign(**{subject.spec.label: np.where(is_high, high, low)})
    fast = load_predictor(subject.path)
    # Fewer rows than a frame has: realtime=True gives the engine the whole frame as one batch.
    decision = optimize_for_inference(fast, cache=str(subject.cache), batch_rows=10)
    first, second = fast.predict_proba(rows), fast.predict_proba(rows)
    realtime = fast.predict_proba(rows, realtime=True)
    np.testing.assert_allclose(first, before, atol=0.01)
    np.testing.assert_allclose(second, first, atol=1e-6)
    metrics = [model.evaluate(labelled) for model in (plain, fast)]
    again = fast.optimize_for_inference(providers=["CPUExecutionProvider"])
    try:
        fast.fit(labelled)
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    saved = subject.cache / "saved"
    fast.save(str(saved))
    restored = load_predictor(saved).predict_proba(rows, realtime=True)
    return {
        "used": decision.name,
        "again": again.name,
        "max_abs_diff": float(np.abs(np.asarray(first) - np.asarray(before)).max()),
        "realtime_diff": float(np.abs(np.asarray(realtime) - np.asarray(before)).max()),
        "restored_diff": float(np.abs(np.asarray(restored) - np.asarray(before)).max()),
        "spread": float(np.asarray(before).std(axis=0).max()),
        "metrics": metrics,
        "refusal": refusal,
        "class_name": type(fast._learner._model).__name__,
    }


def deploy(subject: Subject) -> dict[str, Any]:
    """Upstream's deployment test: batch sizes 2, 4, 8 after optimising; and what upstream's own call does today."""
    from scoring.engine import optimize_for_inference
    from scoring.predictor import load_predictor

    plain, fast, upstream = (load_predictor(subject.path) for _ in range(3))
    try:
        upstream.optimize_for_inference(providers=["CPUExecutionProvider"])
        upstream.predict_proba(subject.rows.head(2), realtime=True)
        upstreams = "works"
    except Exception as error:
        upstreams = f"{type(error).__name__}: {error}"
    optimize_for_inference(fast, providers=[("CPUExecutionProvider", {})], cache=str(subject.cache))
    differences = {}
    for size in (2, 4, 8):
        rows = subject.rows.head(size)
        differences[str(size)] = float(
            np.abs(np.asarray(fast.predict_proba(rows)) - np.asarray(plain.predict_proba(rows))).max()
        )
    return {"upstream": upstreams, "max_abs_diff": differences}


def build_ahead(subject: Subject) -> dict[str, Any]:
    """The fp16 graph parsed and built by TensorRT for RTX for two GPU generations, with the batcher's profile."""
    from scoring.engines.build import build_rtx_ahead

    built = {}
    for capability in ("SM80", "SM89"):
        start = time.perf_counter()
        plan = build_rtx_ahead(subject.request(batch_rows=512), "fp16", capability)
        built[capability] = {"bytes": plan.stat().st_size, "seconds": round(time.perf_counter() - start, 1)}
    return built


def share_cache(subjects: list[Subject]) -> dict[str, Any]:
    """Two predictors of one shape, one cache: each must keep its own scores."""
    import torch

    from scoring.engines.build import build_engine
    from scoring.predictor import extract_spec

    first, second = subjects[0], Subject("twin", subjects[0].path, subjects[0].rows_path, subjects[0].cache)
    with torch.no_grad():
        for parameter in second.predictor._learner._model.parameters():
            parameter.mul_(1.02)
    second.spec = extract_spec(second.predictor)
    batch = first.batches()[0]
    answers = {}
    for name, subject in (("first", first), ("second", second)):
        engine = build_engine(subject.request(), "cpu", "fp32")[0]
        reference = build_engine(subject.request(), "torch", "fp32")[0]
        answers[name] = {
            "logits": engine.forward(batch).tolist(),
            "own_diff": float(np.abs(engine.forward(batch) - reference.forward(batch)).max()),
        }
    return answers


def mistrust(subject: Subject) -> dict[str, Any]:
    """An engine whose weights are scaled by 1.01 after export, as the named provider: what is said of it."""
    import onnx
    from onnx import numpy_helper

    from scoring.engine import choose_engine
    from scoring.engines import build as building
    from scoring.errors import EngineError

    honest = building.build_graph

    def dishonest(*arguments: Any) -> Path:
        model = onnx.load(str(honest(*arguments)))
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.ndim >= 2:
                tensor.CopyFrom(numpy_helper.from_array(values * np.float32(1.01), tensor.name))
        path = subject.cache / "wrong.onnx"
        onnx.save(model, str(path))
        return path

    request = subject.request(sample=subject.batches, provider="cpu")
    building.build_graph = dishonest  # type: ignore[assignment]
    try:
        choose_engine(request)
        said = ""
    except EngineError as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        building.build_graph = honest
    return {"said": said, "honest": choose_engine(request)[1].name}


def start_together(subject: Subject, count: int = 8) -> dict[str, Any]:
    """`count` processes that start at once on an empty cache, then once more: how many built what."""
    from scoring.engines.cache import EngineCache

    context = multiprocessing.get_context("fork")
    request = subject.request(cache=EngineCache(str(subject.cache / "together")))
    results = []
    for _ in range(2):
        counts: Any = context.SimpleQueue()
        barrier = context.Barrier(count)

        def start(barrier: Any, counts: Any) -> None:
            import torch

            torch.set_num_threads(1)
            built: list[str] = []
            logging.getLogger("scoring.engines.cache").addHandler(_Recorder(built))
            barrier.wait()
            from scoring.engines.build import build_engine, synthetic_sample

            engine = build_engine(request, "cpu", "fp32")[0]
            total = float(engine.forward(synthetic_sample(request)[0]).sum())
            counts.put((built, total))

        workers = [context.Process(target=start, args=(barrier, counts)) for _ in range(count)]
        for worker in workers:
            worker.start()
        answers = [counts.get() for _ in workers]
        for worker in workers:
            worker.join()
        built = [kind for kinds, _ in answers for kind in kinds]
        results.append({"built": sorted(built), "sums": sorted({round(total, 3) for _, total in answers})})
    return {"first": results[0], "second": results[1]}


def cut_anew(subject: Subject) -> dict[str, Any]:
    """{engine: rows whose logits are not the same bits in every random cut of the rows into batches, and the spread}."""
    from scoring.collate import collate
    from scoring.engines.build import build_graph
    from scoring.engines.onnx_engine import OnnxCpuEngine
    from scoring.engines.torch_engine import TorchEngine

    num_rows, cuts = (40, 3) if subject.spec.image else (300, 6)  # images cost 10 ms and more
    table = subject.good_features()[0].slice(0, num_rows)
    graph = build_graph(subject.request(), "fp32", "onnxruntime")
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: TorchEngine(subject.predictor, subject.spec, "fp32", use_gpu=False, num_threads=2),
        "cpu": lambda: OnnxCpuEngine(graph, 2),
    }
    found: dict[str, Any] = {}
    for name, build in ways.items():
        engine, rng, rounds = build(), np.random.default_rng(0), []
        for _ in range(cuts):
            order = rng.permutation(table.num_rows)
            # Half of the batches are of a few rows; the last one is of any size.
            few, many = rng.integers(1, 5, len(order)), rng.integers(5, 65, len(order))
            ends = np.cumsum(np.where(rng.random(len(order)) < 0.5, few, many))
            logits = np.concatenate(
                [
                    engine.forward(collate(table.take(pa.array(places)), subject.spec))
                    for places in np.split(order, ends)
                    if len(places)
                ]
            )
            rounds.append(logits[np.argsort(order)])
        engine.close()
        differs = np.any([(logits != rounds[0]).any(axis=1) for logits in rounds], axis=0)
        found[name] = {
            "differ": int(differs.sum()),
            "rows": table.num_rows,
            "spread": float(rounds[0].std(axis=0).max()),
        }
    return found


class _Recorder(logging.Handler):
    def __init__(self, built: list[str]) -> None:
        super().__init__(logging.INFO)
        self._built = built
        logging.getLogger("scoring.engines.cache").setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        if "built in" in record.getMessage():
            self._built.append(str(record.args[0]).split("/")[0])  # type: ignore[index]


PARTS: dict[str, Callable[[Subject], Any]] = {
    "compare_engines": compare_engines,
    "run_tutorial": run_tutorial,
    "deploy": deploy,
    "build_ahead": build_ahead,
    "mistrust": mistrust,
    "start_together": start_together,
    "cut_anew": cut_anew,
    "share_cache": lambda subject: share_cache([subject]),
}


def main(out: Path, cache: Path, jobs: list[str]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    document: dict[str, dict[str, Any]] = {}
    for job in jobs:
        name, _, rest = job.partition("=")
        predictor, rows, parts = rest.split(":")
        subject = Subject(name, Path(predictor), Path(rows), cache)
        for part in parts.split(","):
            start = time.perf_counter()
            document.setdefault(part, {})[name] = PARTS[part](subject)
            print(f"{name} {part} {time.perf_counter() - start:.1f} s", flush=True)
            out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
