"""One published part: its bytes against the manifest, its columns as promised, and rows whose values cannot be right.

Owns what a part must hold. Which rows a run must hold is `recount.py`'s.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scoring.accounts import PartFile
from scoring.columns import SOURCE_FILE, SOURCE_ROW
from scoring.errors import Reason, Stage
from scoring.parity import Scores
from scoring.verify import some

Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Fault = tuple[str, Mask]
"""What is wrong with some rows of a part, and which."""

SCORES, QUARANTINE = "scores", "quarantine"
_SUM_TOLERANCE = 1e-3
# float32 softmax may end one rounding above 1, and two classes may tie in float32 where their logits did not.
_ROUNDING = 1e-6


def kind_of(path: str) -> str:
    return QUARANTINE if path.startswith(f"{QUARANTINE}/") else SCORES


def file_faults(part: PartFile, data: bytes) -> list[str]:
    faults = []
    if len(data) != part.size_bytes:
        faults.append(f"has {len(data)} bytes, the manifest says {part.size_bytes}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != part.sha256:
        faults.append(f"has sha256 {digest}, the manifest says {part.sha256}")
    return faults


def read_part(data: bytes, kind: str) -> pa.Table:
    """A part's identity, then its score columns, or stage and reason. Raises ValueError where they are not as promised."""
    with pq.ParquetFile(io.BytesIO(data)) as parquet:
        schema = parquet.schema_arrow
        if SOURCE_ROW not in schema.names:
            raise ValueError(f"it has no column {SOURCE_ROW}; it has {', '.join(schema.names)}")
        # Scores come after the identity, kept columns before it: a kept one may be called proba_anything.
        scores = schema.names[schema.names.index(SOURCE_ROW) + 1 :]
        wanted = _promised_types(kind, scores)
        for name, kinds in wanted.items():
            if name not in schema.names or schema.field(name).type not in kinds:
                found = schema.field(name).type if name in schema.names else "missing"
                raise ValueError(f"column {name} is {found}, must be {' or '.join(map(str, kinds))}")
        # A name that a dot cuts in two finds its first half too.
        table = parquet.read(columns=list(wanted), use_threads=False).select(list(wanted))
    if table[SOURCE_FILE].null_count or table[SOURCE_ROW].null_count:
        raise ValueError("it has rows without source_file or source_row")
    return table


def _promised_types(kind: str, scores: Sequence[str]) -> dict[str, tuple[pa.DataType, ...]]:
    identity = {SOURCE_FILE: (pa.string(),), SOURCE_ROW: (pa.int64(),)}
    if kind == QUARANTINE:
        return identity | {"stage": (pa.string(),), "reason": (pa.string(),)}
    if scores[-1:] != ["prediction"] or not all(name.startswith("proba_") for name in scores[:-1]):
        raise ValueError(f"after {SOURCE_ROW} it has {', '.join(scores)}, must be proba_<class> columns and prediction")
    labels = (pa.string(), pa.bool_(), pa.int64(), pa.float64())
    return {
        **identity,
        **dict.fromkeys(scores[:-1], (pa.float32(),)),
        "prediction": labels if scores[:-1] else (pa.float32(),),
    }


def rows_by_file(table: pa.Table) -> Iterator[tuple[str, Int64]]:
    """Each source file of a table with its rows, as they come."""
    files = table[SOURCE_FILE].combine_chunks().dictionary_encode()
    codes, rows = files.indices.to_numpy(), table[SOURCE_ROW].to_numpy()
    for code, name in enumerate(files.dictionary.to_pylist()):
        yield name, rows[codes == code]


def score_faults(table: pa.Table) -> Iterator[Fault]:
    names = table.column_names[2:-1]
    is_missing: Mask = pc.is_null(table["prediction"]).to_numpy()
    yield "no prediction", is_missing
    if not names:
        yield "a prediction that is not finite", ~np.isfinite(table["prediction"].to_numpy()) & ~is_missing
        return
    values = columns_of(table, names)
    lowest, highest = values.min(axis=1), values.max(axis=1)  # NaN where any is
    is_finite: Mask = np.isfinite(lowest) & np.isfinite(highest)
    yield "a probability that is not finite", ~is_finite
    yield "a probability outside [0, 1]", (lowest < -_ROUNDING) | (highest > 1 + _ROUNDING)
    is_off = np.abs(values.sum(axis=1, dtype=np.float64) - 1) > _SUM_TOLERANCE
    yield f"probabilities that do not sum to 1 within {_SUM_TOLERANCE:g}", is_off & is_finite
    predicted = _predicted_classes(table["prediction"], names)
    is_top = values[np.arange(len(values)), predicted] >= highest - _ROUNDING
    is_wrong = ((predicted < 0) | ~is_top) & is_finite & ~is_missing
    yield "a prediction that is not the class of the highest probability", is_wrong


def columns_of(table: pa.Table, names: Sequence[str]) -> Scores:
    """Columns of float32 side by side, NaN for null."""
    values: Scores = np.column_stack([table[name].to_numpy() for name in names])
    return values


def _predicted_classes(predictions: pa.ChunkedArray, names: Sequence[str]) -> Int64:
    """Each prediction's place among the `proba_<class>` columns, -1 for a label that has none."""
    encoded = predictions.combine_chunks().dictionary_encode()
    places = {name: place for place, name in enumerate(names)}
    by_code = [places.get(f"proba_{label}", -1) for label in encoded.dictionary.to_pylist()]
    codes: Int64 = pc.fill_null(encoded.indices, len(by_code)).to_numpy()
    return np.array([*by_code, -1], dtype=np.int64)[codes]


def quarantine_faults(table: pa.Table) -> Iterator[Fault]:
    for name, known in (("stage", Stage), ("reason", Reason)):
        is_known = pc.is_in(table[name], value_set=pa.array([item.value for item in known])).to_numpy()
        unknown = pc.unique(table[name].filter(pa.array(~is_known))).to_pylist()
        yield f"the {name} {some([repr(value) for value in unknown])}, which no {name} is", ~is_known
