"""nvJPEG's batches without a GPU: what is asked of the library, and what one bad image costs. `-m gpu` decodes with it."""

import ctypes
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from scoring import nvjpeg
from scoring.engines.base import EngineUnavailable
from scoring.resample import Frames
from scoring.turns import Turns


class Library:
    """In nvJPEG's place: every image is 8 x 6, and a call with one of `broken` among its addresses fails."""

    def __init__(self, broken: Sequence[int]) -> None:
        self.broken = set(broken)
        self.calls: list[list[int]] = []

    def header(self, handle: object, address: int, length: int, *into: int) -> int:
        if length == 0:
            return 3
        ctypes.c_int.from_address(into[2]).value = 8
        ctypes.c_int.from_address(into[3]).value = 6
        return 0

    def nvjpegDecodeBatchedInitialize(self, *arguments: Any) -> int:  # noqa: N802
        self.count = arguments[2]
        return 0

    def nvjpegDecodeBatched(self, handle: object, state: object, data: Any, *rest: Any) -> int:  # noqa: N802
        found = list((ctypes.c_uint64 * self.count).from_address(data.value))
        self.calls.append(found)
        return 6 if self.broken & set(found) else 0


class Decoder(nvjpeg.JpegDecoder):
    def __init__(self, library: Any) -> None:
        self._library: Any = library
        self._headers: Any = library.header
        self._handle: Any = None
        self._states = []
        self._turns = Turns(nvjpeg.STATES)
        self.made: list[Any] = []

    def _new_state(self) -> Any:
        self.made.append((None, len(self.made)))
        return self.made[-1]


class SlowLibrary(Library):
    """Notes which states are used at once."""

    def __init__(self) -> None:
        super().__init__(broken=[])
        self.used: list[int] = []
        self.most = 0

    def nvjpegDecodeBatched(self, handle: object, state: Any, data: Any, *rest: Any) -> int:  # noqa: N802
        assert state not in self.used
        self.used.append(state)
        self.most = max(self.most, len(self.used))
        time.sleep(0.02)
        self.used.remove(state)
        return 0


class Stream:
    cuda_stream = 7


def frames(num: int, *, wide: Sequence[int] = ()) -> Frames:
    widths = np.full(num, 8)
    widths[list(wide)] = 9
    return Frames(np.arange(num) * 256, widths * 3, widths, np.full(num, 6))


def test_a_batch_with_one_bad_image_is_decoded_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvjpeg, "_BATCH", 4)
    library = Library(broken=[105])
    stream: Any = Stream()
    found = Decoder(library).decode(np.arange(100, 110), np.full(10, 5), frames(10), stream, 0)
    assert found.tolist() == [place != 5 for place in range(10)]
    assert library.calls == [[100, 101, 102, 103], [104, 105, 106, 107], [104], [105], [106], [107], [108, 109]]


def test_the_library_never_sees_an_image_that_would_not_fit_its_frame() -> None:
    library = Library(broken=[])
    lengths = np.full(6, 5)
    lengths[4] = 0  # no header that could be read
    stream: Any = Stream()
    found = Decoder(library).decode(np.arange(100, 106), lengths, frames(6, wide=[1]), stream, 0)
    assert found.tolist() == [True, False, True, True, False, True]
    assert library.calls == [[100, 102, 103, 105]]


def test_more_threads_than_states_take_turns() -> None:
    library = SlowLibrary()
    decoder = Decoder(library)
    stream: Any = Stream()

    def decode(order: int) -> bool:
        return bool(decoder.decode(np.arange(100, 103), np.full(3, 5), frames(3), stream, order).all())

    with ThreadPoolExecutor(2 * nvjpeg.STATES) as threads:
        found = list(threads.map(decode, range(4 * nvjpeg.STATES)))
    assert found == [True] * 4 * nvjpeg.STATES
    assert library.most == nvjpeg.STATES
    assert len(decoder.made) == nvjpeg.STATES, "a thread that is done leaves its state to the next"


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvjpeg, "_PACKAGE", "no-such-package")
    assert nvjpeg.find_library() is None
    with pytest.raises(EngineUnavailable, match=r"no-such-package is missing; install multimodal-scorer\[gpu-images\]"):
        nvjpeg.JpegDecoder()
