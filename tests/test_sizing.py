"""Sizes from the cluster's resources; explicit numbers win."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.score import usable_cpus
from scoring.config import ScoreConfig, load_config
from scoring.decoding import DecodePlan
from scoring.sizing import (
    IO_CPUS,
    Pools,
    cpu_share,
    plan_decode,
    readers_needed,
    size_flow,
    size_pools,
    windows_that_fit,
)
from scoring.spec import FeatureSpec, ImageColumn, ImageModel

H100: Mapping[str, float] = {"CPU": 16.0, "GPU": 1.0}
LAPTOP: Mapping[str, float] = {"CPU": 2.0}
IMAGE = ImageModel("image", 224, (0.5,) * 3, (0.5,) * 3, ("resize_shorter_side", "center_crop"), 1)
COLUMN = ImageColumn("Images", "image_path")
SPEC = FeatureSpec("y", "binary", (0, 1), (), (), (), (COLUMN,), (), (), (), (IMAGE,), False)
PLAIN = replace(SPEC, image=(), image_models=())


def config(tmp_path: Path, *settings: str) -> ScoreConfig:
    flags = {"input.paths": ["data"], "predictor.path": "predictor", "output.path": "out"}
    return load_config(file=None, flags=flags, overrides=settings, cwd=tmp_path)


@pytest.mark.parametrize("resources", [LAPTOP, H100, {"CPU": 1.0}, {"CPU": 64.0, "GPU": 4.0}, {"CPU": 48.0}])
def test_pools_leave_room_for_a_read_and_a_write(tmp_path: Path, resources: Mapping[str, float]) -> None:
    pools = size_pools(config(tmp_path), [resources])
    held = pools.scoring_actors * pools.scoring_cpus + pools.feature_workers * pools.feature_cpus
    assert held <= resources["CPU"] - 0.5
    assert held + pools.read_tasks * IO_CPUS <= resources["CPU"] - IO_CPUS, "reads that wait leave a write its room"
    assert pools.scoring_actors * pools.gpus_per_actor == resources.get("GPU", 0.0)


def test_reads_take_most_of_the_room_beside_the_pools(tmp_path: Path) -> None:
    assert size_pools(config(tmp_path), [H100]).read_tasks == 3
    assert size_pools(config(tmp_path), [LAPTOP]).read_tasks == 1
    assert size_pools(config(tmp_path, "resources.cpus=4"), [H100]).read_tasks == 3, "not all that the cluster has left"
    assert size_pools(config(tmp_path), [{"CPU": 128.0, "GPU": 8.0}]).read_tasks == 24


def test_a_ray_of_our_own_has_the_cores_that_are_left_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert usable_cpus(None) is None, "Ray also knows what a container may use"
    assert usable_cpus(4) == 4
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert usable_cpus(None) == usable_cpus(8) == 4
    assert usable_cpus(2) == 2


def test_explicit_numbers_win(tmp_path: Path) -> None:
    settings = ("resources.cpus=4", "resources.gpus=0.5", "resources.actors=2", "batch.rows=9000")
    pools = size_pools(config(tmp_path, *settings), [H100])
    assert (pools.scoring_actors, pools.gpus_per_actor, pools.feature_workers) == (2, 0.5, 3)
    assert size_flow(config(tmp_path, *settings), SPEC, pools, DecodePlan("gpu"), 10**6).window_rows == 9000
    assert size_pools(config(tmp_path, "resources.gpus=0"), [H100]).gpus_per_actor == 0


def test_auto_takes_the_gpus_decoder_where_it_is_and_exact_pixels_elsewhere(tmp_path: Path) -> None:
    pools, without = size_pools(config(tmp_path), [H100]), size_pools(config(tmp_path), [LAPTOP])
    auto = config(tmp_path)
    assert plan_decode(auto, SPEC, pools, has_decoder=True).mode == "gpu"
    assert plan_decode(auto, SPEC, pools, has_decoder=False) == DecodePlan("exact", resizes_on_gpu=True)
    assert plan_decode(auto, SPEC, without, has_decoder=False) == DecodePlan("exact")
    assert plan_decode(config(tmp_path, "images.decode=fast"), SPEC, pools, has_decoder=True) == DecodePlan("fast")
    assert plan_decode(config(tmp_path, "images.decode=gpu"), PLAIN, without, has_decoder=False) == DecodePlan()


def test_pictures_that_only_pillow_can_transform_stay_on_the_cores(tmp_path: Path) -> None:
    crop = replace(SPEC, image_models=(replace(IMAGE, transforms=("center_crop",)),))
    two = replace(SPEC, image_models=(IMAGE, replace(IMAGE, prefix="other")))
    pools = size_pools(config(tmp_path), [H100])
    for spec in (crop, two):
        assert plan_decode(config(tmp_path), spec, pools, has_decoder=True) == DecodePlan("exact")
        with pytest.raises(ValueError, match="this predictor's images need the exact way"):
            plan_decode(config(tmp_path, "images.decode=gpu"), spec, pools, has_decoder=True)


def test_a_named_decoder_that_is_missing_is_refused_with_the_next_step(tmp_path: Path) -> None:
    named = config(tmp_path, "images.decode=gpu")
    with pytest.raises(ValueError, match=r"install multimodal-scorer\[gpu-images\]"):
        plan_decode(named, SPEC, size_pools(named, [H100]), has_decoder=False)
    with pytest.raises(ValueError, match="no GPU is used"):
        plan_decode(named, SPEC, size_pools(named, [LAPTOP]), has_decoder=False)


def test_few_cores_decode_nothing_and_many_a_share(tmp_path: Path) -> None:
    def share(cores: int) -> float:
        return cpu_share(Pools(1, 1.0, 0.0, cores, 1.0, 1, 3))

    assert share(3) == share(15) == 0.0
    assert 0.0 < share(30) < share(60) < 1.0


def test_a_small_run_is_cut_into_blocks_for_every_worker(tmp_path: Path) -> None:
    pools = size_pools(config(tmp_path), [H100])
    flow = size_flow(config(tmp_path), SPEC, pools, DecodePlan("gpu"), 2_000)
    assert 2_000 / flow.block_rows >= 2 * pools.feature_workers
    assert flow.window_rows <= 500
    large = size_flow(config(tmp_path), SPEC, pools, DecodePlan("gpu"), 10**6)
    assert (large.block_rows, large.window_rows) == (512, 8192)
    assert size_flow(config(tmp_path), PLAIN, pools, DecodePlan(), 10**6).block_rows == 4096


def test_a_smaller_gpu_has_fewer_windows_in_flight(tmp_path: Path) -> None:
    pools = size_pools(config(tmp_path), [H100])
    flow = size_flow(config(tmp_path), SPEC, pools, DecodePlan("gpu"), 10**6)
    assert flow.calls == 8
    counts = [windows_that_fit(flow, SPEC, round(gigabytes * 1e9)) for gigabytes in (8, 16, 24, 40, 80)]
    assert counts == [1, 2, 4, 7, 8]
    larger = replace(SPEC, image_models=(replace(IMAGE, size=384),))
    assert windows_that_fit(flow, larger, round(40e9)) < 8
    assert windows_that_fit(size_flow(config(tmp_path), PLAIN, pools, DecodePlan(), 10**6), PLAIN, 8 * 10**9) == 8


@pytest.mark.parametrize("row_bytes", [3_000.0, 41_000.0, 90_000.0, 200_000.0, 2e6])
def test_rows_that_hold_their_images_are_read_in_batches_of_a_block(tmp_path: Path, row_bytes: float) -> None:
    pools = size_pools(config(tmp_path), [H100])
    flow = size_flow(config(tmp_path), SPEC, pools, DecodePlan("gpu"), 10**6, row_bytes)
    assert flow.block_rows * row_bytes < 1.5 * flow.block_bytes, "Ray does not cut it"
    assert flow.block_rows == 2048 or 2.001 * flow.block_rows * row_bytes > 1.4 * flow.block_bytes
    assert flow.window_rows % flow.block_rows == 0
    assert size_flow(config(tmp_path), SPEC, pools, DecodePlan("exact"), 10**6, row_bytes).block_rows == 128


def test_workers_read_rows_with_images_that_the_gpu_decodes_where_each_has_some_tasks(tmp_path: Path) -> None:
    pools = size_pools(config(tmp_path), [H100])
    flow = size_flow(config(tmp_path), SPEC, pools, DecodePlan("gpu"), 10**6, 41_000.0)
    assert flow.workers_read(pools, 10**6 // flow.task_rows)
    assert not flow.workers_read(pools, 3 * pools.feature_workers), "a few files would leave most workers idle"
    fewer = size_flow(config(tmp_path), SPEC, pools, DecodePlan("gpu"), 200_000, 41_000.0)
    assert fewer.workers_read(pools, 200_000 // fewer.task_rows)
    for decode, row_bytes in (
        (DecodePlan("exact"), 41_000.0),
        (DecodePlan("fast"), 41_000.0),
        (DecodePlan("gpu"), 0.0),
    ):
        assert not size_flow(config(tmp_path), SPEC, pools, decode, 10**6, row_bytes).workers_read(pools, 10**4)
    assert not size_flow(config(tmp_path), PLAIN, pools, DecodePlan(), 10**6, 41_000.0).workers_read(pools, 10**4)


def test_as_many_workers_read_as_the_gpu_needs_where_it_decodes_all(tmp_path: Path) -> None:
    def count(pools: Pools, *settings: str, decode: DecodePlan | None = None, are_local: bool = True) -> int:
        return readers_needed(config(tmp_path, *settings), pools, decode or DecodePlan("gpu"), are_local=are_local)

    pools = size_pools(config(tmp_path), [H100])
    assert (pools.feature_workers, count(pools)) == (15, 8)
    assert count(size_pools(config(tmp_path), [{"CPU": 4.0, "GPU": 1.0}])) == 3, "never more than there are cores"
    assert count(size_pools(config(tmp_path), [{"CPU": 64.0, "GPU": 4.0}])) == 32
    half = size_pools(config(tmp_path, "resources.gpus=0.5", "resources.actors=2"), [H100])
    assert count(half) == 8, "the GPUs count, not the actors"
    assert count(pools, are_local=False) == 15, "a store is waited for"
    assert count(pools, "resources.cpus=16") == 15, "explicit numbers win"
    assert count(pools, decode=DecodePlan("gpu", cpu_share=0.1)) == count(pools, decode=DecodePlan("exact")) == 15


def test_rows_that_name_their_images_are_of_unknown_size(tmp_path: Path) -> None:
    pools = size_pools(config(tmp_path), [H100])
    assert size_flow(config(tmp_path), SPEC, pools, DecodePlan("gpu"), 10**6, 300.0).block_rows == 512


@pytest.mark.parametrize("nodes", [[2.0] * 3, [16.0] * 2, [8.0] * 5, [4.0, 64.0]])
def test_on_several_nodes_an_actor_fits_on_one_and_all_fit_when_one_is_gone(tmp_path: Path, nodes: list[float]) -> None:
    pools = size_pools(config(tmp_path), [{"CPU": cpus} for cpus in nodes])
    assert pools.scoring_cpus <= max(nodes) - 0.5
    held = pools.scoring_actors * pools.scoring_cpus + pools.feature_workers * pools.feature_cpus
    assert held <= max(sum(nodes) - max(nodes), sum(nodes) / 2) - 0.5
    assert pools.scoring_actors >= len(nodes)
    assert pools.num_threads <= max(nodes)


@pytest.mark.parametrize("gpus", [0.0, 1.0])
@pytest.mark.parametrize("nodes", [[2.0] * 3, [16.0] * 2, [8.0] * 3, [8.0] * 5, [4.0] * 4])
def test_all_actors_find_a_place_when_a_node_is_gone(tmp_path: Path, nodes: list[float], gpus: float) -> None:
    pools = size_pools(config(tmp_path), [{"CPU": cpus, "GPU": gpus} for cpus in nodes])
    actors = [pools.scoring_cpus] * pools.scoring_actors + [pools.feature_cpus] * pools.feature_workers
    assert pools.scoring_actors == (len(nodes) if max(nodes) < 16 or gpus else 4)
    assert is_placed(actors, nodes)
    assert is_placed(actors, nodes[1:])


def is_placed(actors: list[float], nodes: list[float]) -> bool:
    """Whether actors, the large ones first, each on the emptiest node, leave room for a read or a write task on every one."""
    free = list(nodes)
    for cpus in sorted(actors, reverse=True):
        free[free.index(max(free))] -= cpus
    return min(free) >= 0.25


def test_a_small_node_beside_a_large_one_has_actors_of_its_size(tmp_path: Path) -> None:
    pools = size_pools(config(tmp_path), [{"CPU": 4.0}, {"CPU": 64.0}])
    assert pools.scoring_cpus <= 4.0
    assert pools.scoring_cpus >= 0.3 * pools.num_threads, "but is not given all that the large one had"


def test_named_cpus_are_not_passed_by_giving_each_node_an_actor(tmp_path: Path) -> None:
    pools = size_pools(config(tmp_path, "resources.cpus=2"), [{"CPU": 2.0}] * 3)
    assert (pools.scoring_actors, pools.num_threads, pools.feature_workers) == (1, 1, 1)


def test_nodes_without_cpus_or_gpus_count_for_what_they_have(tmp_path: Path) -> None:
    pools = size_pools(config(tmp_path), [{"CPU": 4.0}, {"GPU": 2.0, "CPU": 8.0}, {"memory": 1e9}])
    assert (pools.scoring_actors, pools.gpus_per_actor, pools.feature_workers) == (2, 1.0, 10)


def test_narrow_rows_travel_in_small_blocks_on_the_cpu(tmp_path: Path) -> None:
    pools = size_pools(config(tmp_path), [LAPTOP])
    wide, narrow = (size_flow(config(tmp_path), spec, pools, DecodePlan(), 10**6) for spec in (SPEC, PLAIN))
    assert narrow.block_bytes < wide.block_bytes / 16
    assert narrow.part_rows == wide.part_rows
