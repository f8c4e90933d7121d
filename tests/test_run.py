"""What a run does around the scoring: what is left of it, and exact pixels where another way is refused under auto."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from scoring import run as runs
from scoring.accounts import PartFile, ReadNote, Receipt, ShardReceipt
from scoring.decoding import DecodePlan
from scoring.errors import EngineError, ParityError, StalledError
from scoring.ledger import RunFolder
from scoring.lock import Hold
from scoring.pipeline import Plan, read_features
from scoring.shards import Shard
from scoring.sizing import size_flow, size_pools
from tests.test_sizing import H100, SPEC, config

GPU = DecodePlan("gpu", resizes_on_gpu=True, cpu_share=0.2)


@dataclass(frozen=True)
class Inputs:
    """In the input plan's place: a parquet shard of 100 rows, another one, and a CSV."""

    shards: tuple[Shard, ...] = (
        Shard(0, cast("Any", None), 0, 100),
        Shard(1, cast("Any", None), 100, 50),
        Shard(2, cast("Any", None), 0, None),
    )
    estimated_rows: int = 10**6
    row_bytes: float = 0.0


def plan_for(tmp_path: Path, decode: DecodePlan, *settings: str) -> Plan:
    settled = config(tmp_path, *settings)
    pools = size_pools(settled, [H100])
    flow = size_flow(settled, SPEC, pools, decode, 10**6)
    run = RunFolder(str(tmp_path / "out"), "named", lease_s=1.0)
    return Plan(
        settled, tmp_path, "abc", SPEC, cast("Any", Inputs()), cast("Any", None), run, pools, decode, flow, 10**6
    )


