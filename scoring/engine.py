"""Which engine a run uses: the ladder, the one decision that a run's actors share, and `optimize_for_inference`.

Owns the order in which engines are tried and which of them pay. How engines are built and run is `engines/`'s, how they are
checked and timed `gate.py`'s.
"""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from scoring.decision import COMPILED, EngineDecision, Rung, describe_error
from scoring.engines.base import Engine, EngineUnavailable
from scoring.engines.build import DEFAULT_CACHE, EngineRequest, build_engine, has_gpu, is_exported
from scoring.engines.cache import EngineCache
from scoring.engines.compiled import is_compiled
from scoring.errors import EngineError, ParityError
from scoring.flat import BatchArrays, Precision
from scoring.gate import Gate
from scoring.ledger import takes_decisions
from scoring.optimize import PROVIDERS, install, named_arrays
from scoring.predictor import extract_spec, original_model
from scoring.storage import create_exclusive, exists, read_bytes
from scoring.takeover import Takeover

if TYPE_CHECKING:
    import pandas as pd
    from autogluon.multimodal import MultiModalPredictor

logger = logging.getLogger(__name__)

# What a rung costs before its first batch when the cache is empty (seconds, measured on an H100 with the seed model); torch:
# the import of AutoGluon, which the others leave to the run's `Preparer`.
_BUILD_S = {"torch": 25.0, "cpu": 8.0, "cuda": 12.0, "tensorrt": 60.0, COMPILED: 20.0}
# What the compiled engine's first batches wait for longer than another's, its kernels being planned for each row count: first
# scores 36.7 to 38.6 s after the command, 30.8 s on cuda (H100, `tests/data/bench/h100-pipeline.json`), and 303,104 rows done
# after 53 s, on cuda after 50.
_PLAN_S = 10.0
# In this order where nothing is known yet.
_GPU_PROVIDERS, _CPU_PROVIDERS = (COMPILED, "cuda", "tensorrt", "torch"), ("cpu", "torch")
# In a process of its own on an H100's host: 80 to 99 s beside one or two others, longer beside a run, which comes first.
_COMPILE_S = 120.0


def choose_engine(request: EngineRequest) -> tuple[Engine, EngineDecision]:
    """The engine to use. Raises EngineError (a named provider cannot run) or ParityError (it is not the reference)."""
    gate = Gate(request)
    if request.provider != "auto":
        return _named(request, gate)
    return _best(request, gate)


def _named(request: EngineRequest, gate: Gate) -> tuple[Engine, EngineDecision]:
    """The named provider, in the precisions asked for; never another one."""
    rungs: list[Rung] = []
    for precision in _precisions(request, request.provider):
        try:
            engine, build_s = build_engine(request, request.provider, precision)
        except EngineUnavailable as error:
            raise EngineError(
                f"engine.provider: {request.provider} cannot run here: {error}. Set engine.provider=auto to use the best "
                "engine that can"
            ) from error
        rung = gate.examine(engine, build_s)
        rungs.append(rung)
        logger.info("engine: %s", rung)
        if rung.outcome == "usable":
            return _with_takeover(request, gate, engine, rung, rungs, "named in the configuration")
        engine.close()
    raise ParityError(
        f"engine.provider: {request.provider} was refused: "
        + "; ".join(f"{rung.precision} {rung.reason}" for rung in rungs)
        + ". Set engine.precision=fp32, another engine.provider, or a larger parity.max_abs_diff"
    )


