"""How fast engines were in earlier runs: with it a warm start builds and checks only the one that will be used.

Owns the record, an entry of the engine cache each. Timing and choosing are `gate.py`'s and `engine.py`'s.
"""

import json
from collections.abc import Callable
from pathlib import Path

from scoring.engines.build import EngineRequest, versions
from scoring.engines.cache import Key

_FILE = "rate.json"


def rate_key(request: EngineRequest, provider: str, precision: str) -> Key:
    """What a rate depends on: the network, the libraries, the device with its threads, and the batches' shapes."""
    from scoring.engines.build import has_gpu
    from scoring.engines.torch_engine import CUDA, device_name

    on_gpu = has_gpu() and provider != "cpu"
    return Key(
        "rate",
        {
            "weights": request.spec.weights,
            **versions(),
            "engine": f"{provider}-{precision}",
            "device": device_name(CUDA) if on_gpu else f"cpu, {request.num_threads} threads",
            "shapes": json.dumps([request.shapes.rows, request.shapes.tokens]),
        },
    )


def known_rate(request: EngineRequest, provider: str, precision: str) -> float | None:
    """Rows/s of an engine as an earlier run measured it; None where none did."""
    folder = request.cache.find(rate_key(request, provider, precision))
    return _read(folder) if folder else None


def measured_rate(request: EngineRequest, provider: str, precision: str, measure: Callable[[], float]) -> float:
    """Rows/s of an engine: an earlier run's figure, or `measure`'s, which is kept."""

    def keep(folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps({"rows_per_s": round(measure(), 1)}))

    return _read(request.cache.get(rate_key(request, provider, precision), keep))


def _read(folder: Path) -> float:
    return float(json.loads((folder / _FILE).read_text())["rows_per_s"])
