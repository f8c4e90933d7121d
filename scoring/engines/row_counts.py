"""Row counts with a plan: cuDNN looks for a kernel for each convolution and row count, 2 s a count for MobileNet on an H100.

Owns which count an engine of images plans for first, when others follow, and how batches of a count without a plan go through.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from scoring.engines.base import repeat_last

if TYPE_CHECKING:
    import torch

PLANNED_AFTER_ROWS = 98_304
"""Others than the first are planned for then: the first parts (20,000 rows) are written before. After 24,576 rows the plan held
the first score back by 3 s; after 65,536 the first three parts still landed together, behind it. Not later than that takes: until
then batches run at 4/5 of their rate."""


def plan_first(counts: Sequence[int]) -> int:
    """128 of 512: at 4/5 of the rate of 512, and the most rows that the longest texts leave a batch."""
    return counts[max(0, len(counts) - 3)]


def choose_count(rows: int, planned: Collection[int]) -> int:
    """The rows of each part of a batch: the least work, in the fewest parts."""
    return min(planned, key=lambda count: (-(-rows // count) * count, -count))


def run_in_parts(
    run: "Callable[[list[torch.Tensor]], torch.Tensor]", tensors: "list[torch.Tensor]", planned: Collection[int]
) -> "torch.Tensor":
    """A batch through `run`, which takes batches of the `planned` counts: in parts, the last one padded, where it is of another.

    `run` returns tensors of its own, not the next call's.
    """
    import torch

    rows = len(tensors[0])
    if rows in planned:
        return run(tensors)
    count = choose_count(rows, planned)
    parts = [[tensor[start : start + count] for tensor in tensors] for start in range(0, rows, count)]
    return torch.cat([run(_fill(part, count))[: len(part[0])] for part in parts])


def _fill(tensors: "list[torch.Tensor]", rows: int) -> "list[torch.Tensor]":
    """Tensors of fewer rows grown to `rows`, their last one repeated."""
    missing = rows - len(tensors[0])
    return [repeat_last(tensor, missing) for tensor in tensors] if missing else tensors