def _best(request: EngineRequest, gate: Gate) -> tuple[Engine, EngineDecision]:
    """Every rung that pays is built, checked and timed; the fastest is used. fp32 is tried where no fp16 passes.

    What earlier runs timed is not timed again: the one of those that is done soonest comes first, and the others are not built.
    """
    rungs: list[Rung] = []
    best: tuple[Engine, Rung] | None = None
    for precision in _precisions(request, "auto"):
        providers = _providers(request, precision)
        known = {provider: gate.known_rate(provider, precision) or 0.0 for provider in providers}
        whole = {provider: _whole_s(request, provider, known[provider]) for provider in providers}
        for provider in sorted(providers, key=lambda name: whole[name]):
            if best is not None and 0 < known[provider] <= (best[1].rows_per_s or 0):
                rungs.append(Rung(provider, precision, "slower", "timed by an earlier run", known[provider]))
                continue
            used_s = _whole_s(request, best[1].provider, best[1].rows_per_s or 0.0) if best else math.inf
            if best is not None and known[provider] and used_s <= whole[provider]:
                waste = f"{request.rows_left} rows take {whole[provider]:.1f} s with its start, {used_s:.1f} s on "
                waste += best[1].provider
                rungs.append(Rung(provider, precision, "skipped", waste, known[provider]))
                continue
            if best is not None and provider == "torch" and has_gpu():
                # On an H100 it was the faster one for 1 of 11 networks, by 2 % (`tests/data/bench/h100-engines.json`), and held
                # the first score back by 22 s.
                rungs.append(Rung(provider, precision, "skipped", "not compiled it is slower than what runs graphs"))
                continue
            rung, engine = _try(request, gate, provider, precision, best[1] if best else None)
            logger.info("engine: %s", rung)
            rungs.append(rung)
            if engine is None:
                continue
            if best is None or (rung.rows_per_s or 0) > (best[1].rows_per_s or 0):
                if best is not None:
                    best[0].close()
                best = (engine, rung)
            else:
                engine.close()
        if best is not None:
            break
    if best is None:
        kind = ParityError if any(rung.outcome == "refused" for rung in rungs) else EngineError
        raise kind(
            "engine.provider: no engine passed: "
            + "; ".join(str(rung) for rung in rungs)
            + ". Set engine.precision=fp32 or a larger parity.max_abs_diff"
        )
    return _with_takeover(request, gate, *best, rungs, "the fastest that passes parity")


def _providers(request: EngineRequest, precision: Precision) -> tuple[str, ...]:
    """What the ladder tries, in order; the compiled engine where an earlier run has left it, or it is wanted at any price."""
    if not has_gpu():
        return _CPU_PROVIDERS
    is_wanted = request.compile == "always" or (request.compile == "auto" and is_compiled(request, precision))
    return tuple(provider for provider in _GPU_PROVIDERS if is_wanted or provider != COMPILED)


def _try(
    request: EngineRequest, gate: Gate, provider: str, precision: Precision, best: Rung | None
) -> tuple[Rung, Engine | None]:
    """Build, check and time one rung; the engine is None unless it is usable."""
    waste = _would_not_pay(request.rows_left, best, _BUILD_S[provider])
    if waste:
        return Rung(provider, precision, "skipped", waste), None
    engine: Engine | None = None
    try:
        engine, build_s = _build_beside_reference(request, gate, provider, precision)
        rung = gate.examine(engine, build_s)
    except EngineUnavailable as error:
        return Rung(provider, precision, "unavailable", str(error)), None
    except Exception as error:
        # A model that cannot be exported or a kernel that is missing costs its rung, not the run.
        logger.warning("engine: %s-%s failed", provider, precision, exc_info=True)
        if engine is not None:
            engine.close()
        return Rung(provider, precision, "unavailable", describe_error(error)), None
    if rung.outcome != "usable":
        engine.close()
        return rung, None
    return rung, engine


def _build_beside_reference(
    request: EngineRequest, gate: Gate, provider: str, precision: Precision
) -> tuple[Engine, float]:
    """`build_engine`, while the reference is computed: 5 s each on an H100. One that needs the predictor waits for it."""
    if provider != COMPILED and not is_exported(request, provider, precision):
        return build_engine(request, provider, precision)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="build") as pool:
        building = pool.submit(build_engine, request, provider, precision)
        gate.reference()
        return building.result()


