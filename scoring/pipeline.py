"""The run: prepares the plan, wires read -> features -> score -> write, and publishes what the ledger adds up to.

Owns the order of things and the sizes of the pools. Every step is another module's; Ray is started by `jobs/`.
"""

import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from scoring.config import SCORES_VERSION, Fingerprint, ScoreConfig, fingerprint, resolved_yaml
from scoring.engines.build import EngineRequest, build_rtx_ahead
from scoring.engines.cache import EngineCache
from scoring.errors import EngineError, OutputError, ParityError
from scoring.features import FeatureBuilder
from scoring.images import ImageFetcher
from scoring.ledger import (
    MANIFEST_VERSION,
    Accounts,
    AttemptFolder,
    RunFolder,
    ShardRows,
    add_up,
    check_complete,
    check_quarantine,
)
from scoring.predictor import (
    check_hash,
    extract_spec,
    fetch_predictor,
    load_predictor,
    load_spec,
    refuse_unsupported,
    store_spec,
)
from scoring.sample import Sample, draw_sample
from scoring.scorer import ActorSetup, Scorer
from scoring.shards import InputPlan, inspect_files, list_inputs, plan_inputs
from scoring.sink import PartSchemas, PartSink, reserved_names, write_part
from scoring.source import ShardSource
from scoring.spec import FeatureSpec
from scoring.storage import is_local, join, redact, remove_tree, write_bytes

logger = logging.getLogger(__name__)

_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
# Reads and writes are short and mostly wait for storage; a whole CPU each would starve the pools on small machines.
_IO_CPUS = 0.25
_MIB = 2**20
# Blocks between the stages: 16 MiB are about 100 rows of pixels, so that scoring starts before a large read ends.
_BLOCK_BYTES = 16 * _MIB


@dataclass(frozen=True)
class Pools:
    """How many actors of each kind, and what each asks of Ray. `num_threads` is torch's, for scoring on the CPU."""

    scoring_actors: int
    gpus_per_actor: float
    scoring_cpus: float
    feature_workers: int
    feature_cpus: float
    num_threads: int


@dataclass(frozen=True)
class Plan:
    """Everything known before the first row is read."""

    config: ScoreConfig
    predictor: Path
    predictor_hash: str
    spec: FeatureSpec
    inputs: InputPlan
    fingerprint: Fingerprint
    run: RunFolder
    pools: Pools


@dataclass
class Timings:
    """Seconds of the run's phases on the driver's clock, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


@dataclass(frozen=True)
class Outcome:
    """A run as it ended: published now, or before (`was_published`)."""

    run_id: str
    totals: Mapping[str, int]
    timings: Mapping[str, Any]
    was_published: bool


def prepare(config: ScoreConfig, timings: Timings, start_ray: Callable[[], None]) -> Plan:
    """Check everything that can be checked before a row is read; writes nothing but the caches.

    `start_ray` is called where Ray is first needed: bad input and a refused predictor are told before that. Raises
    ConfigError, PredictorError, InputError.
    """
    with timings.phase("list_inputs_s"):
        listing = list_inputs(config.input)
        files = inspect_files(listing, config.input)
    with timings.phase("predictor_s"):
        uri = config.predictor.path
        folder = fetch_predictor(uri, config.engine.cache, config.predictor.sha256)
        predictor_hash = check_hash(folder, uri, config.predictor.sha256)
        refuse_unsupported(folder)
        spec = load_spec(predictor_hash, config.engine.cache)
    if spec is None:
        with timings.phase("ray_init_s"):
            start_ray()
        with timings.phase("predictor_s"):
            spec = _extract_spec(predictor_hash, config)
    inputs = plan_inputs(files, spec, config.input, reserved_names(spec))
    mark = fingerprint(config, predictor_hash=predictor_hash, listing=listing, scores_version=SCORES_VERSION)
    run = RunFolder(config.output.path, config.run.id or mark.run_id)
    with timings.phase("ray_init_s"):
        start_ray()
    return Plan(config, folder, predictor_hash, spec, inputs, mark, run, size_pools(config, ray.cluster_resources()))


def _extract_spec(predictor_hash: str, config: ScoreConfig) -> FeatureSpec:
    """Extract the spec in a process of its own and keep it: the driver never imports AutoGluon."""
    logger.info("predictor %s: extracting its feature spec (imports AutoGluon, about 30 s, once)", predictor_hash[:12])
    document = ray.get(_extract_in_task.remote(config, predictor_hash, _rtx_capabilities()))
    spec = FeatureSpec.from_json(document)
    store_spec(spec, predictor_hash, config.engine.cache)
    return spec


# max_calls=1: the process ends with the task, and 1 GB with it.
@ray.remote(num_cpus=_IO_CPUS, max_calls=1, max_retries=1)  # type: ignore[untyped-decorator]
def _extract_in_task(config: ScoreConfig, predictor_hash: str, rtx_capabilities: tuple[str, ...]) -> str:
    _set_up_worker()
    predictor = load_predictor(fetch_predictor(config.predictor.path, config.engine.cache, predictor_hash))
    spec = extract_spec(predictor)
    if rtx_capabilities and config.engine.provider in ("auto", "tensorrt"):
        _build_rtx_ahead(EngineRequest(predictor, spec, EngineCache(config.engine.cache)), config, rtx_capabilities)
    return spec.to_json()


# Ray's names of GPUs -> what TensorRT for RTX builds for. It runs on no other data-centre GPU.
_RTX_GPUS = {"A100": "SM80", "A10G": "SM86", "L4": "SM89", "L40S": "SM89", "T4": "SM75"}


def _rtx_capabilities() -> tuple[str, ...]:
    """What the cluster's GPUs would need of TensorRT for RTX; empty where it runs on none of them."""
    names = (
        name.partition(":")[2] for node in ray.nodes() for name in node["Resources"] if "accelerator_type:" in name
    )
    return tuple(
        sorted({_RTX_GPUS[gpu] for name in names for gpu in (name, name.partition("-")[0]) if gpu in _RTX_GPUS})
    )


