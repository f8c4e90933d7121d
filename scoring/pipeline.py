"""The run: prepares the plan, wires read -> features -> score -> write, and publishes what the ledger adds up to.

Owns the order of things and the sizes of the pools. Every step is another module's; Ray is started by `jobs/`. Ray Data (3 s to
import) is imported where rows begin to flow: Ray starts meanwhile, and the preparer does without.
"""

import gc
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scoring.accounts import Range
from scoring.config import SCORES_VERSION, Fingerprint, ScoreConfig, fingerprint
from scoring.decoding import DecodePlan
from scoring.early_preparer import Address, EarlyPreparer, RemotePreparer
from scoring.engines.build import load_libraries
from scoring.errors import DecoderError, EngineError, OutputError, ParityError, Stage, StalledError
from scoring.features import FeatureBuilder
from scoring.guard import Guard
from scoring.images import ImageFetcher
from scoring.journal import Journal
from scoring.ledger import (
    REFUSED,
    SPOILED,
    AttemptFolder,
    RunFolder,
)
from scoring.nvjpeg import find_library
from scoring.parity import Scores
from scoring.parts import PartSchemas, reserved_names
from scoring.predictor import (
    check_hash,
    fetch_predictor,
    load_spec,
    refuse_unsupported,
    store_spec,
)
from scoring.preparer import Preparer
from scoring.retry import retry_fingerprint
from scoring.sample import Sample, draw_sample
from scoring.scorer import ActorSetup, Scorer
from scoring.shards import BadFile, InputPlan, inspect_all, inspect_files, list_inputs, plan_inputs
from scoring.sizing import IO_CPUS, Flow, Pools, plan_decode, readers_needed, size_flow, size_pools
from scoring.spec import FeatureSpec
from scoring.storage import is_local, join, redact, remove_tree, write_bytes

if TYPE_CHECKING:
    import ray.data

    from scoring.source import ShardSource

logger = logging.getLogger(__name__)

# What an actor writes down before it dies, by name.
_REFUSALS = {kind.__name__: kind for kind in (EngineError, ParityError, DecoderError)}
# Among an attempt's decisions: how its images were decoded, which is not always what was planned.
IMAGES = "images"
# Inputs that are new to a known predictor need AutoGluon too, for the gate's reference: on 16 cores it came at 30 of the 39 s to
# the first score. Where cores are few its import would hold up Ray.
_EARLY_CPUS = 8
_PROBE_GPUS = 0.01  # any part of a GPU puts a task on its node
_COLLECTED_AFTER = 50_000  # objects, instead of 700 or 2,000
_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


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
    decode: DecodePlan
    flow: Flow
    total_rows: int | None
    """The whole run's rows; None where only reading tells, as with CSV."""
    bad_files: tuple[BadFile, ...] = ()
    """Files that are left out because they could not even be inspected."""
    retry_of: RunFolder | None = None
    """The run whose scores are kept and whose quarantined rows are tried again."""
    done: Mapping[int, Sequence[Range]] = field(default_factory=dict)
    """Rows of the inputs' shards, by shard, that earlier attempts have accounted for."""
    preparer: "StartedPreparer | None" = None
    """What has extracted the spec, if it had to be."""


@dataclass(frozen=True)
class StartedPreparer:
    """A handle of a `PreparerActor`, and the process that does its work, if that was started before Ray: they end with it."""

    actor: Any
    process: EarlyPreparer | None = None


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


