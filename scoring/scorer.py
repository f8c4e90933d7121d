"""The scorer: a predictor loaded once, tables of features in, tables of scores out.

Owns one actor's work: its engine, its micro-batches and its meter. No Ray inside: `pipeline.py` makes it an actor.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.columns import ENGINE_COLUMN, mark_rows
from scoring.config import ScoreConfig
from scoring.decision import EngineDecision, Rung
from scoring.decoding import DecodePlan
from scoring.engine import choose_engine, shared_engine
from scoring.engines.base import Engine, EngineUnavailable
from scoring.engines.build import EngineRequest, has_gpu
from scoring.engines.cache import EngineCache
from scoring.errors import DecoderError, EngineError, ParityError, Stage
from scoring.features import FEATURE_PREFIX
from scoring.flat import BatchArrays, Logits
from scoring.forward import Forward, engine_name
from scoring.guard import Guard
from scoring.journal import TIMEOUT_S, Journal
from scoring.ledger import REFUSED, SPOILED, TAKEOVER, takes_decisions
from scoring.meter import Meter
from scoring.outputs import Outputs, score_fields
from scoring.parity import Scores
from scoring.poison import Rows, Verdict
from scoring.predictor import LazyPredictor
from scoring.reference import upstream_scores
from scoring.sample import Sample
from scoring.sizing import Flow, windows_that_fit
from scoring.spec import FeatureSpec
from scoring.staging import Batch, Staged, Staging
from scoring.storage import join, write_bytes
from scoring.takeover import Takeover
from scoring.witness import Witness

logger = logging.getLogger(__name__)

# Engines for a GPU are timed on so many rows, cut as a run's are: of 512 rows the batches are small, and all engines slow.
_TIMED_ROWS = 2048


@dataclass(frozen=True)
class ActorSetup:
    """What an actor is told beside the predictor: its name, its cores, rows for the gate and where decisions are shared.

    `sample` are rows of this run (None: random ones), `reference` waits for AutoGluon's own scores of them (None: the actor
    computes them), `decode` says how images come. `decisions` is the folder of the run's
    decisions, one a kind of device (None: this actor decides for itself). `rows_left` is what one such actor has to score,
    about. `journal` is the folder of the scoring actors' journal (None: a row that kills the process kills the run), and
    `timeout_s` the longest that a window may take to be staged, and then to be scored. `flow` says how many windows come at
    once, of how many rows (None: as many as come are taken), and `gpu_share` how much of a GPU's memory is theirs.
    """

    actor: str
    num_threads: int = 1
    sample: Sample | None = None
    reference: Callable[[], Scores] | None = None
    decode: DecodePlan = field(default_factory=DecodePlan)
    decisions: str | None = None
    rows_left: int | None = None
    journal: str | None = None
    timeout_s: float = TIMEOUT_S
    flow: Flow | None = None
    gpu_share: float = 1.0


class Scorer:
    """Scores tables with the predictor in `folder`, in micro-batches sorted by token count.

    `score` may be called from several threads: while one table is in the forward, the next ones' images are prepared.
    """

    def __init__(self, folder: Path, spec: FeatureSpec, config: ScoreConfig, setup: ActorSetup) -> None:
        start = time.perf_counter()
        self._spec = spec
        self._setup = setup
        on_gpu = has_gpu() and config.engine.provider != "cpu"
        try:
            self._staging = Staging(spec, config, setup.decode, on_gpu=on_gpu)
        except EngineUnavailable as error:
            message = f"images.decode: {setup.decode.mode} cannot be had here: {error}. Set images.decode=exact"
            raise _refused(DecoderError(message), setup) from error
        request = EngineRequest(
            load=LazyPredictor(lambda: folder),
            spec=spec,
            cache=EngineCache(config.engine.cache),
            provider=config.engine.provider,
            precision=config.engine.precision,
            batch_rows=self._staging.max_rows,
            num_threads=setup.num_threads,
            rows_left=setup.rows_left,
            max_abs_diff=config.parity.max_abs_diff,
            folder=folder,
            compile=config.engine.compile,
        )
        load_s = time.perf_counter() - start
        self._engine, self.decision = _decide(self._with_sample(request, setup.sample), setup)
        self._outputs = Outputs(spec)
        self._witness = self._call_witness(setup, config.parity.max_abs_diff)
        self._forward = Forward(self._engine, self._staging, max(1, len(spec.class_labels)))
        self._lock = threading.Lock()
        self._windows = _count_windows(spec, setup.flow, setup.gpu_share) if on_gpu and setup.flow else None
        journal = Journal(setup.journal, timeout_s=setup.timeout_s) if setup.journal is not None else None
        self._guard = Guard(self._score, Stage.SCORE, journal)
        self.meter = Meter(setup.actor, self._engine.provider)
        total_s = time.perf_counter() - start
        logger.info(
            "score actor=%s load_s=%.1f engine_s=%.1f engine=%s: %s",
            setup.actor,
            load_s,
            total_s - load_s,
            self.decision.name,
            self.decision.reason,
        )

    def _with_sample(self, request: EngineRequest, sample: Sample | None) -> EngineRequest:
        if sample is None:
            return request
        find_reference = self._setup.reference or (lambda: upstream_scores(request.predictor, self._spec, sample.raw))
        # Beside the engine's building: 2 s on an H100.
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sample")
        staging = pool.submit(self._staging.stage, sample.features)
        pool.shutdown(wait=False)

        def batches() -> Sequence[Batch]:
            return staging.result().batches

        def order() -> Rows:
            return np.concatenate([batch.places for batch in batches()])

        def timed() -> list[BatchArrays]:
            window = pa.concat_tables([sample.features] * max(1, _TIMED_ROWS // sample.features.num_rows))
            return [batch.complete() for batch in self._staging.stage(window).batches]

        return replace(
            request,
            sample=lambda: [batch.complete() for batch in batches()],
            timed=timed if self._staging.on_gpu else None,
            reference=lambda: find_reference()[order()],
        )

    def _call_witness(self, setup: ActorSetup, limit: float) -> Witness | None:
        if setup.sample is None or setup.reference is None:
            return None
        return Witness(setup.sample.features, self._outputs, limit, setup.reference)

    def score(self, table: pa.Table) -> pa.Table:
        """Replace `feat:*` by the score columns and `engine`; same rows, same order.

        Rows that carry a reason get null scores; a row that cannot be scored is marked (see `guard.py`), and its
        neighbours are scored.
        """
        return self._guard(table)

    def _score(self, table: pa.Table) -> pa.Table:
        with self._holding(self._windows) if self._windows is not None else nullcontext():
            return self._score_window(table)

    def _score_window(self, table: pa.Table) -> pa.Table:
        staged = self._staging.stage(table)
        with self.meter.batch(table.num_rows, staged.seconds):
            rows, logits, bad, engine = self._run(staged)
            self._check(table, rows, logits, engine)
        scored = table.drop_columns([name for name in table.column_names if name.startswith(FEATURE_PREFIX)])
        scored = mark_rows(
            scored, Stage.FEATURES, {row: (error.reason, str(error)) for row, error in staged.bad.items()}
        )
        scored = mark_rows(scored, Stage.SCORE, bad)
        for column, values in zip(score_fields(self._spec), self._outputs.columns(logits), strict=True):
            scored = scored.append_column(column, _scatter(values, rows, table.num_rows, column.type))
        return scored.append_column(ENGINE_COLUMN, pa.repeat(engine, table.num_rows))

    def _check(self, table: pa.Table, rows: Rows, logits: Logits, engine: str) -> None:
        if self._witness is None:
            return
        try:
            self._witness.check(table, rows, logits, engine)
        except ParityError as error:
            raise _refused(error, self._setup, SPOILED) from None

    def _run(self, staged: Staged) -> tuple[Rows, Logits, dict[int, Verdict], str]:
        """Rows, logits and what is wrong with other rows, as `Forward` gives them, and the engine's name."""
        # One table at a time in the forward.
        with self._holding(self._lock):
            if isinstance(self._engine, Takeover):
                self._note(self._engine.settle())
            engine = engine_name(self._engine)
            submitted = self._forward.submit(staged)
            if isinstance(self._engine, Takeover):
                self._note(self._engine.undone())
        done = submitted.wait()
        if done is not None:
            return *done, {}, engine
        with self._holding(self._lock):
            return *self._forward.rescue(submitted), engine

    @contextmanager
    def _holding(self, turns: "threading.Lock | threading.Semaphore") -> Iterator[None]:
        """A turn of those; the wait for it is not held against the calling thread's rows."""
        with self._guard.paused():
            turns.acquire()
        try:
            yield
        finally:
            turns.release()

    def _note(self, rung: Rung | None) -> None:
        """Keep how a compiled engine fared beside the decision, for the manifest."""
        if rung is not None and self._setup.decisions is not None:
            uri = join(self._setup.decisions, f"{TAKEOVER}{self._setup.actor}.json")
            _tell(uri, {"actor": self._setup.actor, **asdict(rung)})

    def close(self) -> None:
        """Log the last throughput line and free the engine."""
        logger.info(self.meter.describe() + " final=true")
        self._guard.close()
        self._engine.close()


