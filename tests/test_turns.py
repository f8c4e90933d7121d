"""Places that threads take in the order of their work."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from scoring.turns import Turns


def test_the_lowest_number_is_next_whoever_asked_first() -> None:
    turns, order = Turns(1), []

    def work(number: int) -> None:
        with turns.take(number):
            order.append(number)

    with ThreadPoolExecutor(5) as threads, turns.take(0):
        for number in (5, 2, 4, 1, 3):
            threads.submit(work, number)
        while len(turns._waiting) < 5:
            time.sleep(0.001)
    assert order == [1, 2, 3, 4, 5]


def test_as_many_at_once_as_there_are_places_and_no_more() -> None:
    turns, lock, inside, most = Turns(3), threading.Lock(), 0, 0

    def work(number: int) -> None:
        nonlocal inside, most
        for _ in range(20):
            with turns.take(number):
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.001)
                with lock:
                    inside -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert (inside, most) == (0, 3)


def test_a_place_comes_back_from_a_block_that_fails() -> None:
    turns = Turns(1)
    with pytest.raises(ValueError, match="no"), turns.take(1):
        raise ValueError("no")
    with turns.take(2):
        pass
