"""Host arrays of many batches on their way to a GPU: one pinned buffer, one copy, and a view of it for each array.

An array at a time, three operations each, took a window's forward 25 copies and the lock of Python 75 times.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 256


def upload(batches: Sequence[Mapping[str, npt.NDArray[Any]]], device: str) -> "list[dict[str, torch.Tensor]]":
    """Each batch's arrays as tensors on `device`, copied on the current stream without waiting for it."""
    import torch

    arrays = [np.ascontiguousarray(array) for batch in batches for array in batch.values()]
    if not arrays:
        return [{} for _ in batches]
    ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays])
    starts = [0, *ends[:-1].tolist()]
    staging = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=device != "cpu")
    memory = staging.numpy()
    for array, start in zip(arrays, starts, strict=True):
        memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    on_device = staging.to(device, non_blocking=True)
    of_type: dict[np.dtype[Any], torch.Tensor] = {}
    tensors = []
    for array, start in zip(arrays, starts, strict=True):
        if array.dtype not in of_type:
            of_type[array.dtype] = on_device.view(torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype)
        strides = [stride // array.itemsize for stride in array.strides]
        tensors.append(torch.as_strided(of_type[array.dtype], array.shape, strides, start // array.itemsize))
    found = iter(tensors)
    return [{name: next(found) for name in batch} for batch in batches]