def _whole_s(request: EngineRequest, provider: str, rows_per_s: float) -> float:
    """Until all rows left are scored, from when the engine is loaded; of unknown many, until one is."""
    if not rows_per_s:
        return math.inf
    if request.rows_left is None:
        return 1 / rows_per_s
    start_s = _PLAN_S if provider == COMPILED and request.compile != "always" else 0.0
    return start_s + request.rows_left / rows_per_s


def _would_not_pay(rows_left: int | None, best: Rung | None, build_s: float) -> str | None:
    """Why building another rung cannot win: the best one so far scores all that is left sooner."""
    if rows_left is None or best is None or not best.rows_per_s:
        return None
    rest = rows_left / best.rows_per_s
    if rest > build_s:
        return None
    return f"{rows_left} rows take {rest:.1f} s on {best.provider}-{best.precision}, this build about {build_s:.0f} s"


def _precisions(request: EngineRequest, provider: str) -> tuple[Precision, ...]:
    if request.precision != "auto":
        return ("fp16",) if request.precision == "fp16" else ("fp32",)
    return ("fp16", "fp32") if has_gpu() and provider != "cpu" else ("fp32",)


def _with_takeover(
    request: EngineRequest, gate: Gate, engine: Engine, rung: Rung, rungs: Sequence[Rung], reason: str
) -> tuple[Engine, EngineDecision]:
    """The decision for `engine`; where compiling would pay, an engine that the compiled one will relieve."""
    is_tried = any(item.provider == COMPILED for item in rungs)
    is_asked = request.provider in ("auto", "torch") and request.compile != "never"
    may_compile = has_gpu() and is_asked and not is_tried
    waste = _would_not_pay(request.rows_left, rung, _compile_s(request, rung.precision)) if may_compile else None
    used = [
        replace(item, outcome="used" if item is rung else ("slower" if item.outcome == "usable" else item.outcome))
        for item in rungs
    ]
    if may_compile:
        outcome = (
            ("skipped", waste)
            if waste
            else ("pending", "compiled beside the first engine; takes over when it is faster")
        )
        used.append(Rung(COMPILED, rung.precision, *outcome))
    decision = EngineDecision(
        engine.provider,
        engine.precision,
        engine.device,
        f"{reason}: {rung.reason}",
        tuple(used),
        reference=gate.reference_name,
        compiles=may_compile and waste is None,
    )
    logger.info("engine: uses %s, %s", decision.name, decision.reason)
    return (Takeover(request, gate, engine) if decision.compiles else engine), decision


def _compile_s(request: EngineRequest, precision: Any) -> float:
    if request.compile == "always":
        return 0.0
    return _BUILD_S[COMPILED] if is_compiled(request, precision) else _COMPILE_S


def open_engine(request: EngineRequest, decision: EngineDecision) -> Engine:
    """The engine of a decision made elsewhere for the same kind of device: built from the cache, checked once more."""
    provider, compiles = decision.provider, decision.compiles
    if provider == COMPILED and not is_compiled(request, decision.precision):
        provider, compiles = "cuda", True
        logger.warning("engine: %s was compiled on another node; begins on cuda and compiles beside it", decision.name)
    try:
        engine, build_s = build_engine(request, provider, decision.precision)
    except EngineUnavailable as error:
        raise EngineError(
            f"engine: {decision.name} runs in another actor of this run and not here: {error}. Look at this node"
        ) from error
    gate = Gate(request.head())
    checked = "examined by this run's first actor"
    if request.reference is not None:
        # One batch: the rung was examined on the whole sample; this finds a device that computes otherwise.
        parity = gate.parity(engine)
        failure = parity.failure(request.max_abs_diff)
        if failure:
            raise ParityError(
                f"engine: {decision.name} {failure}, although another actor's copy passed; look at this GPU"
            )
        checked = f"max difference {parity.max_abs_diff:.1e}"
    logger.info("engine: uses %s as decided (%.1f s, %s)", decision.name, build_s, checked)
    return Takeover(request, gate, engine) if compiles else engine


