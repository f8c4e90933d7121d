"""CUDA graphs of a forward: what they replay is what a plain run computes, and one thread captures them all."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from scoring.engines.graphs import Graphs
from scoring.streams import new_stream

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.gpu


def test_one_thread_captures_what_several_threads_run() -> None:
    import torch

    callers: set[int] = set()

    def run(tensors: "list[torch.Tensor]") -> "torch.Tensor":
        callers.add(threading.get_ident())
        return tensors[0] * 2 + tensors[1].sum(dim=1, keepdim=True)

    graphs = Graphs(run)

    def score(rows: int) -> float:
        tensors = [torch.rand(rows, 3, device="cuda"), torch.rand(rows, 5, device="cuda")]
        stream = new_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = graphs(tensors).clone()
        stream.synchronize()
        wanted = tensors[0] * 2 + tensors[1].sum(dim=1, keepdim=True)
        return float((found - wanted).abs().max())

    for rows in (4, 8, 4, 8):  # the second time replayed, from another thread
        with ThreadPoolExecutor(max_workers=1) as pool:
            assert pool.submit(score, rows).result() < 1e-6
    assert len(callers) == 1
    assert threading.get_ident() not in callers
    graphs.clear()
