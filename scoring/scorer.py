"""The scorer: a predictor loaded once, tables of features in, tables of scores out.

Owns collating rows into an engine's arrays, micro-batches, and from logits to probabilities and labels by upstream's own
functions. No Ray inside: `pipeline.py` makes it an actor.
"""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from scoring.columns import mark_rows
from scoring.engine import BatchArrays, Engine, Logits, TorchEngine
from scoring.errors import Reason, Stage
from scoring.features import CATEGORICAL, FEATURE_PREFIX, NUMERICAL, feature_name
from scoring.meter import Meter
from scoring.predictor import load_predictor
from scoring.spec import FeatureSpec, ImageModel, Scalar, TextModel

logger = logging.getLogger(__name__)

ENGINE_COLUMN = "engine"
# Rows a forward on the CPU: 64 images of 224 x 224 are 39 MB in fp32, and more rows gain nothing there.
_CPU_ROWS = 64


def score_fields(spec: FeatureSpec) -> list[pa.Field]:
    """The columns a scored row gains: `proba_<class>` float32 in class order, and `prediction`."""
    probabilities = [pa.field(f"proba_{label}", pa.float32()) for label in spec.class_labels]
    return [*probabilities, pa.field("prediction", prediction_type(spec))]


def prediction_type(spec: FeatureSpec) -> pa.DataType:
    """float32 for regression, else the type of the class labels (text where they mix)."""
    if spec.is_regression:
        return pa.float32()
    kinds = {type(label) for label in spec.class_labels}
    types: dict[type, pa.DataType] = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return types[kinds.pop()] if len(kinds) == 1 else pa.string()


class Scorer:
    """Loads the predictor in `folder` and scores tables with it, in micro-batches sorted by token count."""

    def __init__(self, folder: Path, spec: FeatureSpec, *, actor: str, num_threads: int, batch_rows: int) -> None:
        start = time.perf_counter()
        self._spec = spec
        self._predictor = load_predictor(folder)
        self._engine: Engine = TorchEngine(self._predictor, spec, num_threads)
        on_cpu = self._engine.decision.device == "cpu"
        self._micro_rows = min(batch_rows, _CPU_ROWS) if on_cpu else batch_rows
        self.meter = Meter(actor, self._engine.decision.provider)
        decision, load_s = self._engine.decision, time.perf_counter() - start
        logger.info("score actor=%s load_s=%.1f engine=%s: %s", actor, load_s, decision.name, decision.reason)

    def score(self, table: pa.Table) -> pa.Table:
        """Replace `feat:*` by the score columns and `engine`; same rows, same order.

        Rows that carry a reason get null scores; a row whose logits are not finite is marked score_nonfinite.
        """
        self.meter.start_batch()
        usable = np.flatnonzero(pc.is_null(table["reason"]).to_numpy(zero_copy_only=False))
        logits = self._logits(table, usable)
        finite = np.isfinite(logits).all(axis=1)
        scored_rows = usable[finite]
        scored = table.drop_columns([name for name in table.column_names if name.startswith(FEATURE_PREFIX)])
        message = f"the model's output is not finite on {self._engine.decision.name}"
        bad = {int(row): (Reason.SCORE_NONFINITE, message) for row in usable[~finite]}
        scored = mark_rows(scored, Stage.SCORE, bad)
        for field, values in zip(score_fields(self._spec), self._outputs(logits[finite]), strict=True):
            scored = scored.append_column(field, _scatter(values, scored_rows, table.num_rows, field.type))
        scored = scored.append_column(ENGINE_COLUMN, pa.repeat(self._engine.decision.name, table.num_rows))
        line = self.meter.end_batch(table.num_rows)
        if line is not None:
            logger.info(line)
        return scored

    def _logits(self, table: pa.Table, rows: npt.NDArray[np.intp]) -> Logits:
        width = max(1, len(self._spec.class_labels))
        logits = np.empty((len(rows), width), dtype=np.float32)
        if not len(rows):
            return logits
        lengths = np.zeros(len(rows), dtype=np.int64)
        for model in self._spec.text_models if self._spec.text else ():
            counts = pc.list_value_length(table[feature_name(model.prefix, "token_ids")]).to_numpy()
            lengths = np.maximum(lengths, counts[rows])
        # Rows of like length together: a batch is padded to its longest row.
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), self._micro_rows):
            places = order[start : start + self._micro_rows]
            arrays = collate(table.take(pa.array(rows[places])), self._spec)
            logits[places] = self._engine.forward(arrays).reshape(len(places), width)
        return logits

    def _outputs(self, logits: Logits) -> list[list[Any] | npt.NDArray[Any]]:
        """Finite logits (n, classes) -> the values of `score_fields`, by upstream's own post-processing."""
        from autogluon.multimodal.utils.misc import logits_to_prob

        if not len(logits):
            return [[] for _ in score_fields(self._spec)]
        predicted = self._predictor._learner._df_preprocessor.transform_prediction(y_pred=logits)
        if self._spec.is_regression:
            return [np.asarray(predicted, dtype=np.float32).reshape(-1)]
        probabilities = logits_to_prob(logits).astype(np.float32)
        columns: list[list[Any] | npt.NDArray[Any]] = [probabilities[:, i] for i in range(probabilities.shape[1])]
        as_text = prediction_type(self._spec) == pa.string()
        labels: list[Scalar] = np.asarray(predicted).tolist()
        return [*columns, [str(label) for label in labels] if as_text else labels]

    def close(self) -> None:
        """Log the last throughput line and free the engine."""
        logger.info(self.meter.describe() + " final=true")
        self._engine.close()


