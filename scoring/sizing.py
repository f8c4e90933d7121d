"""How large a run's stages are: actors, their shares of the cluster, and the rows that travel between them.

Owns the arithmetic alone: resources in, numbers out. Explicit numbers in the configuration win.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scoring.config import ScoreConfig
from scoring.decoding import DecodePlan, can_use_gpu
from scoring.spec import FeatureSpec

_MIB = 2**20
# Reads and writes are short and mostly wait for storage; a whole CPU each would starve the pools on small machines.
IO_CPUS = 0.25

# Seconds of a core a row on an H100's host: reading, tokens and columns by a feature worker; decoding one JPEG of 34 KB to a
# frame and shipping that.
_ROW_CPU_S, _DECODE_CPU_S = 0.22e-3, 3.2e-3
# Where it reads them itself: on an H100's host 15 such workers were busy for 106 us a row, at 59,000 rows/s. Half as many again
# see to it that the GPU never waits: 8 of them scored as fast as 15, the first row 4 s sooner, and with 5.6 GB instead of 10.
_READ_CPU_S, _SPARE = 0.106e-3, 1.5
# Images a second of an H100's JPEG engines, decoded, resized and staged, and the cores that a scoring actor is busy with.
_HARDWARE_RATE, _STAGING_CORES = 50_000.0, 5


@dataclass(frozen=True)
class _Size:
    """Rows a block of features and a window of scoring, and the MiB at which Ray closes a block.

    A block should be 1 to 1.5 times as large as that: Ray cuts larger ones and joins smaller ones at odd row counts, and each
    window then leaves a small one behind.
    """

    block_rows: int
    window_rows: int
    block_mib: int


# A window is sorted by length and keeps the decoder full: the larger the better, as far as memory goes. A row is 0.16 MB
# where the GPU decodes most images, 0.15 as pixels, 0.5 as a frame, 0.6 KB without an image.
# Of 4,096 rows 28 % of the tokens that an H100 is given are padding, of 8,192 rows 22 %.
_SIZES = {"gpu": _Size(512, 8_192, 64), "fast": _Size(512, 4_096, 64), "exact": _Size(128, 1_024, 48)}
# What a GPU decodes travels as it was read: rows that hold their images are cut so that one batch of the reader is one block,
# which Ray neither joins nor cuts again. Rows of 41 KB took 165 us of a core with four batches a block and cells that were
# copied beside rows without an image, without both 106 to 130 (two cores, Ray's own figures).
_MOST_BLOCK_ROWS, _LEAST_IMAGE_BYTES = 2_048, 2_048
_BLOCK_SLACK = 1.4  # Ray cuts blocks of 1.5 times the size that they are closed at
# Small files share a read task: 10,000 files of 1,000 rows are 1,000 tasks, not 10,000. Where workers read for themselves, each
# has some of them, so that all end at about the same time.
_TASK_ROWS, _TASKS_A_WORKER = 10_000, 4
_PLAIN = _Size(4_096, 8_192, 2)
# One window in the forward, four at the decoders (see `nvjpeg.py`), the others being copied and cut. On an H100 with the compiled
# engine and a decoder for each four gave 31,500 rows/s and six 39,400; in one process without Ray on an H200 six gave 44,800 and
# eight that shared four decoders 48,800.
_GPU_CALLS = 8
# Of a GPU's memory one window of 8,192 photographs in flight took 8 GB, six 26 (H100) and eight 38 (H200): 3.4 times what its
# pixels take for each, beside an engine. The driver keeps some to itself.
_ENGINE_BYTES, _WINDOW_COPIES, _USABLE = 5e9, 3.4, 0.95
# On the CPU. Without images rows are narrow, and a block is what a killed driver loses: 16 MiB of them were 20,000 rows.
_CPU_IMAGE_BYTES, _CPU_PLAIN_BYTES = 16 * _MIB, _MIB // 4
_CPU_ROWS = 256
# A crash repeats what has no part yet: 2 s of an H100, half a minute of a core. A million rows are 50 files or 500.
_GPU_PART_ROWS, _CPU_PART_ROWS = 20_000, 2_000
_MIN_BLOCK = 32
# Where one node has nearly all CPUs, room for its loss would let the small ones be given far more than they can do.
_LEAST_SCALE = 0.4


@dataclass(frozen=True)
class Pools:
    """How many actors of each kind, and what each asks of Ray. `num_threads` is torch's, for scoring on the CPU."""

    scoring_actors: int
    gpus_per_actor: float
    scoring_cpus: float
    feature_workers: int
    feature_cpus: float
    num_threads: int
    read_tasks: int
    """At once. Fewer than there is room for: waiting ones left none for a write for 39 s, and 160,000 scored rows in memory."""