def prepare(
    config: ScoreConfig,
    timings: Timings,
    start_ray: Callable[[], None],
    *,
    retry_of: str | None = None,
    own_cpus: int | None = None,
) -> Plan:
    """Check everything that can be checked before a row is read; writes nothing but the caches.

    `retry_of` names a published run whose quarantined rows are to be tried again. `start_ray` is called where Ray is first
    needed: bad input and a refused predictor are told before that. `own_cpus`: the CPUs of a Ray that will be this machine
    alone (None: it is elsewhere or there already). Raises ConfigError, PredictorError, InputError.
    """
    with timings.phase("list_inputs_s"):
        listing = list_inputs(config.input)
        skips = config.input.on_bad_file == "skip"
        files, bad_files = inspect_all(listing, config.input) if skips else (inspect_files(listing, config.input), ())
    with timings.phase("predictor_s"):
        uri = config.predictor.path
        folder = fetch_predictor(uri, config.engine.cache, config.predictor.sha256)
        predictor_hash = check_hash(folder, uri, config.predictor.sha256)
        refuse_unsupported(folder)
        spec = load_spec(predictor_hash, config.engine.cache)
    preparer = early = None
    if spec is None:
        # Elsewhere it belongs beside a GPU, and Ray alone knows where one is.
        early = EarlyPreparer(config, predictor_hash) if own_cpus else None
        with timings.phase("ray_init_s"):
            start_ray()
        with timings.phase("predictor_s"):
            preparer = _start_preparer(config, predictor_hash, early)
            spec = _extract_spec(preparer.actor, predictor_hash, config)
    inputs = plan_inputs(files, spec, config.input, reserved_names(spec))
    mark = fingerprint(config, predictor_hash=predictor_hash, listing=listing, scores_version=SCORES_VERSION)
    old = RunFolder(config.output.path, retry_of) if retry_of else None
    if old is not None:
        mark = retry_fingerprint(mark, old)
    run = RunFolder(config.output.path, config.run.id or mark.run_id)
    if early is None and (own_cpus or 0) >= _EARLY_CPUS and not Preparer(config, predictor_hash).knows(mark.digest):
        early = EarlyPreparer(config, predictor_hash)
    with timings.phase("ray_init_s"):
        start_ray()
    preparer = preparer or (_start_preparer(config, predictor_hash, early) if early else None)
    pools = size_pools(config, _nodes())
    decode = _plan_decode(config, spec, pools)
    flow = size_flow(config, spec, pools, decode, inputs.estimated_rows, inputs.row_bytes)
    rows = inputs.estimated_rows if inputs.has_exact_rows else None
    return Plan(
        config,
        folder,
        predictor_hash,
        spec,
        inputs,
        mark,
        run,
        pools,
        decode,
        flow,
        rows,
        bad_files,
        old,
        preparer=preparer,
    )


def resize(plan: Plan) -> Plan:
    """The plan for the cluster as it is now. Raises EngineError where the images' way cannot be had on it."""
    config, spec = plan.config, plan.spec
    pools = size_pools(config, _nodes())
    decode = plan.decode if plan.decode.mode == "exact" else _plan_decode(config, spec, pools)
    flow = size_flow(config, spec, pools, decode, plan.inputs.estimated_rows, plan.inputs.row_bytes)
    return replace(plan, pools=pools, decode=decode, flow=flow)


def _nodes() -> list[Mapping[str, float]]:
    """CPUs and GPUs of the cluster's living nodes."""
    found = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [{name: resources[name] for name in ("CPU", "GPU") if name in resources} for resources in found]


def _plan_decode(config: ScoreConfig, spec: FeatureSpec, pools: Pools) -> DecodePlan:
    """See `plan_decode`. Raises EngineError."""
    may_decode = pools.gpus_per_actor > 0 and bool(spec.image) and config.images.decode in ("auto", "gpu")
    has_decoder = may_decode and _have_gpus_a_decoder()
    if may_decode and not has_decoder and config.images.decode == "auto":
        logger.info(
            "images.decode=auto: exact, as the GPU's node has no nvJPEG; install multimodal-scorer[gpu-images] there"
        )
    try:
        return plan_decode(config, spec, pools, has_decoder=has_decoder)
    except ValueError as error:
        raise EngineError(str(error)) from error


def _have_gpus_a_decoder() -> bool:
    """Whether the GPUs' nodes have nvJPEG, going by one of them."""
    if len([node for node in ray.nodes() if node["Alive"]]) == 1:
        return _has_decoder()  # the GPUs are here; a task would wait 2 s for its worker
    return bool(ray.get(ray.remote(_has_decoder).options(num_cpus=0, num_gpus=_PROBE_GPUS).remote()))


def _has_decoder() -> bool:
    """Whether this node has nvJPEG."""
    return find_library() is not None


def _start_preparer(config: ScoreConfig, predictor_hash: str, early: EarlyPreparer | None = None) -> StartedPreparer:
    """The process that imports AutoGluon, if it comes to that; beside a GPU, so that its graphs lie where they are read."""
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: -node["Resources"].get("GPU", 0.0))
    there = NodeAffinitySchedulingStrategy(nodes[0]["NodeID"], soft=True)
    # No CPU is asked for: the pools promise all of them, and it works while they start. What a death interrupts is done again.
    options = {"num_cpus": 0, "max_restarts": 1, "max_task_retries": 1, "scheduling_strategy": there}
    address = early.address if early is not None else None
    return StartedPreparer(
        ray.remote(PreparerActor).options(**options).remote(config, predictor_hash, address),
        early,
    )