def _count_windows(spec: FeatureSpec, flow: Flow, share: float) -> threading.Semaphore:
    """Places for as many windows as this actor's share of the GPU's memory holds."""
    import torch

    gpu_bytes = round(min(1.0, share) * torch.cuda.get_device_properties(0).total_memory)
    count = windows_that_fit(flow, spec, gpu_bytes)
    if count < flow.calls:
        logger.info(
            "score: %d windows of %d rows at once, not %d: of the GPU's memory %.0f GB are this actor's",
            *(count, flow.window_rows, flow.calls, gpu_bytes / 1e9),
        )
    return threading.Semaphore(count)


def _decide(request: EngineRequest, setup: ActorSetup) -> tuple[Engine, EngineDecision]:
    from scoring.engines.torch_engine import CUDA, device_name

    if setup.decisions is None:
        return choose_engine(request)
    device = device_name(CUDA) if has_gpu() else "cpu"
    name = "".join(letter if letter.isalnum() else "-" for letter in device)
    try:
        return shared_engine(request, join(setup.decisions, f"{name}.json"))
    except EngineError as error:
        _refused(error, setup)
        raise


def _refused(error: EngineError, setup: ActorSetup, kind: str = REFUSED) -> EngineError:
    """Ray hands the driver an actor's death, not its error: the driver reads this one and ends as it says."""
    if setup.decisions is not None:
        document = {"error": type(error).__name__, "message": str(error)}
        _tell(join(setup.decisions, f"{kind}{setup.actor}.json"), document)
    return error


def _tell(uri: str, document: Mapping[str, Any]) -> None:
    if takes_decisions(uri):
        write_bytes(uri, json.dumps(document).encode())


def _scatter(
    values: list[Any] | npt.NDArray[Any], rows: npt.NDArray[np.intp], num_rows: int, data_type: pa.DataType
) -> pa.Array:
    """Values of some rows -> a column of all rows, null elsewhere."""
    places = np.full(num_rows, -1, dtype=np.int64)
    places[rows] = np.arange(len(rows))
    return pa.array(values, type=data_type).take(pa.array(places, mask=places < 0))
