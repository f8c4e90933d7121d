"""NVIDIA's JPEG engine through nvJPEG's C interface: whole batches decoded into given places of the GPU's memory.

Owns the library, its handles and states. One call a batch and no Python object an image: nvImageCodec's bindings
take Python's lock at every image. On an H100 four threads decode and resize 34,800 images/s of 40 KB this way, 13,200 that way.
"""

import ctypes
import importlib.metadata
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from scoring.engines.base import EngineUnavailable
from scoring.resample import Frames, Sizes
from scoring.turns import Turns

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_PACKAGE = "nvidia-nvjpeg"
# nvjpeg.h: backends; chroma upsampled as Pillow does it; interleaved RGB.
_BACKENDS = {"the JPEG engine": 3, "the GPU's cores": 2}
_FANCY_UPSAMPLING = 1 << 5
# Without it nvJPEG overlaps the images of one call, and two threads that decode at once wait for each other for ever, on
# handles of their own too. With a lock around the calls that gave 24,400 images/s, without and two threads 37,300.
_NO_PIPELINE = 1
_RGB = 5
_MAX_COMPONENTS = 4
# Images a call: beside a forward 256 gave 13,300 rows/s and 64 12,300.
_BATCH = 256
# Decode at once, whatever number of threads ask: beside a forward on an H200 six of six threads gave 44,800 rows/s, four of eight
# 48,800, five of eight 45,300, three of eight 43,700. Each has seven streams, and a GPU 32 hardware queues (see `streams.py`).
STATES = 4

_State = tuple[ctypes.c_void_p, ctypes.c_void_p]


def find_library() -> Path | None:
    """nvJPEG's shared library in its package; None where that is not installed. Imports nothing."""
    try:
        files = importlib.metadata.files(_PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name.startswith("libnvjpeg.so")), None)


class JpegDecoder:
    """Decodes JPEGs on the current GPU, from any thread. Raises EngineUnavailable where it cannot."""

    def __init__(self) -> None:
        path = find_library()
        if path is None:
            raise EngineUnavailable(f"{_PACKAGE} is missing; install multimodal-scorer[gpu-images]")
        self._library = ctypes.CDLL(str(path))
        # Headers are read in microseconds: letting go of Python's lock for each costs more.
        self._headers = ctypes.PyDLL(str(path)).nvjpegGetImageInfo
        self._headers.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_void_p] * 4]
        self._handle, backend, statuses = self._open()
        self._states: list[_State] = []
        self._turns = Turns(STATES)
        if statuses:
            logger.warning("images: JPEGs are decoded by %s, as %s cannot be had here", backend, ", ".join(statuses))
        else:
            logger.info("images: JPEGs are decoded by %s", backend)

    def _open(self) -> tuple[ctypes.c_void_p, str, list[str]]:
        """A handle, what decodes behind it, and what could not be had before that."""
        flags = ctypes.c_uint(_FANCY_UPSAMPLING | _NO_PIPELINE)
        statuses: list[str] = []
        for name, backend in _BACKENDS.items():
            handle = ctypes.c_void_p()
            status = self._library.nvjpegCreateEx(backend, None, None, flags, ctypes.byref(handle))
            if not status:
                return handle, name, statuses
            statuses.append(f"{name} (status {status})")
        raise EngineUnavailable(f"nvJPEG has no decoder for this GPU ({', '.join(statuses)})")

    def decode(
        self, addresses: Sizes, lengths: Sizes, frames: Frames, stream: "torch.cuda.Stream", order: int
    ) -> npt.NDArray[np.bool_]:
        """Write the RGB pixels of each JPEG, `lengths` bytes at `addresses` of the host's memory, to its frame.

        Where more threads ask than there are states, the one with the lowest `order` is next.

        Returns which could be read, (n,); the pixels are there for later work on `stream`, and the bytes must stay until it is
        done. The library's own streams do not wait for what `stream` had to do before: see `frame_memory.py`.
        """
        is_good = self._fits(addresses, lengths, frames)
        places = np.flatnonzero(is_good)
        with self._lend(order) as lent:

            def status_of(batch: npt.NDArray[np.intp]) -> int:
                return self._decode(addresses[batch], lengths[batch], frames.take(batch), stream, lent)

            for start in range(0, len(places), _BATCH):
                batch = places[start : start + _BATCH]
                if status_of(batch):
                    # One that cannot be read fails its whole batch.
                    statuses = [status_of(image) for image in batch[:, None]]
                    is_good[batch] = np.array(statuses) == 0
                    counts = Counter(status for status in statuses if status)
                    logger.info(
                        "images: of a batch of %d, nvJPEG refuses (status: images) %s", len(batch), dict(counts)
                    )
        return is_good

    def _fits(self, addresses: Sizes, lengths: Sizes, frames: Frames) -> npt.NDArray[np.bool_]:
        """Which images have their frame's size: the library asks nobody before it writes."""
        components, sampling = ctypes.c_int(), ctypes.c_int()
        widths, heights = (ctypes.c_int * _MAX_COMPONENTS)(), (ctypes.c_int * _MAX_COMPONENTS)()
        into = [ctypes.addressof(item) for item in (components, sampling, widths, heights)]
        is_good = np.zeros(len(frames), dtype=bool)
        wanted = zip(frames.widths.tolist(), frames.heights.tolist(), strict=True)
        for place, (address, length, size) in enumerate(zip(addresses.tolist(), lengths.tolist(), wanted, strict=True)):
            status = self._headers(self._handle, address, length, *into)
            is_good[place] = not status and (widths[0], heights[0]) == size
        return is_good

    def _decode(
        self, addresses: Sizes, lengths: Sizes, frames: Frames, stream: "torch.cuda.Stream", lent: "_State"
    ) -> int:
        """Decode all of them; nvJPEG's status, 0 where all could be read."""
        handle, state = lent
        images = np.zeros((len(frames), 2, _MAX_COMPONENTS), dtype=np.uint64)  # nvjpegImage_t: channels, then pitches
        images[:, 0, 0], images[:, 1, 0] = frames.addresses, frames.pitches
        data, sizes = addresses.astype(np.uint64), lengths.astype(np.uint64)
        status = self._library.nvjpegDecodeBatchedInitialize(handle, state, len(frames), 1, _RGB)
        if not status:
            status = self._library.nvjpegDecodeBatched(
                handle,
                state,
                _pointer(data),
                _pointer(sizes),
                _pointer(images),
                ctypes.c_void_p(stream.cuda_stream),
            )
        return int(status)

    @contextmanager
    def _lend(self, order: int) -> "Iterator[_State]":
        """One of the states, with its handle, while nobody else has it."""
        with self._turns.take(order):
            try:
                lent = self._states.pop()
            except IndexError:
                lent = self._new_state()
            try:
                yield lent
            finally:
                self._states.append(lent)

    def _new_state(self) -> "_State":
        handle, state = self._open()[0], ctypes.c_void_p()
        status = self._library.nvjpegJpegStateCreate(handle, ctypes.byref(state))
        if status:
            raise EngineUnavailable(f"nvJPEG cannot make a decoder's state: status {status}")
        return handle, state


def _pointer(array: npt.NDArray[np.uint64]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