class PreparerActor:
    """See `Preparer`: one of its own, or the one at `address`."""

    def __init__(self, config: ScoreConfig, predictor_hash: str, address: Address | None) -> None:
        _set_up_worker()
        own = partial(Preparer, config, predictor_hash)
        self._kept = own()
        self._preparer = self._kept if address is None else RemotePreparer(address, own)

    def spec(self) -> str:
        return self._preparer.spec()

    def build(self, spec_json: str, for_gpu: bool, rtx_capabilities: Sequence[str]) -> None:
        # The other process may still import AutoGluon, which what is in the cache need not wait for.
        if rtx_capabilities or not self._kept.is_built(spec_json, for_gpu=for_gpu):
            self._preparer.build(spec_json, for_gpu=for_gpu, rtx_capabilities=rtx_capabilities)

    def reference(self, spec_json: str, sample: Sample | None, inputs: str) -> Scores | None:
        known = self._kept.known_reference(spec_json, sample)
        scores = self._preparer.reference(spec_json, sample) if known is None else known
        self._kept.note(inputs)
        return scores


def _extract_spec(preparer: Any, predictor_hash: str, config: ScoreConfig) -> FeatureSpec:
    """Extract the spec in a process of its own and keep it: the driver never imports AutoGluon."""
    logger.info("predictor %s: extracting its feature spec (imports AutoGluon, about 30 s, once)", predictor_hash[:12])
    extracted = preparer.spec.remote()
    # It goes on at once with what the actors will wait for: 15 s on an H100's host.
    for_gpu = size_pools(config, _nodes()).gpus_per_actor > 0
    preparer.build.remote(extracted, for_gpu=for_gpu, rtx_capabilities=_rtx_capabilities())
    spec = FeatureSpec.from_json(ray.get(extracted))
    store_spec(spec, predictor_hash, config.engine.cache)
    return spec


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

    def __init__(self, spec_json: str, config: ScoreConfig, decode: DecodePlan, journal: str) -> None:
        _set_up_worker()
        pa.set_cpu_count(1)
        if decode.mode == "fast":
            import torch

            torch.set_num_threads(1)
        fetcher = ImageFetcher(config.images)
        blank = config.images.on_error == "blank"
        builder = FeatureBuilder(FeatureSpec.from_json(spec_json), fetcher, decode, blank_bad_images=blank)
        self._guard = Guard(builder, Stage.FEATURES, Journal(journal))
        _spare_collector()

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._guard(table)

    def __del__(self) -> None:
        if hasattr(self, "_guard"):
            self._guard.close()


class ScoringActor:
    """A scoring actor: loads its engine once, on a GPU where Ray gives it one (see `scorer.py`)."""

    def __init__(self, spec_json: str, config: ScoreConfig, predictor_hash: str, told: Mapping[str, Any]) -> None:
        _set_up_worker()
        # The last 8 of an actor's 32 digits are its job's: the same for every actor of a run.
        actor = ray.get_runtime_context().get_actor_id()[:12]
        start = time.perf_counter()
        logger.info("score actor=%s starts", actor)
        # While the sample is drawn and graphs are built.
        libraries = threading.Thread(target=load_libraries, name="libraries", daemon=True)
        libraries.start()
        folder = fetch_predictor(config.predictor.path, config.engine.cache, predictor_hash)
        spec = FeatureSpec.from_json(spec_json)
        # Ray resolves a reference that is an argument, not one inside of them.
        sample = told["sample"] and ray.get(told["sample"])
        reference = told["reference"] and partial(ray.get, told["reference"])
        _wait_for(told["built"])
        names = ("num_threads", "decode", "decisions", "rows_left", "journal", "flow", "gpu_share")
        setup = ActorSetup(actor, sample=sample, reference=reference, **{name: told[name] for name in names})
        # Two threads that import the same packages may each see half of one.
        waited_s = time.perf_counter() - start
        libraries.join()
        logger.info(
            "score actor=%s waited_s=%.1f libraries_s=%.1f", actor, waited_s, time.perf_counter() - start - waited_s
        )
        self._scorer = Scorer(folder, spec, config, setup)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._scorer.score(table)

    def __del__(self) -> None:
        # Ray Data deletes the instance when the pool shuts down; a constructor that failed has no scorer.
        if hasattr(self, "_scorer"):
            self._scorer.close()


