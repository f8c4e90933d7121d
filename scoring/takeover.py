"""Taking over: a run scores its first batch at once, and a compiled engine relieves the first one when it is ready.

Owns the thread that compiles and the change from one engine to the other.
"""

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from scoring.decision import COMPILED, Rung, describe_error
from scoring.engines.base import Engine
from scoring.engines.build import EngineRequest
from scoring.engines.compiled import build_compiled
from scoring.flat import BatchArrays, Logits, Precision
from scoring.gate import Gate

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Batches after the change that both engines score, nearly two windows: the gate sees an engine alone, and one that had
# passed there was wrong beside decoders.
_COMPARED_BATCHES = 32


class Takeover:
    """Scores with one engine while a compiled one is built in a thread; `settle` changes over when it is ready.

    The compiled one is checked and timed like any other before it scores a row, and held against the first one on the batches
    that it scores first: where they differ the first one stays.
    """

    def __init__(self, request: EngineRequest, gate: Gate, first: Engine) -> None:
        self._request = request
        self._gate = gate
        self._engine = first
        self._former: Engine | None = None
        self._left_to_compare = 0
        self._undone: Rung | None = None
        self._built: list[Engine | Exception] = []
        self._thread: threading.Thread | None = threading.Thread(target=self._build, name="compile", daemon=True)
        self._thread.start()

    @property
    def provider(self) -> str:
        return self._engine.provider

    @property
    def precision(self) -> Precision:
        return self._engine.precision

    @property
    def device(self) -> str:
        return self._engine.device

    def _build(self) -> None:
        try:
            self._built.append(build_compiled(self._request, self._engine.precision))
        except Exception as error:
            logger.warning("engine: compiling failed", exc_info=True)
            self._built.append(error)

    def settle(self, *, wait: bool = False) -> Rung | None:
        """Change over if the compiled engine is ready; call between batches. Returns how it went, once.

        With `wait` nothing is scored beside it, and it is compared with nothing.
        """
        if self._thread is None:
            return None
        if wait:
            self._thread.join()
        if self._thread.is_alive():
            return None
        self._thread = None
        built = self._built.pop()
        rung = self._examine(built)
        logger.info("engine: %s", rung)
        if isinstance(built, Exception):
            return rung
        if rung.outcome != "used":
            built.close()
            return rung
        if wait:
            self._engine.close()
        else:
            self._former, self._left_to_compare = self._engine, _COMPARED_BATCHES
        self._engine = built
        return rung

    def _examine(self, built: Engine | Exception) -> Rung:
        name, precision = COMPILED, self._engine.precision
        if isinstance(built, Exception):
            return Rung(name, precision, "unavailable", describe_error(built))
        try:
            # Anew, both: other tables are decoded beside it, which the first engine's figure was without.
            rung = self._gate.examine(built, getattr(built, "build_s", 0.0), anew=True)
            first_rows_per_s = self._gate.time(self._engine)
        except Exception as error:
            logger.warning("engine: %s failed on the sample", name, exc_info=True)
            return Rung(name, precision, "unavailable", describe_error(error))
        if rung.outcome != "usable":
            return rung
        is_faster = (rung.rows_per_s or 0) > first_rows_per_s
        return replace(rung, outcome="used" if is_faster else "slower")

    def forward(self, arrays: BatchArrays) -> Logits:
        """See `Engine.forward`."""
        return self._engine.forward(arrays)

    def submit(self, arrays: BatchArrays) -> "Logits | torch.Tensor":
        """See `Engine.submit`. Waits for a GPU as long as batches are compared."""
        if self._former is None:
            return self._engine.submit(arrays)
        return self._submit_both(self._former, arrays)

    def _submit_both(self, former: Engine, arrays: BatchArrays) -> "Logits | torch.Tensor":
        wanted = former.submit(arrays)
        try:
            found = self._engine.submit(arrays)
            difference = self._gate.difference(wanted, found)
        except Exception as error:
            logger.warning("engine: %s failed in the run", self._engine.provider, exc_info=True)
            difference = describe_error(error)
        if difference is not None:
            reason = f"went back to {former.provider}-{former.precision} in the run: {difference}"
            logger.warning("engine: %s-%s %s", self._engine.provider, self._engine.precision, reason)
            self._undone = Rung(COMPILED, self._engine.precision, "refused", reason)
            self._engine.close()
            self._engine, self._former = former, None
            return wanted
        self._left_to_compare -= 1
        if not self._left_to_compare:
            former.close()
            self._former = None
        return found

    def warm_up(self) -> None:
        """See `Engine.warm_up`; the compiled one is not waited for."""
        self._engine.warm_up()

    def undone(self) -> Rung | None:
        """Why the last change was taken back, once; None where it was not."""
        rung, self._undone = self._undone, None
        return rung

    def close(self) -> None:
        """See `Engine.close`; a build under way is left to end with the process."""
        self._engine.close()
        if self._former is not None:
            self._former.close()