@pytest.mark.parametrize(
    ("uri", "num_tasks", "workers", "told"),
    [
        ("/data/a.parquet", 200, 8, "8 feature workers themselves"),
        ("s3://b/a.parquet", 200, 15, "15 feature workers themselves"),
        ("/data/a.parquet", 10, 15, "tasks of their own, too few (10)"),
    ],
)
def test_ray_gets_as_many_feature_workers_as_the_log_says(
    uri: str, num_tasks: int, workers: int, told: str, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    plan = plan_for(tmp_path, DecodePlan("gpu", resizes_on_gpu=True))
    inputs = SimpleNamespace(files=[SimpleNamespace(uri=uri)])
    plan = replace(plan, flow=replace(plan.flow, workers_may_read=True), inputs=cast("Any", inputs))
    stages: list[Any] = []
    dataset = SimpleNamespace(map_batches=lambda _, **stage: stages.append(stage))
    monkeypatch.setattr("ray.data.DataContext.get_current", SimpleNamespace)  # this process keeps its own
    monkeypatch.setattr("ray.data.read_datasource", lambda *_, **__: dataset)
    monkeypatch.setattr("scoring.pipeline.shard_source", lambda *_: SimpleNamespace(num_tasks=num_tasks))
    with caplog.at_level(logging.INFO):
        read_features(plan, plan.run.begin(hold(plan)))
    assert (stages[0]["compute"].min_size, stages[0]["compute"].max_size) == (workers, workers)
    assert told in caplog.text


def hold(plan: Plan) -> Hold:
    found = plan.run.hold()
    assert found is not None
    return found


def receipt(task: int, **shards: tuple[int, int]) -> Receipt:
    """Rows [start, end) of shards called s0, s1 and so on, scored."""
    accounts = {int(name[1:]): ShardReceipt((rows,), (), 0) for name, rows in shards.items()}
    return Receipt("a", task, (PartFile(f"scores/{task}", 1, 1, "", "a", ""),), accounts, {}, 0.0)


def refuse_unless_exact(plans: list[Plan]) -> Any:
    def score(plan: Plan, attempt: Any) -> dict[str, float]:
        plans.append(plan)
        if plan.decode.mode != "exact":
            raise ParityError("no engine passed: cuda-fp16 differs by 0.2")
        return {"read_busy_s": 1.0}

    return score


def test_auto_scores_exact_pixels_where_the_gpus_are_refused_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(runs, "score", refuse_unless_exact(plans))
    plan = plan_for(tmp_path, GPU)
    with caplog.at_level(logging.WARNING):
        attempt, stages = runs._score_all(plan, hold(plan))
    assert stages == {"read_busy_s": 1.0}
    assert [item.decode for item in plans] == [GPU, DecodePlan("exact", resizes_on_gpu=True)]
    assert plans[1].flow.window_rows < plans[0].flow.window_rows, "frames are larger, so fewer travel together"
    assert [item.attempt for item in plan.run.attempts()] == [attempt.attempt], "nothing of the refused one is left"
    assert "refused with gpu images, trying exact ones: no engine passed: cuda-fp16 differs" in caplog.text


@pytest.mark.parametrize("decode", ["gpu", "exact"])
def test_a_named_way_is_refused_and_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    def refuse(plan: Plan, attempt: Any) -> dict[str, float]:
        raise EngineError("cuda cannot run here")

    monkeypatch.setattr(runs, "score", refuse)
    mode = GPU if decode == "gpu" else DecodePlan("exact", resizes_on_gpu=True)
    plan = plan_for(tmp_path, mode, f"images.decode={decode}")
    holder = hold(plan)
    with pytest.raises(EngineError, match="cuda cannot run here"):
        runs._score_all(plan, holder)


def test_what_is_left_are_the_shards_that_receipts_do_not_fill(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, GPU)
    holder = hold(plan)
    first = plan.run.begin(holder)
    assert runs._left(plan, first) is plan
    first.write_receipt(receipt(0, s0=(0, 60), s1=(100, 150)))
    first.write_receipt(receipt(1, s0=(60, 90), s2=(0, 7)))
    left = runs._left(plan, second := plan.run.begin(holder))
    assert [shard.index for shard in left.inputs.shards] == [0, 2], "a CSV has all its rows only when it was counted"
    assert dict(left.done) == {0: ((0, 90),), 1: ((100, 150),), 2: ((0, 7),)}
    second.write_reads(2, {2: ReadNote(7)})
    second.write_receipt(receipt(0, s0=(90, 100)))
    assert runs._left(plan, plan.run.begin(holder)).inputs.shards == ()


def test_a_rerun_goes_on_with_exact_images_where_the_first_attempt_ended_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tmp_path, GPU)
    holder = hold(plan)
    first = plan.run.begin(holder)
    first.write_receipt(receipt(0, s1=(100, 150)))
    Path(first.decisions_uri).mkdir(parents=True)
    for mode in ("exact", "gpu"):
        (Path(plan.run.attempts()[0].decisions_uri) / "images.json").write_text(f'{{"mode": "{mode}"}}')
        assert runs._left(plan, plan.run.begin(holder)).decode.mode == mode


def test_a_run_that_stalls_goes_on_with_what_the_cluster_has_now_and_ends_where_that_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_for(tmp_path, DecodePlan("exact", resizes_on_gpu=True))
    clusters = [[H100], [{"CPU": 8.0, "GPU": 1.0}], [{"CPU": 8.0, "GPU": 1.0}]]
    monkeypatch.setattr("scoring.pipeline._nodes", lambda: clusters[min(len(plans), 2)])
    plans: list[Plan] = []

    def stall(plan: Plan, attempt: Any) -> dict[str, float]:
        plans.append(plan)
        attempt.write_receipt(receipt(0, s0=(0, 60)) if len(plans) == 1 else receipt(0, s0=(60, 70)))
        raise StalledError("nothing moved")

    monkeypatch.setattr(runs, "score", stall)
    with pytest.raises(StalledError), caplog.at_level(logging.WARNING):
        runs._score_all(plan, hold(plan))
    assert [item.pools.feature_workers for item in plans] == [15, 7]
    assert dict(plans[1].done) == {0: ((0, 60),)}, "what was scored stays scored"
    assert "The cluster has changed: going on with Pools(" in caplog.text