def _wait_for(built: Any) -> None:
    """Until the preparer has built what it can: the actor would import AutoGluon itself for what is not there yet."""
    if built is None:
        return
    try:
        ray.get(built)
    except ray.exceptions.RayError as error:
        logger.warning("engine: nothing was built ahead, as its process ended: %s", error)


def _spare_collector() -> None:
    """Let Python's collector of cycles pass over what is loaded by now, and come less often.

    A block's tokens are thousands of lists, none in a cycle, for which it came again and again: 7 of 36 us a row.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTED_AFTER, *gc.get_threshold()[1:])


def _set_up_worker() -> None:
    """Give a worker its log (Ray leaves the root logger silent) and keep threads from fighting over cores.

    OpenMP threads that spin while they wait made a fit on two busy cores seven times slower (289 s against 41 s).
    """
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def score(plan: Plan, attempt: AttemptFolder) -> dict[str, float]:
    """Run the Ray Data pipeline over the plan's rows; returns each stage's busy seconds, summed over its tasks.

    Raises what an engine was refused for, and StalledError.
    """
    logger.info("run %s: attempt %s, %s, %s, %s", plan.run.run_id, attempt.attempt, plan.pools, plan.flow, plan.decode)
    write_bytes(join(attempt.decisions_uri, f"{IMAGES}.json"), json.dumps(asdict(plan.decode)).encode())
    from ray.data import DataContext
    from ray.data.exceptions import ExecutionTimeoutError

    from scoring.sink import PartSink

    preparer = None
    if not attempt.decisions().keys() - {IMAGES}:  # else an earlier attempt's actors have examined the engine
        # Ray ends an actor that nobody holds any more: it is held here until all rows are scored.
        preparer = plan.preparer or _start_preparer(plan.config, plan.predictor_hash)
    elif plan.preparer is not None and plan.preparer.process is not None:
        plan.preparer.process.close()
    dataset = score_features(read_features(plan, attempt), plan, attempt, preparer.actor if preparer else None)
    # Where the rows are not known before they are read, only the end tells whether too many are bad.
    limit = None if plan.total_rows is None else (plan.total_rows, plan.config.quarantine.max_fraction)
    sink = PartSink(attempt, PartSchemas(plan.inputs.schema, plan.spec), plan.flow.part_rows, limit)
    context = DataContext.get_current()
    try:
        dataset.write_datasink(sink, ray_remote_args={"num_cpus": IO_CPUS})
    except ExecutionTimeoutError as error:
        raise StalledError(
            f"run {plan.run.run_id}: nothing moved for {context.execution_no_progress_timeout_s:.0f} s with {plan.pools} on "
            f"{_nodes()}; look at the log of the actors for what they wait for, then rerun the same command, which goes on "
            "where this stopped (RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S sets the patience)"
        ) from error
    except Exception as error:
        _raise_refusal(attempt, error)
        raise
    return _stage_seconds(dataset)


def read_features(plan: Plan, attempt: AttemptFolder) -> "ray.data.Dataset":
    """The plan's rows as tables of features: everything before the scoring actors."""
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.target_max_block_size = plan.flow.block_bytes
    context.wait_for_min_actors_s = -1
    flow, pools = plan.flow, plan.pools
    source = shard_source(plan, attempt)
    # Ray joins the two stages where they ask for the same, and the second takes blocks as they come.
    is_one = flow.workers_read(pools, source.num_tasks)
    workers = feature_workers(plan, source.num_tasks)
    if flow.workers_may_read:
        readers = (
            f"{workers} feature workers themselves"
            if is_one
            else f"tasks of their own, too few ({source.num_tasks}) to be the workers'"
        )
        logger.info("run %s: rows are read by %s", plan.run.run_id, readers)
    dataset = ray.data.read_datasource(
        source,
        override_num_blocks=source.num_tasks,
        concurrency=None if is_one else pools.read_tasks,
        ray_remote_args={"num_cpus": pools.feature_cpus if is_one else IO_CPUS},
    )
    return dataset.map_batches(
        FeatureWorker,
        fn_constructor_kwargs={
            "spec_json": plan.spec.to_json(),
            "config": plan.config,
            "decode": plan.decode,
            "journal": attempt.journal_uri("features"),
        },
        batch_size=None if is_one else flow.block_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=workers),
        num_cpus=pools.feature_cpus,
        udf_modifying_row_count=False,
    )


