"""Our scores and features against AutoGluon's own, value by value, in one process that imports it once.

    python -m tests.upstream OUT.json PREDICTOR ROWS.parquet [PREDICTOR ROWS.parquet ...]

Writes one JSON object a predictor. Reads rows as a run does (source -> features -> scorer) but without Ray: what the
pipeline adds is tested in test_score.py. Rows stay in order, so that figures compare row for row.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from scoring.config import ImagesConfig, InputConfig, ScoreConfig
from scoring.features import FeatureBuilder
from scoring.images import ImageFetcher
from scoring.reading import read_shard
from scoring.shards import inspect_files, list_inputs, plan_inputs
from scoring.spec import FeatureSpec

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Comparison:
    """One predictor's figures. `max_abs_diff` by batch size; regression in standard deviations of the label.

    `sample_diff` is the gate's own comparison: a sample of the input by both, upstream's from cells and files.
    `outputs_differing` counts values that our post-processing of random logits does not share with upstream's, bit for bit.
    `features` maps an upstream batch key to the largest difference from ours, nan where shapes or dtypes differ.
    """

    rows: int
    classes: list[str]
    spread: float
    max_abs_diff: dict[str, float]
    label_flips: int
    sample_diff: float
    outputs_differing: int
    features: dict[str, float]
    quarantined: list[str]


def compare(pairs: Sequence[tuple[Path, Path]]) -> list[Comparison]:
    """Compare predictors on their rows in one subprocess: pytest's own process never imports AutoGluon."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        arguments = [str(path) for pair in pairs for path in pair]
        subprocess.run([sys.executable, "-m", "tests.upstream", str(out), *arguments], check=True, cwd=REPOSITORY)
        return [Comparison(**item) for item in json.loads(out.read_text())]


def build_blocks(spec: FeatureSpec, rows: Path) -> pa.Table:
    """The rows of a parquet file as a read task leaves them."""
    inputs = InputConfig(paths=(str(rows),))
    plan = plan_inputs(inspect_files(list_inputs(inputs), inputs), spec, inputs, ())
    return pa.concat_tables(
        [block for shard in plan.shards for block in read_shard(shard, plan.schema, inputs.csv, block_rows=256)]
    )


def build_features(spec: FeatureSpec, rows: Path) -> pa.Table:
    """The rows of a parquet file as a feature worker leaves them; image paths are absolute."""
    builder = FeatureBuilder(spec, ImageFetcher(ImagesConfig(base=str(rows.parent))))
    return builder(build_blocks(spec, rows))


def compare_one(predictor_path: Path, rows: Path) -> Comparison:
    import torch

    from scoring.predictor import extract_spec, load_predictor
    from scoring.scorer import ActorSetup, Scorer

    torch.set_num_threads(1)
    predictor = load_predictor(predictor_path)
    # Through JSON, as a feature worker gets it.
    spec = FeatureSpec.from_json(extract_spec(predictor).to_json())
    features = build_features(spec, rows)
    good = np.array([reason is None for reason in features["reason"].to_pylist()])
    frame = pd.read_parquet(rows)[good].reset_index(drop=True)
    usable = features.filter(pa.array(good))
    wanted = reference(predictor, frame)
    config = ScoreConfig.model_validate(
        {
            "input": {"paths": (str(rows),)},
            "predictor": {"path": str(predictor_path)},
            "output": {"path": "unused"},
            "images": {"base": str(rows.parent)},
            "parity": {"rows": 48},
            "engine": {"provider": "torch", "precision": "fp32", "cache": str(predictor_path.parents[1] / "cache")},
        }
    )
    scorer = Scorer(predictor_path, spec, config, ActorSetup(actor="test"))
    scores = {
        "256": scorer.score(usable),
        "1": pa.concat_tables([scorer.score(usable.slice(row, 1)) for row in range(usable.num_rows)]),
    }
    unit = spec.label_scaler.unit if spec.label_scaler else 1.0
    numbers = ["prediction"] if spec.is_regression else [f"proba_{label}" for label in spec.class_labels]
    return Comparison(
        rows=len(frame),
        classes=[str(label) for label in spec.class_labels],
        spread=float(wanted[numbers[0]].std()) / unit,
        max_abs_diff={
            size: max(float(np.abs(table[name].to_numpy() - wanted[name].to_numpy()).max()) for name in numbers) / unit
            for size, table in scores.items()
        },
        label_flips=0
        if spec.is_regression
        else int((scores["256"]["prediction"].to_pandas() != wanted["prediction"]).sum()),
        sample_diff=compare_sample(predictor, spec, config),
        outputs_differing=compare_outputs(predictor, spec),
        features=compare_features(predictor, spec, usable, frame),
        quarantined=[reason for reason in features["reason"].to_pylist() if reason is not None],
    )