def shared_engine(request: EngineRequest, uri: str) -> tuple[Engine, EngineDecision]:
    """One decision a run and kind of device: the first actor makes it and writes it to `uri`; the others follow."""
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    request.cache.local.mkdir(parents=True, exist_ok=True)
    with FileLock(request.cache.local / f"decision-{digest}.lock"):
        if not exists(uri):
            engine, decision = choose_engine(request)
            # A run that has ended has no place for decisions: its last actors may still be loading.
            if not takes_decisions(uri) or create_exclusive(uri, decision.to_json().encode()):
                return engine, decision
            engine.close()  # an actor of another node was first
    decision = EngineDecision.from_json(read_bytes(uri).decode())
    return open_engine(request, decision), decision


def optimize_for_inference(
    predictor: "MultiModalPredictor",
    provider: str = "auto",
    precision: str = "auto",
    cache: str = DEFAULT_CACHE,
    *,
    providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
    sample: "pd.DataFrame | None" = None,
    batch_rows: int = 256,
    max_abs_diff: float = 0.005,
) -> EngineDecision:
    """Make a loaded predictor fast: `predict`, `predict_proba` and `evaluate` then use the engine that was chosen.

    The same call as upstream's, which fails for every fusion model in AutoGluon 1.6.3; it also takes upstream's `providers`
    (ONNX Runtime's names, or pairs of name and options), which are tried in their order. The engine is checked against the
    fp32 network on `sample` (rows as for `predict_proba`) or on random rows. `fit()` raises afterwards.

    Raises EngineError when nothing named can run here, ParityError when its scores are not the reference's, PredictorError
    for a predictor that cannot be scored row by row.
    """
    predictor._learner._model = original_model(predictor)
    spec = extract_spec(predictor)
    arrays: tuple[BatchArrays, ...] = ()
    if sample is not None:
        learner = predictor._learner
        processors = learner.get_data_processors_per_run(learner._data_processors, requires_label=False, is_train=False)
        batches = [sample.iloc[start : start + batch_rows] for start in range(0, len(sample), batch_rows)]
        arrays = tuple(
            named_arrays(learner.process_batch(rows, learner._df_preprocessor, processors), spec) for rows in batches
        )
    request = EngineRequest(
        lambda: predictor,
        spec,
        EngineCache(cache),
        provider=provider,
        precision=precision,
        batch_rows=batch_rows,
        num_threads=_num_threads(),
        sample=lambda: arrays,
        max_abs_diff=max_abs_diff,
    )
    engine, decision = choose_engine(request) if providers is None else _first_of(request, providers)
    if isinstance(engine, Takeover):
        # Nobody scores meanwhile: wait, as upstream's call does ("this may take a few minutes").
        rung = engine.settle(wait=True)
        assert rung is not None
        rungs = tuple(rung if item.outcome == "pending" else item for item in decision.rungs)
        decision = replace(decision, provider=engine.provider, rungs=rungs, compiles=False)
    engine.warm_up()
    install(predictor, engine, spec, batch_rows, partial(optimize_for_inference, predictor))
    return decision


def _first_of(
    request: EngineRequest, providers: Sequence[str | tuple[str, Mapping[str, Any]]]
) -> tuple[Engine, EngineDecision]:
    """Upstream's list: the first provider that runs and passes is used. Raises EngineError when none does."""
    refusals = []
    for item in providers:
        name, options = (item, {}) if isinstance(item, str) else item
        if name not in PROVIDERS:
            raise EngineError(f"providers: {name!r} is unknown; known are {', '.join(PROVIDERS)}")
        own = PROVIDERS[name]
        try:
            return choose_engine(replace(request, provider=own, provider_options={own: options}))
        except EngineError as error:
            logger.warning("engine: %s was passed over: %s", name, error)
            refusals.append(str(error))
    raise EngineError("providers: none of them can be used: " + " ".join(refusals))


def _num_threads() -> int:
    import torch

    return int(torch.get_num_threads())