def shard_source(plan: Plan, attempt: AttemptFolder) -> "ShardSource":
    """What reads the plan's rows."""
    from scoring.source import ShardSource

    flow = plan.flow
    return ShardSource(plan.inputs, plan.config.input.csv, attempt, flow.block_rows, flow.task_rows, plan.done)


def feature_workers(plan: Plan, num_tasks: int) -> int:
    """How many feature workers a run of so many read tasks has."""
    if not plan.flow.workers_read(plan.pools, num_tasks):
        return plan.pools.feature_workers
    are_local = all(is_local(file.uri) for file in plan.inputs.files)
    return readers_needed(plan.config, plan.pools, plan.decode, are_local=are_local)


def score_features(
    dataset: "ray.data.Dataset", plan: Plan, attempt: AttemptFolder, preparer: Any = None
) -> "ray.data.Dataset":
    """Tables of features -> the same rows with scores; without a preparer, on the engine that was decided for."""
    from ray.data import ActorPoolStrategy

    pools, flow, spec_json = plan.pools, plan.flow, plan.spec.to_json()
    sample = built = reference = None
    if preparer is not None:
        sample = _sample_in_task.remote(plan.inputs, plan.config, spec_json, plan.decode)
        for_gpu = pools.gpus_per_actor > 0
        built = preparer.build.remote(spec_json, for_gpu=for_gpu, rtx_capabilities=_rtx_capabilities())
        reference = preparer.reference.remote(spec_json, sample, plan.fingerprint.digest)
    return dataset.map_batches(
        ScoringActor,
        fn_constructor_kwargs={
            "spec_json": spec_json,
            "config": plan.config,
            "predictor_hash": plan.predictor_hash,
            "told": {
                "num_threads": pools.num_threads,
                "sample": sample,
                "built": built,
                "reference": reference,
                "decode": plan.decode,
                "decisions": attempt.decisions_uri,
                "journal": attempt.journal_uri("score"),
                "rows_left": plan.inputs.estimated_rows // pools.scoring_actors,
                "flow": flow,
                "gpu_share": pools.gpus_per_actor,
            },
        },
        batch_size=flow.window_rows,
        batch_format="pyarrow",
        # Several calls at once are safe: the scorer has a lock a stage (see `scorer.py`).
        compute=ActorPoolStrategy(size=pools.scoring_actors, enable_true_multi_threading=flow.calls > 1),
        num_cpus=pools.scoring_cpus,
        num_gpus=pools.gpus_per_actor or None,
        max_concurrency=flow.calls,
        udf_modifying_row_count=False,
    )


# max_calls=1: it has decoded images and is not needed again.
@ray.remote(num_cpus=IO_CPUS, max_calls=1)  # type: ignore[untyped-decorator]
def _sample_in_task(inputs: InputPlan, config: ScoreConfig, spec_json: str, decode: DecodePlan) -> Sample | None:
    _set_up_worker()
    pa.set_cpu_count(1)
    try:
        return draw_sample(inputs, config, FeatureSpec.from_json(spec_json), decode)
    except Exception as error:
        # Whatever is wrong with the input is for its read task to tell; the gate can do with random rows.
        logger.warning(
            "parity: no sample of the input (%s: %s); engines are checked on random rows", type(error).__name__, error
        )
        return None


def _raise_refusal(attempt: AttemptFolder, error: Exception) -> None:
    """Raise what a scoring actor died of, if it was an engine that it could not have."""
    for name, document in attempt.decisions().items():
        if name.startswith((REFUSED, SPOILED)):
            raise _REFUSALS.get(document["error"], EngineError)(document["message"]) from error


def _stage_seconds(dataset: "ray.data.Dataset") -> dict[str, float]:
    """Busy seconds of read, features, score and write from Ray's own statistics, summed over tasks.

    Where feature workers read their rows themselves there are none of read.
    """
    names = {"FeatureWorker": "features_busy_s", "ShardSource": "read_busy_s"}
    names |= {"ScoringActor": "score_busy_s", "Write": "write_busy_s"}
    seconds: dict[str, float] = {}
    pending = [dataset.get_stats_summary()]
    while pending:
        summary = pending.pop()
        pending.extend(summary.parents)
        for stage in summary.operators_stats:
            name = next((name for part, name in names.items() if part in stage.operator_name), None)
            if name is not None and stage.wall_time is not None:
                seconds[name] = round(seconds.get(name, 0.0) + stage.wall_time.sum, 3)
    return seconds
