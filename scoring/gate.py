"""The gate: an engine is checked against the reference (see `reference.py`), then timed, on the same rows.

Owns the sample and the reference's scores on it. The figures are `parity.py`'s, the consequences `engine.py`'s.
"""

import logging
import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from scoring.decision import Rung
from scoring.engines.base import Engine, num_rows
from scoring.engines.build import EngineRequest, has_gpu, synthetic_sample
from scoring.flat import BatchArrays, Logits
from scoring.outputs import Outputs
from scoring.parity import Parity, Scores, compare
from scoring.rates import known_rate, measured_rate

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_TIMED_S = 1.0


class Gate:
    """Checks and times engines on the sample; the reference is computed once."""

    def __init__(self, request: EngineRequest) -> None:
        self._request = request
        self._outputs = Outputs(request.spec)
        self._reference: Scores | None = None
        self.reference_name = ""

    @cached_property
    def _sample(self) -> list[BatchArrays]:
        return self._own_sample or synthetic_sample(self._request)

    @cached_property
    def _own_sample(self) -> list[BatchArrays]:
        return list(self._request.sample()) if self._request.sample is not None else []

    @cached_property
    def _timed(self) -> Sequence[BatchArrays]:
        return self._request.timed() if self._request.timed is not None else ()

    @cached_property
    def reference_engine(self) -> Engine:
        """The fp32 network on our features."""
        from scoring.engines.torch_engine import TorchEngine

        request = self._request
        use_gpu = has_gpu() and request.provider != "cpu"
        return TorchEngine(request.predictor, request.spec, "fp32", use_gpu=use_gpu, num_threads=request.num_threads)

    def known_rate(self, provider: str, precision: str) -> float | None:
        """Rows/s of an engine as an earlier run timed it here."""
        return known_rate(self._request, provider, precision)

    def parity(self, engine: Engine) -> Parity:
        """The engine against the reference on every row of the sample."""
        return compare(self.reference(), self._scores(engine))

    def difference(self, wanted: "Logits | torch.Tensor", found: "Logits | torch.Tensor") -> str | None:
        """What is wrong with `found`, logits of rows of which an engine that had passed says `wanted`; None where nothing is."""
        parity = compare(*(self._outputs.comparable(_on_host(logits)) for logits in (wanted, found)))
        # Each may differ from the reference by the limit.
        limit = 2 * self._request.max_abs_diff
        if not parity.non_finite and parity.max_abs_diff <= limit:
            return None
        return (
            f"{parity.non_finite} of {parity.rows} rows are not finite, the others differ by up to "
            f"{parity.max_abs_diff:.2e}, limit {limit:g}"
        )

    def reference(self) -> Scores:
        """The reference's scores of the sample."""
        if self._reference is None:
            start = time.perf_counter()
            self._reference = self._find_reference()
            rows, seconds = len(self._reference), time.perf_counter() - start
            logger.info("parity: %s on %d rows took %.1f s", self.reference_name, rows, seconds)
        return self._reference

    def _find_reference(self) -> Scores:
        if self._request.reference is not None and self._own_sample:
            try:
                scores = self._request.reference()
            except Exception as error:
                # Upstream fails whole calls where we quarantine a row; the network itself can still be compared.
                reason = f"{type(error).__name__}: {error}"
                logger.warning("parity: predict_proba(realtime=True) failed on the sample (%s)", reason, exc_info=True)
                self.reference_name = (
                    f"the fp32 network on our features, as predict_proba(realtime=True) failed: {reason}"
                )
            else:
                self.reference_name = "predict_proba(realtime=True) in fp32"
                return scores
        self.reference_name = self.reference_name or "the fp32 network on our features"
        return self._scores(self.reference_engine)

    def _scores(self, engine: Engine) -> Scores:
        scores: Scores = self._outputs.comparable(np.concatenate([engine.forward(arrays) for arrays in self._sample]))
        return scores

    def rows_per_s(self, engine: Engine) -> float:
        """The engine's rate over the batches to be timed, host to host, for about a second, or an earlier run's."""

        def measure() -> float:
            engine.warm_up()  # what is kept is the rate of all of it
            return self.time(engine)

        return measured_rate(self._request, engine.provider, engine.precision, measure)

    def time(self, engine: Engine) -> float:
        """`rows_per_s`, measured now and not kept."""
        # Shapes are seen once before the clock starts.
        batches = self._timed or self._sample
        for arrays in self._timed:
            engine.forward(arrays)
        rows, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < _TIMED_S:
            for arrays in batches:
                engine.forward(arrays)
                rows += num_rows(arrays)
        return rows / seconds

    def examine(self, engine: Engine, build_s: float, *, anew: bool = False) -> Rung:
        """Parity, then the clock, or what it told an earlier run unless `anew`."""
        parity = self.parity(engine)
        failure = parity.failure(self._request.max_abs_diff)
        common = {"build_s": round(build_s, 2), "parity": parity.to_dict()}
        if failure:
            return Rung(engine.provider, engine.precision, "refused", failure, **common)  # type: ignore[arg-type]
        rate = self.time(engine) if anew else self.rows_per_s(engine)
        reason = f"max difference {parity.max_abs_diff:.1e} on {parity.rows} rows"
        return Rung(engine.provider, engine.precision, "usable", reason, round(rate, 1), **common)  # type: ignore[arg-type]


def _on_host(logits: "Logits | torch.Tensor") -> Logits:
    on_host: Logits = logits if isinstance(logits, np.ndarray) else logits.cpu().numpy()
    return on_host.reshape(len(on_host), -1)
