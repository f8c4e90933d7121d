"""AutoGluon is imported in one process of a run, and in none over rows that it has seen: 30 s and 1 GB a process.

    python -m tests.test_preparer CONFIG.yaml

scores the configuration's sample where AutoGluon cannot be imported.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoring.config import ScoreConfig, load_config
from scoring.pipeline import Timings, prepare
from tests.conftest import REPOSITORY
from tests.layouts import ScoredLayout
from tests.published import read_published


def score_sample(file: str) -> dict[str, Any]:
    """Scores of the sample by identity, the engine's decision, and what a predictor that must be loaded comes to."""
    sys.modules["autogluon"] = None  # type: ignore[assignment]
    from scoring.config import load_config
    from scoring.parts import reserved_names
    from scoring.predictor import hash_predictor, load_spec
    from scoring.preparer import Preparer
    from scoring.sample import draw_sample
    from scoring.scorer import ActorSetup, Scorer
    from scoring.shards import inspect_files, list_inputs, plan_inputs

    config = load_config(file=file, flags={}, overrides=[], cwd=Path.cwd())
    predictor = Path(config.predictor.path)
    predictor_hash = hash_predictor(predictor)
    spec = load_spec(predictor_hash, config.engine.cache)
    assert spec is not None
    files = inspect_files(list_inputs(config.input), config.input)
    sample = draw_sample(plan_inputs(files, spec, config.input, reserved_names(spec)), config, spec)
    assert sample is not None
    preparer = Preparer(config, predictor_hash)
    reference = preparer.reference(spec.to_json(), sample)
    assert reference is not None
    setup = ActorSetup("test", sample=sample, reference=lambda: reference, rows_left=300)
    scorer = Scorer(predictor, spec, config, setup)
    scored = scorer.score(sample.features).select(["source_file", "source_row", "proba_1"]).to_pylist()
    try:
        preparer.spec()
    except ModuleNotFoundError as error:
        refused = str(error)
    return {"scored": scored, "decision": json.loads(scorer.decision.to_json()), "refused": refused}


@pytest.mark.timeout(900)
def test_a_run_over_known_rows_does_without_autogluon(scored_layout: ScoredLayout) -> None:
    (config,) = scored_layout.output.glob("runs/*/config.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_preparer", str(config)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "autogluon" in found["refused"], "the import would have failed"
    (rung, *_) = found["decision"]["rungs"]
    assert found["decision"]["reference"] == "predict_proba(realtime=True) in fp32", "its own scores, kept from the run"
    assert (rung["provider"], rung["outcome"]) == ("cpu", "used")
    scores = read_published(scored_layout.output).scores.to_pandas().set_index(["source_file", "source_row"])["proba_1"]
    assert len(found["scored"]) == rung["parity"]["rows"] >= 60
    for row in found["scored"]:
        # The same bits, in batches of other rows.
        assert np.float32(row["proba_1"]) == scores[row["source_file"], row["source_row"]]


class RayIsNeeded(Exception):  # noqa: N818
    """Where Ray would start."""


def starts_early(config: ScoreConfig, monkeypatch: pytest.MonkeyPatch, *, own_cpus: int | None) -> bool:
    """Whether `prepare` starts AutoGluon's process before Ray."""
    started = []
    monkeypatch.setattr("scoring.pipeline.EarlyPreparer", lambda *arguments: started.append(arguments))

    def start_ray() -> None:
        raise RayIsNeeded

    with pytest.raises(RayIsNeeded):
        prepare(config, Timings(), start_ray, own_cpus=own_cpus)
    return bool(started)


def test_autogluon_starts_before_ray_only_for_inputs_that_no_run_has_sampled(
    scored_layout: ScoredLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = scored_layout.output.glob("runs/*/config.yaml")
    config = load_config(file=str(file), flags={}, overrides=[], cwd=Path.cwd())
    assert not starts_early(config, monkeypatch, own_cpus=16), "the published run has noted them"
    fewer = config.input.model_copy(update={"paths": (str(scored_layout.data / "region=north"),)})
    others = config.model_copy(update={"input": fewer})
    assert starts_early(others, monkeypatch, own_cpus=16)
    assert not starts_early(others, monkeypatch, own_cpus=2), "its import would hold up Ray"
    assert not starts_early(others, monkeypatch, own_cpus=None), "Ray is elsewhere"
    more = config.model_copy(update={"parity": config.parity.model_copy(update={"rows": 513})})
    assert starts_early(more, monkeypatch, own_cpus=16), "its sample is another"


if __name__ == "__main__":
    print(json.dumps(score_sample(sys.argv[1])))
