"""The reference: what AutoGluon's own `predict_proba(realtime=True)` says of rows, in fp32 with TF32 off.

Owns how a sample's cells become a frame that upstream reads. It goes through upstream's own preprocessing, so that the gate
checks our features along with the engine.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from scoring.engines.build import has_gpu
from scoring.parity import Scores
from scoring.spec import FeatureSpec

if TYPE_CHECKING:
    import pandas as pd
    from autogluon.multimodal import MultiModalPredictor

# realtime=True makes one batch of the whole frame; 64 rows of 224 x 224 need 1 GB on the way through a network in fp32. A GPU
# has it, and each call opens 64 images to find out what they are.
_CPU_ROWS, _GPU_ROWS = 64, 256


def upstream_scores(predictor: "MultiModalPredictor", spec: FeatureSpec, raw: pa.Table) -> Scores:
    """Probabilities (n, classes), or (n, 1) in standard deviations of a regression's label, of rows as in `Sample.raw`.

    Raises whatever upstream raises: with `realtime=True` one bad cell fails the call.
    """
    with tempfile.TemporaryDirectory(prefix="reference-") as folder, _in_fp32(predictor):
        frame = _as_frame(raw, spec, Path(folder))
        size = _GPU_ROWS if has_gpu() else _CPU_ROWS
        chunks = [frame.iloc[start : start + size].reset_index(drop=True) for start in range(0, len(frame), size)]
        return np.concatenate([_score(predictor, spec, chunk) for chunk in chunks])


def _score(predictor: "MultiModalPredictor", spec: FeatureSpec, rows: "pd.DataFrame") -> Scores:
    if spec.label_scaler is not None:
        predicted = np.asarray(predictor.predict(rows, realtime=True), dtype=np.float64)
        return (predicted / spec.label_scaler.unit).astype(np.float32).reshape(-1, 1)
    return np.asarray(predictor.predict_proba(rows, as_multiclass=True, realtime=True), dtype=np.float32)


@contextmanager
def _in_fp32(predictor: "MultiModalPredictor") -> Iterator[None]:
    """A predictor fitted on a GPU has half precision in its configuration, and predicts under autocast."""
    learner = predictor._learner
    precision = learner._config.env.precision
    learner._config.env.precision = 32
    try:
        yield
    finally:
        learner._config.env.precision = precision
        learner._model.to("cpu")  # the engines have copies of their own


def _as_frame(raw: pa.Table, spec: FeatureSpec, folder: Path) -> "pd.DataFrame":
    """The sample as pandas reads it; images as files, since upstream opens local paths whatever it was fitted on."""
    images = {column.name for column in spec.image}
    columns: dict[str, Any] = {}
    for position, name in enumerate(raw.column_names):
        if name not in images:
            columns[name] = raw[name].to_pandas()
            continue
        cells = enumerate(raw[name].to_pylist())
        columns[name] = [_write_images(contents, folder / f"{position}-{row}") for row, contents in cells]
    import pandas as pd

    return pd.DataFrame(columns)


def _write_images(contents: list[bytes | None], stem: Path) -> str | None:
    """Files for one cell, joined as upstream splits them; a missing one among others is a path that leads nowhere."""
    if not any(contents):
        return None
    paths = [Path(f"{stem}-{number}") for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        if content is not None:
            path.write_bytes(content)
    return ";".join(map(str, paths))