def _build_rtx_ahead(request: EngineRequest, config: ScoreConfig, capabilities: Sequence[str]) -> None:
    """Build here what the actors would each wait for; they find it where the cache is shared."""
    request = replace(request, batch_rows=config.batch.rows)
    for capability in capabilities:
        try:
            build_rtx_ahead(request, "fp32" if config.engine.precision == "fp32" else "fp16", capability)
        except Exception as error:
            # The actors meet it again, and the decision says so.
            logger.warning("engine: TensorRT for RTX was not built ahead for %s: %s", capability, error)


def size_pools(config: ScoreConfig, resources: Mapping[str, float]) -> Pools:
    """Actors and their shares from the cluster's resources; explicit numbers in the configuration win.

    Without a GPU the forward is the bound (about 50 rows/s a core against 200 for features), so a quarter of the cores
    prepares features and the rest scores, one actor a 8 cores. What the actors hold always leaves room for a read and a
    write task, or nothing would move.
    """
    cpus = int(config.resources.cpus or resources.get("CPU", 1))
    per_actor = config.resources.gpus
    may_use = config.engine.provider != "cpu" and (per_actor is None or per_actor > 0)
    gpus = resources.get("GPU", 0.0) if may_use else 0.0
    if gpus:
        actors = config.resources.actors or max(1, int(gpus / (per_actor or 1.0)))
        workers, threads = max(1, cpus - 1), 1
        share = min(per_actor or 1.0, gpus / actors)
    else:
        actors = config.resources.actors or max(1, cpus // 8)
        workers = max(1, cpus // 4)
        # More threads than cores is far worse than too few: OpenMP's threads spin while they wait for each other.
        threads = max(1, (cpus - workers) // actors)
        share = 0.0
    wanted = workers + (0 if share else actors * threads)
    scale = min(1.0, (cpus - 2 * _IO_CPUS) / wanted)
    # Ray takes fractions of 1/10,000; rounding up could let the sum pass what is there.
    return Pools(
        scoring_actors=actors,
        gpus_per_actor=share,
        scoring_cpus=0.0 if share else math.floor(1000 * scale * threads) / 1000,
        feature_workers=workers,
        feature_cpus=math.floor(1000 * scale) / 1000,
        num_threads=threads,
    )


def check_output(config: ScoreConfig) -> None:
    """Raise OutputError unless every node can write the output and, for a local path, sees the same folder."""
    output = config.output.path
    probe = join(output, f".probe-{secrets.token_hex(8)}")
    try:
        write_bytes(join(probe, "driver"), b"")
        _probe_nodes(output, probe)
        remove_tree(probe)
    except OSError as error:
        raise OutputError(f"output.path: cannot write to {redact(output)}: {error}; choose another place") from error


def _probe_nodes(output: str, probe: str) -> None:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 or not is_local(output):
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pending = {
        node["NodeManagerHostname"] + " " + node["NodeID"][:8]: _sees.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(join(probe, "driver"))
        for node in nodes
    }
    blind = [name for name, seen in pending.items() if not ray.get(seen)]
    if blind:
        raise OutputError(
            f"output.path: {output} is a local folder that {len(blind)} of {len(nodes)} nodes do not share "
            f"({', '.join(blind)}); use a shared file system or a URI"
        )


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
def _sees(path: str) -> bool:
    return os.path.exists(path)


class FeatureWorker:
    """A CPU actor: raw columns to features (see `features.py`)."""

    def __init__(self, spec_json: str, config: ScoreConfig) -> None:
        _set_up_worker()
        pa.set_cpu_count(1)
        fetcher = ImageFetcher(config.images)
        blank = config.images.on_error == "blank"
        self._builder = FeatureBuilder(FeatureSpec.from_json(spec_json), fetcher, blank_bad_images=blank)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._builder(table)


class ScoringActor:
    """A scoring actor: loads the predictor once, on a GPU where Ray gives it one (see `scorer.py`)."""

    def __init__(self, spec_json: str, config: ScoreConfig, predictor_hash: str, told: Mapping[str, Any]) -> None:
        _set_up_worker()
        folder = fetch_predictor(config.predictor.path, config.engine.cache, predictor_hash)
        # The last 8 of an actor's 32 digits are its job's: the same for every actor of a run.
        actor = ray.get_runtime_context().get_actor_id()[:12]
        spec = FeatureSpec.from_json(spec_json)
        # Ray resolves a reference that is an argument, not one inside of them.
        sample = ray.get(told["sample"])
        setup = ActorSetup(actor, told["num_threads"], sample, told["decisions"], told["rows_left"])
        self._scorer = Scorer(folder, spec, config, setup)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._scorer.score(table)

    def __del__(self) -> None:
        # Ray Data deletes the instance when the pool shuts down; a constructor that failed has no scorer.
        if hasattr(self, "_scorer"):
            self._scorer.close()


def _set_up_worker() -> None:
    """Give a worker its log (Ray leaves the root logger silent) and keep threads from fighting over cores.

    OpenMP threads that spin while they wait made a fit on two busy cores seven times slower (289 s against 41 s).
    """
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def run(plan: Plan, timings: Timings) -> Outcome:
    """Score the plan's rows and publish them, or find that they are published already.

    Raises FingerprintError, OutputError, IncompleteError, QuarantineLimitError.
    """
    check_output(plan.config)
    plan.run.claim(plan.fingerprint.digest, plan.fingerprint.parts, plan.fingerprint.differences)
    if plan.run.is_published:
        plan.run.finish_publication()
        manifest = plan.run.read_manifest()
        logger.info("run %s is published already; nothing to do", plan.run.run_id)
        return Outcome(plan.run.run_id, manifest["totals"], manifest["timings"], was_published=True)
    attempt = _finished_attempt(plan)
    if attempt is None:
        plan.run.discard_attempts()
        attempt = AttemptFolder(plan.run.uri, f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}")
        with timings.phase("score_s"):
            stages = _score(plan, attempt)
        timings.seconds |= stages
    with timings.phase("publish_s"):
        accounts = _accounts(plan, attempt)
        check_complete(accounts)
        check_quarantine(accounts, plan.config.quarantine.max_fraction)
        accounts = _with_scores_part(plan, attempt, accounts)
    plan.run.publish(_manifest(plan, accounts, timings, attempt.decisions()), resolved_yaml(plan.config))
    return Outcome(plan.run.run_id, accounts.totals, timings.seconds, was_published=False)


def _finished_attempt(plan: Plan) -> AttemptFolder | None:
    """An earlier attempt that scored every row but was not published: over the quarantine limit, or killed at the end."""
    for attempt in plan.run.attempts():
        if attempt.receipts() and _accounts(plan, attempt).is_complete:
            logger.info("run %s: every row was scored by attempt %s; publishing it", plan.run.run_id, attempt.attempt)
            return attempt
    return None


def _accounts(plan: Plan, attempt: AttemptFolder) -> Accounts:
    shards = [
        ShardRows(shard.index, shard.file.source_file, shard.first_row, shard.num_rows) for shard in plan.inputs.shards
    ]
    return add_up(shards, attempt.read_notes(), attempt.receipts())


def _score(plan: Plan, attempt: AttemptFolder) -> dict[str, float]:
    """Run the Ray Data pipeline to its end; returns each stage's busy seconds, summed over its tasks."""
    logger.info("run %s: attempt %s, %s", plan.run.run_id, attempt.attempt, plan.pools)
    if plan.inputs.has_exact_rows and not plan.inputs.estimated_rows:
        return {}
    attempt.open_decisions()
    config, pools = plan.config, plan.pools
    context = DataContext.get_current()
    context.target_max_block_size = _BLOCK_BYTES
    context.wait_for_min_actors_s = -1
    source = ShardSource(plan.inputs, config.input.csv, attempt, block_rows=config.batch.rows)
    spec_json = plan.spec.to_json()
    dataset = ray.data.read_datasource(
        source, override_num_blocks=source.num_tasks, ray_remote_args={"num_cpus": _IO_CPUS}
    )
    dataset = dataset.map_batches(
        FeatureWorker,
        fn_constructor_kwargs={"spec_json": spec_json, "config": config},
        batch_size=config.batch.rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pools.feature_workers),
        num_cpus=pools.feature_cpus,
        udf_modifying_row_count=False,
    )
    dataset = dataset.map_batches(
        ScoringActor,
        fn_constructor_kwargs={
            "spec_json": spec_json,
            "config": config,
            "predictor_hash": plan.predictor_hash,
            "told": {
                "num_threads": pools.num_threads,
                "sample": _sample_in_task.remote(plan.inputs, config, spec_json),
                "decisions": attempt.decisions_uri,
                "rows_left": plan.inputs.estimated_rows // pools.scoring_actors,
            },
        },
        batch_size=config.batch.rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pools.scoring_actors),
        num_cpus=pools.scoring_cpus,
        num_gpus=pools.gpus_per_actor or None,
        udf_modifying_row_count=False,
    )
    sink = PartSink(attempt, PartSchemas(plan.inputs.schema, plan.spec))
    try:
        dataset.write_datasink(sink, ray_remote_args={"num_cpus": _IO_CPUS})
    except Exception as error:
        _raise_refusal(attempt, error)
        raise
    return _stage_seconds(dataset)


# max_calls=1: it has decoded images and is not needed again.
@ray.remote(num_cpus=_IO_CPUS, max_calls=1)  # type: ignore[untyped-decorator]
def _sample_in_task(inputs: InputPlan, config: ScoreConfig, spec_json: str) -> Sample | None:
    _set_up_worker()
    pa.set_cpu_count(1)
    try:
        return draw_sample(inputs, config, FeatureSpec.from_json(spec_json))
    except Exception as error:
        # Whatever is wrong with the input is for its read task to tell; the gate can do with random rows.
        logger.warning(
            "parity: no sample of the input (%s: %s); engines are checked on random rows", type(error).__name__, error
        )
        return None


def _raise_refusal(attempt: AttemptFolder, error: Exception) -> None:
    """Raise what a scoring actor died of, if it was an engine that it could not have."""
    for name, document in attempt.decisions().items():
        if name.startswith("refused-"):
            kind = ParityError if document["error"] == ParityError.__name__ else EngineError
            raise kind(document["message"]) from error


def _stage_seconds(dataset: "ray.data.Dataset") -> dict[str, float]:
    """Busy seconds of read, features, score and write from Ray's own statistics, summed over tasks."""
    names = {"ShardSource": "read_busy_s", "FeatureWorker": "features_busy_s"}
    names |= {"ScoringActor": "score_busy_s", "Write": "write_busy_s"}
    seconds: dict[str, float] = {}
    pending = [dataset.get_stats_summary()]
    while pending:
        summary = pending.pop()
        pending.extend(summary.parents)
        for stage in summary.operators_stats:
            for part, name in names.items():
                if part in stage.operator_name and stage.wall_time is not None:
                    seconds[name] = round(seconds.get(name, 0.0) + stage.wall_time.sum, 3)
    return seconds


def _with_scores_part(plan: Plan, attempt: AttemptFolder, accounts: Accounts) -> Accounts:
    """A run without a scored row still publishes one part, empty, so that readers find the full schema."""
    if any(file.path.startswith("scores/") for file in accounts.files):
        return accounts
    schema = PartSchemas(plan.inputs.schema, plan.spec).scores
    empty = write_part(schema.empty_table(), "scores", 0, attempt, engine="")
    return Accounts(accounts.shards, (empty, *accounts.files), accounts.reasons)


def _manifest(
    plan: Plan, accounts: Accounts, timings: Timings, decisions: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    engines = sorted({file.engine for file in accounts.files if file.engine})
    return {
        "version": MANIFEST_VERSION,
        "run_id": plan.run.run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": {"digest": plan.fingerprint.digest, "parts": plan.fingerprint.parts},
        "predictor": {"path": redact(plan.config.predictor.path), "sha256": plan.predictor_hash},
        "files": [vars(file) for file in accounts.files],
        "shards": [vars(shard) for shard in accounts.shards],
        "totals": {**accounts.totals, "reasons": dict(accounts.reasons)},
        "engine": {
            "used": engines,
            "provider": plan.config.engine.provider,
            "precision": plan.config.engine.precision,
            "decisions": decisions,
        },
        "timings": timings.seconds,
    }