@dataclass(frozen=True)
class Flow:
    """Rows a block of features, a window of scoring and a part of scores, calls in flight an actor, and bytes of Ray's blocks.

    `task_rows` are a read task's, at least. With `workers_may_read` feature workers may read their rows themselves, which then
    take no way through Ray's store before their features are there: reading and features took 102 to 133 us of a core a row of
    41 KB that way, 130 to 150 the other (two cores, four runs). Beside decoding on the cores that is little, and each block goes
    to whichever worker is free.
    """

    block_rows: int
    window_rows: int
    part_rows: int
    calls: int
    block_bytes: int
    task_rows: int
    workers_may_read: bool = False

    def workers_read(self, pools: Pools, num_tasks: int) -> bool:
        """Whether a run of so many read tasks leaves them to the feature workers: each has some."""
        return self.workers_may_read and num_tasks >= _TASKS_A_WORKER * pools.feature_workers


def size_pools(config: ScoreConfig, nodes: Sequence[Mapping[str, float]]) -> Pools:
    """Actors and their shares from the resources of the cluster's nodes.

    Without a GPU the forward is the bound (about 50 rows/s a core against 200 for features), so a quarter of the cores
    prepares features and the rest scores, one actor a 8 cores. With GPUs all cores but one a GPU prepare features: that one
    is the scoring actor's own. A GPU that goes is missed until Ray's patience ends; see `run.py`.
    """
    sizes = sorted(node["CPU"] for node in nodes if node.get("CPU")) or [1.0]
    cpus = int(config.resources.cpus or sum(sizes))
    per_actor = config.resources.gpus
    may_use = config.engine.provider != "cpu" and (per_actor is None or per_actor > 0)
    gpus = sum(node.get("GPU", 0.0) for node in nodes) if may_use else 0.0
    if gpus:
        actors = config.resources.actors or max(1, int(gpus / (per_actor or 1.0)))
        workers, threads = max(1, cpus - max(1, int(gpus))), 1
        share = min(per_actor or 1.0, gpus / actors)
    else:
        workers = max(1, cpus // 4)
        # Each node can have one that is all its own.
        actors = config.resources.actors or max(1, min(len(sizes), cpus - workers), cpus // 8)
        # More threads than cores is far worse than too few: OpenMP's threads spin while they wait for each other.
        threads = max(1, min((cpus - workers) // actors, int(sizes[-1])))
        share = 0.0
    scale = _cpu_scale(sizes, cpus, workers, actors, 0 if share else threads)
    # Ray takes fractions of 1/10,000; rounding up could let the sum pass what is there.
    scoring_cpus, feature_cpus = (math.floor(1000 * scale * count) / 1000 for count in (0 if share else threads, 1))
    rooms = int((min(cpus, sum(sizes)) - actors * scoring_cpus - workers * feature_cpus) / IO_CPUS + 1e-6)
    return Pools(
        scoring_actors=actors,
        gpus_per_actor=share,
        scoring_cpus=scoring_cpus,
        feature_workers=workers,
        feature_cpus=feature_cpus,
        num_threads=threads,
        read_tasks=max(1, rooms - max(1, rooms // 4)),
    )


def _cpu_scale(sizes: Sequence[float], cpus: int, workers: int, actors: int, threads: int) -> float:
    """What actors ask of Ray for each core that they use, so that all have a place, also when the largest node is gone.

    `sizes`: the nodes' CPUs, ascending. `threads`: a scoring actor's, 0 where it lives on a GPU. A read and a write task find
    room beside the actors, or nothing would move. Ray's SPREAD keeps actors apart as long as there are nodes enough.
    """
    io = 2 * IO_CPUS
    scale = min(1.0, (cpus - io) / (workers + actors * threads))
    if threads:
        scale = min(scale, (sizes[-1] - io) / threads)
    others = sizes[:-1]
    if others:
        load = math.ceil(actors / len(others)) * threads + math.ceil(workers / len(others))
        scale = min(scale, max((others[0] - io) / load, _LEAST_SCALE * scale))
    return scale


def plan_decode(config: ScoreConfig, spec: FeatureSpec, pools: Pools, *, has_decoder: bool) -> DecodePlan:
    """How the run's images are decoded; `has_decoder`: the GPUs' nodes have nvJPEG.

    Raises ValueError, with what to do next, where a mode that was named cannot be had.
    """
    wanted = config.images.decode
    if not spec.image:
        return DecodePlan()
    resizes = pools.gpus_per_actor > 0 and can_use_gpu(spec)
    if wanted == "gpu" or (wanted == "auto" and resizes and has_decoder):
        if not resizes:
            reason = (
                "no GPU is used by this run"
                if not pools.gpus_per_actor
                else "this predictor's images need the exact way"
            )
            raise ValueError(f"images.decode: gpu cannot be had: {reason}. Set images.decode=auto")
        if not has_decoder:
            raise ValueError(
                "images.decode: gpu needs nvJPEG on the GPU's node; install multimodal-scorer[gpu-images] there, or set "
                "images.decode=auto"
            )
        return DecodePlan("gpu", resizes_on_gpu=True, cpu_share=cpu_share(pools))
    if wanted == "fast":
        return DecodePlan("fast")
    return DecodePlan("exact", resizes_on_gpu=resizes)


def cpu_share(pools: Pools) -> float:
    """The part of the rows that workers decode beside the GPU's decoder, so that both are busy; 0 with few cores.

    With T rows/s, (1 - s) T of them are the decoder's and T (row + s decode) seconds the cores', less those of the actor.
    """
    cores = pools.feature_workers / max(1.0, pools.scoring_actors * pools.gpus_per_actor)
    spare = cores - _STAGING_CORES - _HARDWARE_RATE * _ROW_CPU_S
    return round(max(0.0, spare / (_HARDWARE_RATE * _DECODE_CPU_S + cores)), 2)


def readers_needed(config: ScoreConfig, pools: Pools, decode: DecodePlan, *, are_local: bool) -> int:
    """Of the feature workers, how many read their rows themselves, so that GPUs that decode all images are kept busy.

    All, where cores decode some, where a number of cores was asked for, and where files come from a store, which is waited for.
    """
    if decode.mode != "gpu" or decode.cpu_share or config.resources.cpus or not are_local:
        return pools.feature_workers
    gpus = pools.scoring_actors * pools.gpus_per_actor
    return min(pools.feature_workers, math.ceil(gpus * _HARDWARE_RATE * _READ_CPU_S * _SPARE))


def size_flow(
    config: ScoreConfig, spec: FeatureSpec, pools: Pools, decode: DecodePlan, rows: int, row_bytes: float = 0.0
) -> Flow:
    """Rows and bytes between the stages; a small run is cut into several blocks a worker, so that all of them work.

    `row_bytes`: the files' bytes a row, 0 where they do not tell what a row holds.
    """
    if not pools.gpus_per_actor:
        rows_a_time = config.batch.rows or _CPU_ROWS
        block_bytes = _CPU_IMAGE_BYTES if spec.image else _CPU_PLAIN_BYTES
        return Flow(rows_a_time, rows_a_time, _CPU_PART_ROWS, 1, block_bytes, _TASK_ROWS)
    size = _SIZES[decode.mode] if spec.image else _PLAIN
    share = rows // (4 * pools.feature_workers)
    ships_files = decode.mode == "gpu" and bool(spec.image) and row_bytes >= _LEAST_IMAGE_BYTES
    most = _rows_a_block(size, row_bytes) if ships_files else size.block_rows
    block = max(_MIN_BLOCK, min(most, _power_of_two(share)))
    task = min(_TASK_ROWS, rows // (2 * _TASKS_A_WORKER * pools.feature_workers)) if ships_files else _TASK_ROWS
    # A few windows at least, so that one is prepared while another is scored.
    window = max(block, config.batch.rows or 0, min(size.window_rows, rows // 4))
    return Flow(block, window, _GPU_PART_ROWS, _GPU_CALLS, size.block_mib * _MIB, task, ships_files)


def windows_that_fit(flow: Flow, spec: FeatureSpec, gpu_bytes: int) -> int:
    """How many windows a GPU of so much memory holds at once, of the flow's calls; one at least."""
    pixels = max((model.size**2 * 3 * model.max_images for model in spec.image_models), default=0) if spec.image else 0
    if not pixels:
        return flow.calls
    room = (_USABLE * gpu_bytes - _ENGINE_BYTES) / (_WINDOW_COPIES * flow.window_rows * pixels)
    return max(1, min(flow.calls, int(room)))


def _rows_a_block(size: _Size, row_bytes: float) -> int:
    """As many rows as a block holds."""
    return min(_MOST_BLOCK_ROWS, _power_of_two(int(_BLOCK_SLACK * size.block_mib * _MIB / row_bytes)))


def _power_of_two(number: int) -> int:
    """The largest one that is not above `number`; 1 below that."""
    return 1 << max(0, number.bit_length() - 1)
