"""The engine decision of a run: which engine, why, and how every rung of the ladder fared.

Plain data that goes to the log, the manifest and the other actors. Making it is `engine.py`'s.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scoring.flat import Precision

COMPILED = "torch-compiled"


def describe_error(error: Exception) -> str:
    """An error in one line, for a rung's reason; some have no text."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


@dataclass(frozen=True)
class Rung:
    """One step of the ladder as it went: used, slower, refused (parity), unavailable, or skipped (would not pay)."""

    provider: str
    precision: str
    outcome: str
    reason: str
    rows_per_s: float | None = None
    build_s: float | None = None
    parity: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        rate = f", {self.rows_per_s:,.0f} rows/s" if self.rows_per_s else ""
        return f"{self.provider}-{self.precision} {self.outcome}{rate}: {self.reason}"


@dataclass(frozen=True)
class EngineDecision:
    """Which engine a run uses on one kind of device, why, and how every other rung fared; stored in the manifest."""

    provider: str
    precision: Precision
    device: str
    reason: str
    rungs: tuple[Rung, ...] = ()
    reference: str = ""
    """What the rungs' parity was measured against."""
    compiles: bool = False
    """A compiled engine is built beside the first and takes over when it is ready and faster."""

    @property
    def name(self) -> str:
        return f"{self.provider}-{self.precision}-{self.device}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EngineDecision":
        data = json.loads(text)
        return cls(**{**data, "rungs": tuple(Rung(**rung) for rung in data["rungs"])})
