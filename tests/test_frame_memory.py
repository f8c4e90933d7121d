"""Buffers that a decoder writes to at once: none is lent while the device may still use it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from scoring.frame_memory import FrameMemory


@dataclass
class Events:
    """A device's events: each knows whether it has been waited for."""

    waited: list[bool] = field(default_factory=list)

    def record(self) -> "Event":
        self.waited.append(False)
        return Event(self, len(self.waited) - 1)


@dataclass
class Event:
    events: Events
    number: int

    def synchronize(self) -> None:
        self.events.waited[self.number] = True


@pytest.fixture
def events() -> Events:
    return Events()


def allocate(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def test_a_buffer_comes_back_after_the_other_one_and_when_its_readers_are_done(events: Events) -> None:
    memory = FrameMemory(allocate, events.record, 1_000)
    lent: list[int] = []
    for number in range(6):
        with memory.lend(700) as buffer:
            assert len(buffer) >= 700
            # What the stream was given while it was last lent has been waited for.
            assert all(waited for before, waited in zip(lent, done(events), strict=True) if before == buffer.data_ptr())
            lent.append(buffer.data_ptr())
        assert len(done(events)) == number + 1
    assert lent[:2] * 3 == lent
    assert lent[0] != lent[1]


def done(events: Events) -> list[bool]:
    """The events behind what was lent: the first two are of memory that was new."""
    return events.waited[1:2] + events.waited[3:]


def test_new_memory_is_waited_for_and_a_larger_one_replaces_it(events: Events) -> None:
    memory = FrameMemory(allocate, events.record, 1_000)
    with memory.lend(10) as buffer:
        assert len(buffer) == 1_000
        assert events.waited == [True]
    with memory.lend(10):
        pass
    with memory.lend(5_000) as buffer:
        assert len(buffer) == 5_000
        # That of the first time, and the new one's own.
        assert (events.waited[1], events.waited[-1]) == (True, True)


def test_what_fails_in_the_block_is_waited_for_as_well(events: Events) -> None:
    memory = FrameMemory(allocate, events.record, 1_000)
    with pytest.raises(ValueError, match="no"), memory.lend(10):
        raise ValueError("no")
    assert events.waited == [True, False]


def test_threads_have_buffers_of_their_own(events: Events) -> None:
    memory = FrameMemory(allocate, events.record, 1_000)

    def address() -> int:
        with memory.lend(10) as buffer:
            return buffer.data_ptr()

    with memory.lend(10) as mine, ThreadPoolExecutor(max_workers=1) as pool:
        others = {pool.submit(address).result() for _ in range(3)}
        assert len(others) == 2
        assert mine.data_ptr() not in others
