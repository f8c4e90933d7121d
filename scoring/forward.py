"""Staged batches through an engine: logits of the rows it can score, and what is wrong with the others.

Owns the forward of one table: all batches at once as long as nothing is wrong, then the failed ones in parts.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scoring.engines.base import Engine
from scoring.errors import Reason
from scoring.flat import Logits
from scoring.poison import Fault, Rows, Verdict, fault_of, split
from scoring.staging import Batch, Staged, Staging
from scoring.streams import new_stream, record_event

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submitted:
    """A table's batches on their way through an engine.

    `logits` are those of `ran`, (n, classes) on the host, as soon as the GPU has reached `ready`; `failed` could not be handed
    over, with the reason where that is known.
    """

    staged: Staged
    ran: Sequence[Batch]
    logits: Logits
    ready: "torch.cuda.Event | None"
    failed: Sequence[tuple[Batch, Fault | None]]

    def wait(self) -> tuple[Rows, Logits] | None:
        """The rows, all that can be scored, and their logits, in the batches' order; None where something is wrong."""
        try:
            if self.ready is not None:
                self.ready.synchronize()
        except Exception as error:
            logger.warning("score: %s; trying each batch alone", fault_of(error).message)
            return None
        if self.failed or not np.isfinite(self.logits).all():
            return None
        return _join([batch.places for batch in self.ran]), self.logits


class Forward:
    """Runs what `staging` stages on `engine`, whose logits are `width` a row.

    `submit` and `rescue` are for one thread at a time. Any number of tables may be on their way: the GPU goes on with the next
    one while a thread waits for the last.
    """

    def __init__(self, engine: Engine, staging: Staging, width: int) -> None:
        self._engine = engine
        self._staging = staging
        self._width = width
        # On CUDA's default stream each step would wait for the streams of other threads that are not torch's (nvJPEG's), and
        # they for it.
        self._stream = new_stream() if staging.on_gpu else None

    def submit(self, staged: Staged) -> Submitted:
        """Hand all batches to the engine; a GPU is not waited for."""
        with self._on_stream():
            return self._submit(staged)

    def _on_stream(self) -> AbstractContextManager[None]:
        if self._stream is None:
            return nullcontext()
        import torch

        return torch.cuda.stream(self._stream)

    def _submit(self, staged: Staged) -> Submitted:
        ran: list[tuple[Batch, Any]] = []
        failed: list[tuple[Batch, Fault | None]] = []
        for batch in staged.batches:
            try:
                ran.append((batch, self._engine.submit(batch.padded())[: len(batch.places)]))
            except Exception as error:
                failed.append((batch, fault_of(error)))
        try:
            logits, ready = self._to_host([part for _, part in ran])
        except Exception as error:
            logger.warning("score: %s; trying each batch alone", fault_of(error).message)
            failed += [(batch, None) for batch, _ in ran]
            ran, (logits, ready) = [], self._to_host([])
        return Submitted(staged, [batch for batch, _ in ran], logits, ready, failed)

    def _to_host(self, parts: Sequence[Any]) -> "tuple[Logits, torch.cuda.Event | None]":
        """Batches' logits, on the host or on a GPU -> (n, classes) on the host, there when the event is reached."""
        if not parts:
            return np.empty((0, self._width), dtype=np.float32), None
        parts = [part.reshape(-1, self._width) for part in parts]
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts), None
        import torch

        logits = torch.cat(list(parts))
        if logits.device.type == "cpu":
            return logits.numpy(), None
        host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        host.copy_(logits, non_blocking=True)
        return host.numpy(), record_event()

    def rescue(self, submitted: Submitted) -> tuple[Rows, Logits, dict[int, Verdict]]:
        """What `wait` found something wrong with, the slow way: failed batches in halves, and rows that are not finite alone.

        Returns the rows that can be scored, their logits, and what is wrong with the others.
        """
        with self._on_stream():
            return self._rescue(submitted)

    def _rescue(self, submitted: Submitted) -> tuple[Rows, Logits, dict[int, Verdict]]:
        staged, ran, logits = submitted.staged, submitted.ran, submitted.logits
        failed = list(submitted.failed)
        try:
            if submitted.ready is not None:
                submitted.ready.synchronize()
        except Exception:
            # It came up where the GPU was waited for: any batch's.
            failed += [(batch, None) for batch in ran]
            ran, logits = [], logits[:0]
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
        rows = _join([batch.places for batch, _ in done])
        logits = self._to_host([values for _, values in done])[0]
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
            lambda rows: self._engine.forward(batch.take(rows).complete()).reshape(-1, self._width),
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
