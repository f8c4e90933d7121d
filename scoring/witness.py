"""Rows of the run's sample as they pass with all others: their scores once more against the reference.

The gate sees an engine alone. Here it runs beside decoders, in batches of the run: on an H100 one that had passed gave 5 % of
rows another label there.
"""

import logging
from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.columns import SOURCE_FILE, SOURCE_ROW
from scoring.errors import ParityError
from scoring.flat import Logits
from scoring.identities import Identities
from scoring.outputs import Outputs
from scoring.parity import Scores, compare
from scoring.poison import Rows

logger = logging.getLogger(__name__)

# Other rows beside a row, and other padding, give half precision other last bits than the gate saw.
_SLACK = 2.0


class Witness:
    """Knows the sample's rows by identity. `limit` is the gate's; `find_reference` gives their scores, in their order."""

    def __init__(self, sample: pa.Table, outputs: Outputs, limit: float, find_reference: Callable[[], Scores]) -> None:
        self._outputs = outputs
        self._limit = _SLACK * limit
        self._find_reference = find_reference
        self._places: dict[str, dict[int, int]] = {}
        for place, (file, row) in enumerate(
            zip(sample[SOURCE_FILE].to_pylist(), sample[SOURCE_ROW].to_pylist(), strict=True)
        ):
            self._places.setdefault(file, {})[row] = place

    def check(self, table: pa.Table, rows: Rows, logits: Logits, engine: str) -> None:
        """Compare a table's scored `rows` that are in the sample. Raises ParityError where they are not the reference's."""
        found, known = self._among(table, rows)
        if not len(found) or self._reference is None:
            return
        parity = compare(self._reference[known], self._outputs.comparable(logits[found]))
        if parity.non_finite or parity.max_abs_diff > self._limit:
            raise ParityError(
                f"engine: {engine} passed alone, but {parity.rows} rows of the sample differ from the reference by up to "
                f"{parity.max_abs_diff:.2e} in the run (limit {self._limit:g}, {parity.label_flips} other labels, "
                f"{parity.non_finite} not finite). Nothing that this attempt scored counts. Rerun with another engine.provider "
                "or images.decode=exact, and report it with the log"
            )

    @cached_property
    def _reference(self) -> Scores | None:
        try:
            return self._find_reference()
        except Exception as error:
            logger.warning("parity: rows are not checked as they pass: %s: %s", type(error).__name__, error)
            return None

    def _among(self, table: pa.Table, rows: Rows) -> tuple[Rows, npt.NDArray[np.intp]]:
        """Which of `rows` are in the sample, as places in `rows`, and where in it."""
        position = np.full(table.num_rows, -1, dtype=np.intp)
        position[rows] = np.arange(len(rows))
        found: list[int] = []
        known: list[int] = []
        for file, part in Identities.of(table).files.items():
            places = self._places.get(file)
            if places is None:
                continue
            is_known = np.isin(part.numbers, list(places)) & (position[part.places] >= 0)
            found += position[part.places[is_known]].tolist()
            known += [places[row] for row in part.numbers[is_known].tolist()]
        return np.array(found, dtype=np.intp), np.array(known, dtype=np.intp)