def compare_sample(predictor: Any, spec: FeatureSpec, config: ScoreConfig) -> float:
    """The fp32 network on a drawn sample's features against upstream on its raw cells: what the gate holds engines to."""
    from scoring.collate import micro_batches
    from scoring.engines.torch_engine import TorchEngine
    from scoring.outputs import Outputs
    from scoring.parity import compare as compare_scores
    from scoring.reference import upstream_scores
    from scoring.sample import draw_sample

    plan = plan_inputs(inspect_files(list_inputs(config.input), config.input), spec, config.input, ())
    sample = draw_sample(plan, config, spec)
    assert sample is not None
    engine = TorchEngine(predictor, spec, "fp32", use_gpu=False, num_threads=1)
    (batch,) = micro_batches(sample.features, spec, max_rows=sample.features.num_rows, shapes=None)
    places, arrays = batch
    found = Outputs(spec).comparable(engine.forward(arrays))
    parity = compare_scores(upstream_scores(predictor, spec, sample.raw)[places], found)
    assert parity.rows == sample.raw.num_rows >= 32
    return parity.max_abs_diff


def compare_outputs(predictor: Any, spec: FeatureSpec) -> int:
    """Our post-processing against upstream's functions on the same logits: how many values differ."""
    import torch
    from autogluon.multimodal.utils.misc import logits_to_prob

    from scoring.outputs import Outputs

    learner, width = predictor._learner, max(1, len(spec.class_labels))
    logits = (4 * np.random.default_rng(0).normal(size=(500, width))).astype(np.float32)
    ours = Outputs(spec).columns(logits)
    if learner._model_postprocess_fn:
        output = {learner._model.prefix: {"logits": torch.from_numpy(logits)}}
        logits = learner._model_postprocess_fn(output)[learner._model.prefix]["logits"].numpy()
    theirs = [np.asarray(learner._df_preprocessor.transform_prediction(y_pred=logits.copy())).reshape(-1)]
    if not spec.is_regression:
        theirs = [*logits_to_prob(logits).T, *theirs]
    return sum(int((np.asarray(mine) != wanted).sum()) for mine, wanted in zip(ours, theirs, strict=True))


def reference(predictor: Any, frame: pd.DataFrame) -> pd.DataFrame:
    """`predict_proba(realtime=True)` and `predict(realtime=True)`, 64 rows at a time."""
    pieces = []
    for start in range(0, len(frame), 64):
        chunk = frame.iloc[start : start + 64].reset_index(drop=True)
        prediction = predictor.predict(chunk, realtime=True).rename("prediction")
        if predictor.problem_type == "regression":
            pieces.append(prediction.to_frame())
        else:
            proba = predictor.predict_proba(chunk, realtime=True, as_multiclass=True).add_prefix("proba_")
            pieces.append(pd.concat([proba, prediction], axis=1))
    table: pd.DataFrame = pd.concat(pieces, ignore_index=True)
    return table


def compare_features(predictor: Any, spec: FeatureSpec, table: pa.Table, frame: pd.DataFrame) -> dict[str, float]:
    """Upstream's process_batch against ours on the first 96 rows, key by key, after the torch engine's conversion."""
    import torch

    from scoring.collate import collate
    from scoring.flat import flat_model

    learner = predictor._learner
    processors = learner.get_data_processors_per_run(learner._data_processors, requires_label=False, is_train=False)
    head = frame.head(96)
    upstream = learner.process_batch(head, learner._df_preprocessor, processors)
    arrays = {
        name: torch.from_numpy(np.array(array)) for name, array in collate(table.slice(0, len(head)), spec).items()
    }
    ours: dict[str, Any] = flat_model(predictor, spec, "fp32").upstream_batch(arrays)  # type: ignore[operator]
    differences: dict[str, float] = {}
    for key, value in upstream.items():
        if key.endswith("choices_ids"):  # few-shot prompts only; no scored model reads it
            continue
        left = value if isinstance(value, tuple) else (value,)
        right = ours[key] if isinstance(ours[key], tuple) else (ours[key],)
        same_shape = [
            tuple(a.shape) == tuple(b.shape) and (a.dtype == b.dtype or "valid_num" in key)
            for a, b in zip(left, right, strict=True)
        ]
        pairs = zip(left, right, strict=True)
        differences[key] = (
            max(float((a.double() - b.double()).abs().max()) for a, b in pairs) if all(same_shape) else np.nan
        )
    return differences


def main(out: Path, paths: Sequence[Path]) -> None:
    results = [compare_one(predictor, rows) for predictor, rows in zip(paths[::2], paths[1::2], strict=True)]
    out.write_text(json.dumps([asdict(result) for result in results]))
    for path, result in zip(paths[::2], results, strict=True):
        print(path.parent.name, result, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
