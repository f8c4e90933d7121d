"""CUDA streams and events: whose work comes first, and how the host waits for it.

Owns how many hardware queues the streams of a process share, which has to be said before CUDA starts. Imports nothing heavy.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# With CUDA's 8 queues the streams of nvJPEG, seven a thread, stand behind kernels of the forward: beside a forward that kept an
# H100 busy four threads decoded 3,100 images/s with 8 queues and 19,800 with 32.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

_FIRST = -1


def new_stream(*, comes_first: bool = False) -> "torch.cuda.Stream":
    """A stream of the usual priority, or of one whose kernels start before others'.

    Torch hands out 32 of each priority again and again. A process of ours asks for fewer of the usual one, so that no work
    ends up in a CUDA graph that is captured on the stream beside it.
    """
    import torch

    return torch.cuda.Stream(priority=_FIRST if comes_first else 0)  # type: ignore[no-untyped-call]


def record_event() -> "torch.cuda.Event":
    """An event behind what the current stream has to do. Who waits for it sleeps: a wait that spins takes a core from others."""
    import torch

    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
