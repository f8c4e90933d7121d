"""The scorer: a predictor loaded once, tables of features in, tables of scores out.

Owns one actor's work: its engine, its micro-batches and its meter. No Ray inside: `pipeline.py` makes it an actor.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from scoring.collate import micro_batches
from scoring.columns import mark_rows
from scoring.config import ScoreConfig
from scoring.decision import EngineDecision, Rung
from scoring.engine import choose_engine, shared_engine
from scoring.engines.base import Engine
from scoring.engines.build import EngineRequest, has_gpu
from scoring.engines.cache import EngineCache
from scoring.errors import EngineError, Reason, Stage
from scoring.features import FEATURE_PREFIX
from scoring.flat import Logits
from scoring.ledger import takes_decisions
from scoring.meter import Meter
from scoring.outputs import Outputs, score_fields
from scoring.predictor import load_predictor
from scoring.reference import upstream_scores
from scoring.sample import Sample
from scoring.spec import FeatureSpec
from scoring.storage import join, write_bytes
from scoring.takeover import Takeover

logger = logging.getLogger(__name__)

ENGINE_COLUMN = "engine"
# Rows a forward on the CPU: 64 images of 224 x 224 are 39 MB in fp32, and more rows gain nothing there.
_CPU_ROWS = 64


@dataclass(frozen=True)
class ActorSetup:
    """What an actor is told beside the predictor: its name, its cores, rows for the gate and where decisions are shared.

    `sample` are rows of this run (None: random ones). `decisions` is the folder of the run's decisions, one a
    kind of device (None: this actor decides for itself). `rows_left` is what one such actor has to score, about.
    """

    actor: str
    num_threads: int = 1
    sample: Sample | None = None
    decisions: str | None = None
    rows_left: int | None = None


class Scorer:
    """Loads the predictor in `folder` and scores tables with it, in micro-batches sorted by token count."""

    def __init__(self, folder: Path, spec: FeatureSpec, config: ScoreConfig, setup: ActorSetup) -> None:
        start = time.perf_counter()
        self._spec = spec
        self._setup = setup
        predictor = load_predictor(folder)
        on_gpu = has_gpu() and config.engine.provider != "cpu"
        self._micro_rows = config.batch.rows if on_gpu else min(config.batch.rows, _CPU_ROWS)
        request = EngineRequest(
            predictor=predictor,
            spec=spec,
            cache=EngineCache(config.engine.cache),
            provider=config.engine.provider,
            precision=config.engine.precision,
            batch_rows=self._micro_rows,
            num_threads=setup.num_threads,
            rows_left=setup.rows_left,
            max_abs_diff=config.parity.max_abs_diff,
        )
        self._shapes = request.shapes if on_gpu else None
        load_s = time.perf_counter() - start
        self._engine, self.decision = _decide(self._with_sample(request, setup.sample), setup)
        self._outputs = Outputs(predictor, spec)
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
        batches = list(micro_batches(sample.features, self._spec, self._micro_rows, self._shapes))
        order = np.concatenate([places for places, _ in batches])
        raw, predictor, spec = sample.raw, request.predictor, self._spec
        return replace(
            request,
            sample=[arrays for _, arrays in batches],
            reference=lambda: upstream_scores(predictor, spec, raw)[order],
        )

    def score(self, table: pa.Table) -> pa.Table:
        """Replace `feat:*` by the score columns and `engine`; same rows, same order.

        Rows that carry a reason get null scores; a row whose logits are not finite is marked score_nonfinite.
        """
        self.meter.start_batch()
        if isinstance(self._engine, Takeover):
            self._note(self._engine.settle())
        usable = np.flatnonzero(pc.is_null(table["reason"]).to_numpy(zero_copy_only=False))
        logits = self._logits(table.take(pa.array(usable)))
        finite = np.isfinite(logits).all(axis=1)
        scored_rows = usable[finite]
        scored = table.drop_columns([name for name in table.column_names if name.startswith(FEATURE_PREFIX)])
        message = f"the model's output is not finite on {engine_name(self._engine)}"
        bad = {int(row): (Reason.SCORE_NONFINITE, message) for row in usable[~finite]}
        scored = mark_rows(scored, Stage.SCORE, bad)
        for field, values in zip(score_fields(self._spec), self._outputs.columns(logits[finite]), strict=True):
            scored = scored.append_column(field, _scatter(values, scored_rows, table.num_rows, field.type))
        scored = scored.append_column(ENGINE_COLUMN, pa.repeat(engine_name(self._engine), table.num_rows))
        line = self.meter.end_batch(table.num_rows)
        if line is not None:
            logger.info(line)
        return scored

    def _note(self, rung: Rung | None) -> None:
        """Keep how a compiled engine fared beside the decision, for the manifest."""
        if rung is not None and self._setup.decisions is not None:
            uri = join(self._setup.decisions, f"takeover-{self._setup.actor}.json")
            _tell(uri, {"actor": self._setup.actor, **asdict(rung)})

    def _logits(self, table: pa.Table) -> Logits:
        width = max(1, len(self._spec.class_labels))
        logits = np.empty((table.num_rows, width), dtype=np.float32)
        for places, arrays in micro_batches(table, self._spec, self._micro_rows, self._shapes):
            logits[places] = self._engine.forward(arrays).reshape(len(places), width)
        return logits

    def close(self) -> None:
        """Log the last throughput line and free the engine."""
        logger.info(self.meter.describe() + " final=true")
        self._engine.close()


def _decide(request: EngineRequest, setup: ActorSetup) -> tuple[Engine, EngineDecision]:
    from scoring.engines.torch_engine import CUDA, device_name

    if setup.decisions is None:
        return choose_engine(request)
    device = device_name(CUDA) if has_gpu() else "cpu"
    name = "".join(letter if letter.isalnum() else "-" for letter in device)
    try:
        return shared_engine(request, join(setup.decisions, f"{name}.json"))
    except EngineError as error:
        # Ray hands the driver an actor's death, not its error: the driver reads this one and ends as it says.
        document = {"error": type(error).__name__, "message": str(error)}
        _tell(join(setup.decisions, f"refused-{setup.actor}.json"), document)
        raise


def _tell(uri: str, document: Mapping[str, Any]) -> None:
    if takes_decisions(uri):
        write_bytes(uri, json.dumps(document).encode())


def engine_name(engine: Engine) -> str:
    """How a part names the engine that scored it."""
    return f"{engine.provider}-{engine.precision}-{engine.device}"


def _scatter(
    values: list[Any] | npt.NDArray[Any], rows: npt.NDArray[np.intp], num_rows: int, data_type: pa.DataType
) -> pa.Array:
    """Values of some rows -> a column of all rows, null elsewhere."""
    places = np.full(num_rows, -1, dtype=np.int64)
    places[rows] = np.arange(len(rows))
    return pa.array(values, type=data_type).take(pa.array(places, mask=places < 0))
