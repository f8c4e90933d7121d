"""What the driver does where a way to decode images is refused: exact pixels instead under auto, the refusal otherwise."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from scoring import pipeline
from scoring.decoding import DecodePlan
from scoring.errors import EngineError, ParityError
from scoring.pipeline import Plan
from scoring.sizing import size_flow, size_pools
from tests.test_sizing import H100, SPEC, config

GPU = DecodePlan("gpu", resizes_on_gpu=True, cpu_share=0.2)


@dataclass
class Run:
    """In the run folder's place: counts what is thrown away."""

    uri: str = "/out/runs/named"
    discarded: int = 0

    def discard_attempts(self) -> None:
        self.discarded += 1


@dataclass
class Inputs:
    estimated_rows: int = 10**6
    shards: tuple[()] = field(default=())


def plan_for(tmp_path: Path, decode: DecodePlan, *settings: str) -> Plan:
    settled = config(tmp_path, *settings)
    pools = size_pools(settled, H100)
    flow = size_flow(settled, SPEC, pools, decode, 10**6)
    stub: Any = None
    return Plan(settled, tmp_path, "abc", SPEC, cast("Any", Inputs()), stub, cast("Any", Run()), pools, decode, flow)


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
    monkeypatch.setattr(pipeline, "_score", refuse_unless_exact(plans))
    plan = plan_for(tmp_path, GPU)
    with caplog.at_level(logging.WARNING):
        attempt, stages = pipeline._score_all(plan)
    assert stages == {"read_busy_s": 1.0}
    assert [item.decode for item in plans] == [GPU, DecodePlan("exact", resizes_on_gpu=True)]
    assert plans[1].flow.window_rows < plans[0].flow.window_rows, "frames are larger, so fewer travel together"
    assert cast("Run", plan.run).discarded == 2, "nothing of the refused attempt is left"
    assert attempt.attempt
    assert "refused with gpu images, trying exact ones: no engine passed: cuda-fp16 differs" in caplog.text


@pytest.mark.parametrize("decode", ["gpu", "exact"])
def test_a_named_way_is_refused_and_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    def refuse(plan: Plan, attempt: Any) -> dict[str, float]:
        raise EngineError("cuda cannot run here")

    monkeypatch.setattr(pipeline, "_score", refuse)
    mode = GPU if decode == "gpu" else DecodePlan("exact", resizes_on_gpu=True)
    with pytest.raises(EngineError, match="cuda cannot run here"):
        pipeline._score_all(plan_for(tmp_path, mode, f"images.decode={decode}"))
