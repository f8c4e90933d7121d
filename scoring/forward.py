"""Staged batches through an engine: logits of the rows it can score, and what is wrong with the others.

Owns the forward of one table: all batches at once as long as nothing is wrong, then the failed ones in parts. Not for several
threads.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from scoring.engines.base import Engine
from scoring.errors import Reason
from scoring.flat import Logits
from scoring.poison import Fault, Rows, Verdict, fault_of, split
from scoring.staging import Batch, Staged, Staging

logger = logging.getLogger(__name__)


class Forward:
    """Runs what `staging` stages on `engine`, whose logits are `width` a row."""

    def __init__(self, engine: Engine, staging: Staging, width: int) -> None:
        self._engine = engine
        self._staging = staging
        self._width = width

    def logits(self, staged: Staged) -> tuple[Rows, Logits, dict[int, Verdict]]:
        """The rows that can be scored and their logits, in the batches' order, and what is wrong with the others.

        A GPU is waited for once, unless something is wrong.
        """
        ran: list[tuple[Batch, Any]] = []
        failed: list[tuple[Batch, Fault | None]] = []
        for batch in staged.batches:
            try:
                ran.append((batch, self._engine.submit(batch.complete())))
            except Exception as error:
                failed.append((batch, fault_of(error)))
        try:
            logits = self._gather([part for _, part in ran])
        except Exception as error:
            logger.warning("score: %s; trying each batch alone", fault_of(error).message)
            # It came up where the GPU was waited for: any batch's.
            failed += [(batch, None) for batch, _ in ran]
            ran, logits = [], self._gather([])
        if not failed and np.isfinite(logits).all():
            return _join([batch.places for batch, _ in ran]), logits, {}
        return self._rescue(staged, [batch for batch, _ in ran], logits, failed)

    def _gather(self, parts: Sequence[Any]) -> Logits:
        """Batches' logits, on the host or on a GPU -> (n, classes) on the host."""
        if not parts:
            return np.empty((0, self._width), dtype=np.float32)
        parts = [part.reshape(-1, self._width) for part in parts]
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts)
        import torch

        logits: Logits = torch.cat(list(parts)).cpu().numpy()
        return logits

    def _rescue(
        self, staged: Staged, ran: Sequence[Batch], logits: Logits, failed: Sequence[tuple[Batch, Fault | None]]
    ) -> tuple[Rows, Logits, dict[int, Verdict]]:
        """`logits`, the slow way: failed batches in halves, and rows that are not finite alone."""
        ends = np.cumsum([len(batch.places) for batch in ran])
        done = list(zip(ran, np.split(logits, ends[:-1]), strict=True)) if ran else []
        bad: dict[int, Verdict] = {}
        for batch, fault in failed:
            parts, wrong = self._split(staged, batch, fault)
            done += parts
            bad |= wrong
        for batch, values in done:
            for row in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
                bad |= self._score_alone(staged, batch.take(np.array([row])), values[row])
        rows, logits = _join([batch.places for batch, _ in done]), self._gather([values for _, values in done])
        if bad:
            row, (reason, message) = next(iter(bad.items()))
            logger.warning("score: %d rows given up, one of them row %d: %s: %s", len(bad), row, reason, message)
        is_good = ~np.isin(rows, list(bad))
        return rows[is_good], logits[is_good], bad

    def _split(
        self, staged: Staged, batch: Batch, fault: Fault | None
    ) -> tuple[list[tuple[Batch, Logits]], dict[int, Verdict]]:
        if fault is not None and fault.is_memory and self._staging.on_gpu:
            import torch

            torch.cuda.empty_cache()  # ONNX Runtime and TensorRT have allocators of their own
        found = split(
            np.arange(len(batch.places)),
            lambda rows: self._gather([self._engine.forward(batch.take(rows).complete())]),
            fault=fault,
        )
        if found.fits is not None:
            self._staging.lower(staged)
        parts = [(batch.take(rows), values) for rows, values in found.parts]
        return parts, {int(batch.places[row]): verdict for row, verdict in found.bad.items()}

    def _score_alone(self, staged: Staged, batch: Batch, logits: Logits) -> dict[int, Verdict]:
        """A row whose logits are not finite, once more: a neighbour may have done it. Fills in `logits`."""
        parts, bad = self._split(staged, batch, None)
        for _, values in parts:
            logits[:] = values[0]
        if not bad and not np.isfinite(logits).all():
            message = f"the model's output is not finite on {engine_name(self._engine)}"
            return {int(batch.places[0]): (Reason.SCORE_NONFINITE, message)}
        return bad


def _join(places: Sequence[Rows]) -> Rows:
    return np.concatenate(places) if places else np.empty(0, dtype=np.intp)


def engine_name(engine: Engine) -> str:
    """How a part names the engine that scored it."""
    return f"{engine.provider}-{engine.precision}-{engine.device}"
