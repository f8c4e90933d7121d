"""What only AutoGluon can tell of a predictor: its feature spec, its graphs, and what it says of a sample itself.

Owns the one process of a run that imports AutoGluon (20 to 30 s, 1 GB): scoring actors find its results and do without. No Ray
inside: `pipeline.py` makes it an actor.
"""

import hashlib
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from scoring.config import ScoreConfig
from scoring.engines.build import EngineRequest, build_graph, build_rtx_ahead, is_exported, library_versions
from scoring.engines.cache import EngineCache, Key
from scoring.flat import Precision
from scoring.parity import Scores
from scoring.predictor import LazyPredictor, extract_spec, fetch_predictor
from scoring.reference import upstream_scores
from scoring.sample import Sample
from scoring.spec import FeatureSpec
from scoring.staging import GPU_ROWS

logger = logging.getLogger(__name__)

_FILE = "scores.npy"
_MAX_THREADS = 8


class Preparer:
    """Loads the predictor when a method first needs it. One method at a time: an export changes torch's state for all."""

    def __init__(self, config: ScoreConfig, predictor_hash: str) -> None:
        self._config = config
        self._cache = EngineCache(config.engine.cache)
        self._load = LazyPredictor(lambda: fetch_predictor(config.predictor.path, config.engine.cache, predictor_hash))

    def load(self) -> None:
        """Import AutoGluon and load the predictor, before anything is asked of it."""
        self._load()

    def spec(self) -> str:
        """The feature spec as JSON. Raises PredictorError."""
        return extract_spec(self._load()).to_json()

    def build(self, spec_json: str, *, for_gpu: bool, rtx_capabilities: Sequence[str] = ()) -> None:
        """Fill the cache with what the scoring actors would have to export; they wait for it. Only warns where that fails.

        What an earlier run has left there costs nothing.
        """
        provider = self._config.engine.provider
        half = self._precision(for_gpu)
        request = EngineRequest(self._load, FeatureSpec.from_json(spec_json), self._cache)
        try:
            if provider in ("auto", _graph_provider(for_gpu)):
                build_graph(request, half, "onnxruntime")
            for capability in rtx_capabilities if provider in ("auto", "tensorrt") else ():
                build_rtx_ahead(replace(request, batch_rows=self._config.batch.rows or GPU_ROWS), half, capability)
        except Exception as error:
            # The actors meet it again, and the decision says so.
            logger.warning("engine: nothing was built ahead: %s: %s", type(error).__name__, error)

    def is_built(self, spec_json: str, *, for_gpu: bool) -> bool:
        """Whether `build` would export nothing, as far as ONNX Runtime's graphs go."""
        if self._config.engine.provider not in ("auto", _graph_provider(for_gpu)):
            return True
        request = EngineRequest(self._load, FeatureSpec.from_json(spec_json), self._cache)
        return is_exported(request, _graph_provider(for_gpu), self._precision(for_gpu))

    def _precision(self, for_gpu: bool) -> Precision:
        return "fp32" if self._config.engine.precision == "fp32" or not for_gpu else "fp16"

    def known_reference(self, spec_json: str, sample: Sample | None) -> Scores | None:
        """What `reference` kept for an earlier run over the same rows."""
        if sample is None:
            return None
        folder = self._cache.find(reference_key(FeatureSpec.from_json(spec_json), sample))
        scores: Scores | None = np.load(folder / _FILE) if folder else None
        return scores

    def knows(self, inputs: str) -> bool:
        """Whether an earlier run's sample of these inputs (their fingerprint's digest) has been scored: see `note`."""
        return self._cache.find(self._inputs_key(inputs)) is not None

    def note(self, inputs: str) -> None:
        """Keep that the sample of these inputs has been scored, for `knows`, before their rows are read."""
        self._cache.get(self._inputs_key(inputs), _build_nothing)

    def _inputs_key(self, inputs: str) -> Key:
        return Key("known-inputs", {"inputs": inputs, "rows": str(self._config.parity.rows), **library_versions()})

    def reference(self, spec_json: str, sample: Sample | None) -> Scores | None:
        """AutoGluon's scores of a sample's rows, in its order, kept for later runs over the same rows; None without rows.

        Raises whatever AutoGluon raises: with `realtime=True` one bad cell fails the call.
        """
        if sample is None:
            return None
        spec = FeatureSpec.from_json(spec_json)
        key = reference_key(spec, sample)

        def compute(folder: Path) -> None:
            predictor = self._load()
            import torch

            # Ray gives its workers one; half of the cores are idle as long as the engines are not there.
            torch.set_num_threads(max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2)))
            np.save(folder / _FILE, upstream_scores(predictor, spec, sample.raw))

        scores: Scores = np.load(self._cache.get(key, compute) / _FILE)
        return scores


def _build_nothing(_folder: Path) -> None:
    """An entry that is there or not."""


def _graph_provider(for_gpu: bool) -> str:
    return "cuda" if for_gpu else "cpu"


def reference_key(spec: FeatureSpec, sample: Sample) -> Key:
    """What AutoGluon's scores depend on: network, columns, libraries, and the rows themselves."""
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, sample.raw.schema) as writer:
        writer.write_table(sample.raw.combine_chunks())
    digest = hashlib.sha256(stream.getbuffer()).hexdigest()
    return Key("reference", {"weights": spec.weights, "rows": digest, **library_versions()})
