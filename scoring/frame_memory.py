"""Memory for images and what they are decoded from: buffers that nothing on the GPU uses any more when they are written to.

nvJPEG writes from streams of its own, which wait for nothing that the caller's stream still has to do. Torch gives freed memory
out again in the caller's stream's order, and so the resize before wrote over images just decoded: on a busy H100 34 of 24,576
images came out wrong, each among the first of a chunk, and none on an idle one.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# 512 images of 400 x 400, and their files. Two such buffers a thread.
BUFFER_BYTES, FILE_BYTES = 256 * 2**20, 32 * 2**20


class Event(Protocol):
    """A point in what a device has to do."""

    def synchronize(self) -> None:
        """Wait until it is reached."""


class Reached:
    """An event of a device that has nothing left to do."""

    def synchronize(self) -> None:
        """Return at once."""


@dataclass
class _Buffer:
    memory: "torch.Tensor | None" = None
    done: Event | None = None


class FrameMemory:
    """Two buffers a thread, lent in turn: while one is read, the other is written to.

    `allocate` makes one of so many bytes, (n,) uint8, `least` at least; `record` gives an event behind what the calling
    thread's stream has to do.
    """

    def __init__(self, allocate: "Callable[[int], torch.Tensor]", record: Callable[[], Event], least: int) -> None:
        self._allocate = allocate
        self._record = record
        self._least = least
        self._own = threading.local()

    @contextmanager
    def lend(self, num_bytes: int) -> Iterator["torch.Tensor"]:
        """At least so many bytes, (n,) uint8. What the current stream is given to do in the block may use them."""
        buffer = self._next()
        if buffer.done is not None:
            buffer.done.synchronize()
        if buffer.memory is None or len(buffer.memory) < num_bytes:
            buffer.memory = None
            buffer.memory = self._allocate(max(num_bytes, self._least))
            # Its new memory may have been freed by what the stream has yet to do.
            self._record().synchronize()
        try:
            yield buffer.memory
        finally:
            buffer.done = self._record()

    def _next(self) -> _Buffer:
        if not hasattr(self._own, "buffers"):
            self._own.buffers = [_Buffer(), _Buffer()]
        buffers: list[_Buffer] = self._own.buffers
        buffers.reverse()
        return buffers[0]