def collate(table: pa.Table, spec: FeatureSpec) -> BatchArrays:
    """Rows of features -> an engine's named arrays, padded to the longest row (see `engine.py`)."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in (NUMERICAL, CATEGORICAL):
        if name in table.column_names:
            column = table[name].combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=False)
            arrays[name.removeprefix(FEATURE_PREFIX)] = flat.reshape(table.num_rows, column.type.list_size)
    for text_model in spec.text_models if spec.text else ():
        arrays |= _token_arrays(table, text_model)
    for image_model in spec.image_models if spec.image else ():
        arrays |= _image_arrays(table, image_model)
    return arrays


def _token_arrays(table: pa.Table, model: TextModel) -> dict[str, npt.NDArray[Any]]:
    token_ids = table[feature_name(model.prefix, "token_ids")].combine_chunks()
    segment_ids = table[feature_name(model.prefix, "segment_ids")].combine_chunks()
    return {
        f"{model.prefix}:token_ids": pad_lists(token_ids, model.pad_id),
        f"{model.prefix}:segment_ids": pad_lists(segment_ids, 0),
        f"{model.prefix}:valid_length": pc.list_value_length(token_ids).to_numpy().astype(np.int64),
    }


def pad_lists(lists: pa.ListArray, pad_value: int) -> npt.NDArray[np.int32]:
    """Lists of int32 -> (n, longest) int32, padded at the end."""
    lengths = pc.list_value_length(lists).to_numpy()
    width = int(lengths.max(initial=0))
    padded = np.full((len(lists), width), pad_value, dtype=np.int32)
    padded[np.arange(width)[None, :] < lengths[:, None]] = lists.flatten().to_numpy()
    return padded


def _image_arrays(table: pa.Table, model: ImageModel) -> dict[str, npt.NDArray[Any]]:
    valid_num = table[feature_name(model.prefix, "valid_num")].to_numpy().astype(np.int64)
    image_num = valid_num + table[feature_name(model.prefix, "zero_num")].to_numpy().astype(np.int64)
    width = max(1, int(image_num.max(initial=1)))
    pixels = np.zeros((table.num_rows, width, model.size, model.size, 3), dtype=np.uint8)
    for row, content in enumerate(table[feature_name(model.prefix, "pixels")]):
        if valid_num[row]:
            flat = np.frombuffer(content.as_buffer(), dtype=np.uint8)
            pixels[row, : valid_num[row]] = flat.reshape(-1, model.size, model.size, 3)
    return {
        f"{model.prefix}:pixels": pixels,
        f"{model.prefix}:valid_num": valid_num,
        f"{model.prefix}:image_num": image_num,
    }


def _scatter(
    values: list[Any] | npt.NDArray[Any], rows: npt.NDArray[np.intp], num_rows: int, data_type: pa.DataType
) -> pa.Array:
    """Values of some rows -> a column of all rows, null elsewhere."""
    places = np.full(num_rows, -1, dtype=np.int64)
    places[rows] = np.arange(len(rows))
    return pa.array(values, type=data_type).take(pa.array(places, mask=places < 0))
