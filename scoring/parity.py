"""Parity: an engine's scores against the reference's, on the same rows.

Owns the figures and the verdict; whose scores they are is `gate.py`'s.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]

# A label may flip where the reference itself hardly prefers it.
_FLIP_MARGIN = 0.01


@dataclass(frozen=True)
class Parity:
    """How far an engine is from the reference: probabilities, or standard deviations of a regression's label.

    `label_flips` counts rows whose top class differs although the reference's margin exceeds 0.01.
    """

    rows: int
    max_abs_diff: float
    mean_abs_diff: float
    top1_agreement: float
    label_flips: int
    non_finite: int

    def failure(self, limit: float) -> str | None:
        """Why the engine is refused, or None."""
        if self.non_finite:
            return f"{self.non_finite} of {self.rows} rows have scores that are not finite"
        if self.max_abs_diff > limit:
            return f"differs from the fp32 reference by {self.max_abs_diff:.2e} on {self.rows} rows, limit {limit:g}"
        if self.label_flips:
            return (
                f"{self.label_flips} of {self.rows} labels differ where the reference's margin exceeds {_FLIP_MARGIN}"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(reference: Scores, found: Scores) -> Parity:
    """Both (n, classes), or (n, 1) for regression. Rows that the reference itself cannot score are left out."""
    usable = np.isfinite(reference).all(axis=1)
    reference, found = reference[usable], found[usable]
    finite = np.isfinite(found).all(axis=1)
    difference = np.abs(reference[finite] - found[finite])
    agrees = np.ones(int(finite.sum()), dtype=bool)
    flips = 0
    if reference.shape[1] > 1:
        ordered = np.sort(reference[finite], axis=1)
        margin = ordered[:, -1] - ordered[:, -2]
        agrees = reference[finite].argmax(axis=1) == found[finite].argmax(axis=1)
        flips = int((~agrees & (margin > _FLIP_MARGIN)).sum())
    return Parity(
        rows=len(reference),
        max_abs_diff=float(difference.max(initial=0.0)),
        mean_abs_diff=float(difference.mean()) if difference.size else 0.0,
        top1_agreement=float(agrees.mean()) if agrees.size else 1.0,
        label_flips=flips,
        non_finite=int((~finite).sum()),
    )
