"""Which captured graphs are refused, asked of a driver that is told what is in them. `-m gpu` captures real ones."""

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest

from scoring.engines.graphs import UnfitGraphError, refuse_unfit

KERNEL, MEMCPY, HOST_CALL = 0, 1, 3
ON_HOST, ON_DEVICE, UNIFIED = 1, 2, 4
DEVICE_ADDRESS, PINNED_ADDRESS, PLAIN_ADDRESS = 0x7F0000000000, 0x7E0000000000, 0x5500


class Driver:
    """In libcuda's place: a graph of `nodes`, each a kind, and for a copy the source's memory type and address."""

    def __init__(self, nodes: Sequence[tuple[int, int, int]], status: int = 0) -> None:
        self.nodes, self.status = nodes, status

    def cuGraphGetNodes(self, graph: Any, into: Any, num: Any) -> int:  # noqa: N802
        assert graph.value == 4711
        num._obj.value = len(self.nodes)
        for place in range(len(self.nodes) if into is not None else 0):
            into[place] = place + 1
        return self.status

    def cuGraphNodeGetType(self, node: Any, into: Any) -> int:  # noqa: N802
        into._obj.value = self.nodes[node.value - 1][0]
        return 0

    def cuGraphMemcpyNodeGetParams(self, node: Any, into: Any) -> int:  # noqa: N802
        # cuda.h: CUDA_MEMCPY3D, word by word.
        assert ctypes.sizeof(into._obj) == 200
        words = (ctypes.c_uint64 * 25).from_buffer(into._obj)
        _, kind, address = self.nodes[node.value - 1]
        words[4] = kind
        words[5 if kind == ON_HOST else 6] = address
        return 0

    def cuPointerGetAttribute(self, into: Any, attribute: int, address: Any) -> int:  # noqa: N802
        assert attribute == 2
        if address.value == PLAIN_ADDRESS:
            return 1
        into._obj.value = ON_HOST if address.value == PINNED_ADDRESS else ON_DEVICE
        return 0


@pytest.mark.parametrize(
    "copy", [(MEMCPY, ON_DEVICE, DEVICE_ADDRESS), (MEMCPY, UNIFIED, DEVICE_ADDRESS), (KERNEL, 0, 0)]
)
def test_a_graph_that_stays_on_the_device_is_kept(copy: tuple[int, int, int]) -> None:
    refuse_unfit(4711, Driver([(KERNEL, 0, 0), copy]))


@pytest.mark.parametrize(
    ("node", "why"),
    [
        ((MEMCPY, ON_HOST, PINNED_ADDRESS), "copies from the host"),
        ((MEMCPY, UNIFIED, PINNED_ADDRESS), "copies from the host"),
        ((MEMCPY, UNIFIED, PLAIN_ADDRESS), "copies from the host"),
        ((HOST_CALL, 0, 0), "calls the host"),
    ],
)
def test_one_that_reads_the_host_is_refused(node: tuple[int, int, int], why: str) -> None:
    with pytest.raises(UnfitGraphError, match=why):
        refuse_unfit(4711, Driver([(KERNEL, 0, 0), node]))


def test_one_that_the_driver_does_not_tell_about_is_refused() -> None:
    with pytest.raises(UnfitGraphError, match="status 3"):
        refuse_unfit(4711, Driver([(KERNEL, 0, 0)], status=3))
