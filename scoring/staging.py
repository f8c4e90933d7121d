"""Tables of features made ready for an engine: images on the device, rows cut into micro-batches.

Owns the scoring actor's half of the preparation and its stream, so that it overlaps the forward of the table before.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from scoring.collate import image_places, micro_batches, without_images
from scoring.config import ScoreConfig
from scoring.decoding import DecodePlan
from scoring.device_images import DeviceImages, ImageStage
from scoring.engines.base import Shapes, num_tokens, pad_arrays
from scoring.engines.torch_engine import CUDA
from scoring.images import BadImageError
from scoring.nvjpeg import JpegDecoder
from scoring.poison import MAX_HALVINGS, Rows
from scoring.spec import FeatureSpec, ImageModel
from scoring.streams import new_stream, record_event
from scoring.upload import upload

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Rows and padded tokens a forward: on an H100 128 rows run at 3/4 of the rate of 512. On a CPU 64 images are 39 MB in fp32,
# and more rows gain nothing.
GPU_ROWS, CPU_ROWS = 512, 64
GPU_TOKENS = 192 * GPU_ROWS
_PLACES = "places"


@dataclass(frozen=True)
class Batch:
    """One micro-batch: its rows' places in the table and their arrays; pixels on the device are taken when they are used."""

    places: npt.NDArray[np.intp]
    arrays: dict[str, Any]
    images: DeviceImages | None
    model: ImageModel | None
    on_gpu: "Mapping[str, torch.Tensor] | None" = None
    """The arrays there, padded to one of the engine's shapes, with the places of their images as `_PLACES`."""

    def complete(self) -> dict[str, Any]:
        """The arrays, those on the device among them."""
        if self.images is None or self.model is None:
            return self.arrays
        pixels = self.images.take(self.places, image_places(self.arrays, self.model))
        return {**self.arrays, f"{self.model.prefix}:pixels": pixels}

    def padded(self) -> dict[str, Any]:
        """`complete`, of more rows where those on the GPU are padded: nothing is left to be copied there."""
        if self.on_gpu is None:
            return self.complete()
        arrays = dict(self.on_gpu)
        places = arrays.pop(_PLACES, None)
        if self.images is not None and self.model is not None and places is not None:
            arrays[f"{self.model.prefix}:pixels"] = self.images.gather(places)
        return arrays

    def take(self, rows: Rows) -> "Batch":
        """Some of its rows, as padded as before."""
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return Batch(self.places[rows], arrays, self.images, self.model)


@dataclass(frozen=True)
class Staged:
    """A table's good rows as micro-batches, and the rows whose image turned out to be none."""

    batches: Sequence[Batch]
    bad: dict[int, BadImageError]
    seconds: float
    """How long it took, a turn at the decoder awaited included."""
    halvings: int = 0
    """How often the batches' size had been halved when they were cut."""


class Staging:
    """Stages tables, from any thread; each has a stream of its own."""

    def __init__(self, spec: FeatureSpec, config: ScoreConfig, decode: DecodePlan, *, on_gpu: bool) -> None:
        self._spec = spec
        self.on_gpu = on_gpu
        self.max_rows = config.batch.rows or (GPU_ROWS if on_gpu else CPU_ROWS)
        self._max_tokens = config.batch.tokens or (GPU_TOKENS if on_gpu else None)
        self._halvings = 0
        self._shapes = Shapes.of(spec, self.max_rows) if on_gpu else None
        self._own = threading.local()
        self._images: ImageStage | None = None
        if on_gpu and spec.image and len(spec.image_models) == 1:
            decoder = JpegDecoder() if decode.mode == "gpu" else None
            self._images = ImageStage(spec.image_models[0], CUDA, decoder, max_pixels=config.images.max_pixels)

    def stage(self, table: pa.Table) -> Staged:
        """The table's rows that carry no reason, ready for `Engine.submit`."""
        start = time.perf_counter()
        is_usable = pc.is_null(table["reason"]).to_numpy(zero_copy_only=False).copy()
        if not is_usable.any():  # among them rows whose images must not be touched again
            return Staged([], {}, time.perf_counter() - start)
        with self._on_stream():
            images, bad = self._load_images(table)
            is_usable[list(bad)] = False
            usable = np.flatnonzero(is_usable)
            small = without_images(table) if images is not None else table
            # Taking every row would copy the images.
            chosen = small if len(usable) == table.num_rows else small.take(pa.array(usable))
            model = self._spec.image_models[0] if images is not None else None
            halvings = self._halvings
            max_rows, max_tokens = max(1, self.max_rows >> halvings), self._max_tokens and self._max_tokens >> halvings
            cut = micro_batches(chosen, self._spec, max_rows, self._shapes, max_tokens)
            batches = [Batch(usable[places], arrays, images, model) for places, arrays in cut]
            if self._shapes is not None:
                batches = _upload(batches, self._shapes)
                record_event().synchronize()
        return Staged(batches, bad, time.perf_counter() - start, halvings)

    def lower(self, staged: Staged) -> None:
        """Cut batches half as large as those of `staged`, of which one was too large for memory.

        One step for all of a table's batches, whichever rows fitted in the end: one large row would hold for the whole run.
        """
        halvings = min(MAX_HALVINGS, staged.halvings + 1)
        if halvings > self._halvings:
            self._halvings = halvings
            logger.warning("score: out of memory; batches of at most %d rows from here on", self.max_rows >> halvings)

    def _load_images(self, table: pa.Table) -> tuple[DeviceImages | None, dict[int, BadImageError]]:
        return self._images.load(table) if self._images is not None else (None, {})

    def _on_stream(self) -> AbstractContextManager[None]:
        """A stream of the calling thread's own, on a GPU."""
        if not self.on_gpu:
            return nullcontext()
        import torch

        if not hasattr(self._own, "stream"):
            # The forward's kernels fill the GPU, each of them.
            self._own.stream = new_stream(comes_first=True)
        return torch.cuda.stream(self._own.stream)


def _upload(batches: Sequence[Batch], shapes: Shapes) -> list[Batch]:
    """The batches with their arrays on the GPU, padded as its engine wants them."""
    padded = []
    for batch in batches:
        rows, tokens = shapes.fit(len(batch.places), num_tokens(batch.arrays))
        arrays = pad_arrays(batch.arrays, rows, tokens)
        if batch.images is not None and batch.model is not None:
            places = batch.images.places(batch.places, image_places(batch.arrays, batch.model))
            arrays |= pad_arrays({_PLACES: places}, rows, 0)
        padded.append(arrays)
    return [replace(batch, on_gpu=tensors) for batch, tensors in zip(batches, upload(padded, CUDA), strict=True)]
