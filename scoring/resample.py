"""Pillow's bicubic resize and the centre crop on a GPU, for images that lie anywhere in its memory, bit for bit.

Owns the geometry of the predictor's transforms. The weights are `kernels.py`'s, Pillow's own sums in float64, and the sums
over pixels, in Pillow's 32-bit integers; as matrix products in float64 those would cost 27 us an image, and only where a card
has units for them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scoring.spec import ImageModel

if TYPE_CHECKING:
    import torch

# Four taps are read at a time, as aligned words: what lies behind an image counts for nothing, but is read.
OVERREAD = 16
_SUPPORT = 2.0  # bicubic's, in source pixels at scale 1
# One output pixel a thread: on an H100 512 images took 0.54 ms this way, with two a thread 0.72, with four 1.48. Programs are
# numbered by image first, so that those which run at once are at different ones: along each image they took 0.72.
_BLOCK_Y, _BLOCK_X = 4, 32
_WEIGHTS_BLOCK = 64

Sizes = npt.NDArray[np.int64]


def can_resize(model: ImageModel) -> bool:
    """Whether the model's transforms are a bicubic resize to one square, cropped or not."""
    return model.transforms in {
        ("resize_to_square",),
        ("resize_to_square", "center_crop"),
        ("resize_shorter_side", "center_crop"),
    }


@dataclass(frozen=True)
class Frames:
    """RGB images of any size in one device's memory: address, bytes a row, width and height of each, (n,) int64.

    OVERREAD bytes behind each can be read.
    """

    addresses: Sizes
    pitches: Sizes
    widths: Sizes
    heights: Sizes

    def __len__(self) -> int:
        return len(self.addresses)

    def take(self, chosen: npt.NDArray[Any]) -> "Frames":
        """Some of them, by place or by mask."""
        return Frames(self.addresses[chosen], self.pitches[chosen], self.widths[chosen], self.heights[chosen])


def target_sizes(model: ImageModel, widths: Sizes, heights: Sizes) -> tuple[Sizes, Sizes]:
    """Width and height after the resize and before the crop; torchvision's rule cuts the longer side to an int."""
    if "resize_shorter_side" not in model.transforms:
        return np.full_like(widths, model.size), np.full_like(heights, model.size)
    shorter, longer = np.minimum(widths, heights), np.maximum(widths, heights)
    other = (model.size * longer / shorter).astype(np.int64)
    is_tall = widths <= heights
    return np.where(is_tall, model.size, other), np.where(is_tall, other, model.size)


def resize_frames(frames: Frames, model: ImageModel, slots: Sizes, out: "torch.Tensor") -> None:
    """Write image i of `frames`, resized and cropped, to `out[slots[i]]` (m, size, size, 3) uint8.

    Runs on the current stream without waiting for it; the frames must stay until it is done.
    """
    import torch

    from scoring.kernels import resize_columns, resize_rows

    if not len(frames):
        return
    device, size = out.device, model.size
    widths, heights = target_sizes(model, frames.widths, frames.heights)
    # Pillow sums rows first; its half-way image is never wider than the crop needs.
    starts = np.cumsum(frames.heights) - frames.heights
    table = np.stack([frames.addresses, frames.pitches, frames.heights, starts, slots, frames.widths, widths, heights])
    host = torch.from_numpy(np.ascontiguousarray(table))
    on_device = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
    addresses, pitches, in_heights, starts_, slots_, in_widths, out_widths, out_heights = on_device
    x_first, x_count, x_weights = _weights(in_widths, out_widths, size, _taps(frames.widths, widths))
    y_first, y_count, y_weights = _weights(in_heights, out_heights, size, _taps(frames.heights, heights))
    rows = torch.empty((int(frames.heights.sum()), size, 3), dtype=torch.uint8, device=device)
    grid = (len(frames), -(-int(frames.heights.max()) // _BLOCK_Y), -(-size // _BLOCK_X))
    resize_rows[grid](
        addresses, pitches, in_heights, starts_, x_first, x_count, x_weights, x_weights.shape[1], rows, size,
        BLOCK_Y=_BLOCK_Y, BLOCK_X=_BLOCK_X,
    )  # fmt: skip
    block = 1 << (size * 3 - 1).bit_length()
    resize_columns[(len(frames), size)](
        rows, starts_, y_first, y_count, y_weights, y_weights.shape[1], slots_, out, size, BLOCK=block
    )


def _taps(in_sizes: Sizes, out_sizes: Sizes) -> int:
    """Pillow's ksize for the largest scale of a batch, and as many more as `resize_rows` reads at a time."""
    scale = max(1.0, float((in_sizes / out_sizes).max()))
    ksize = int(np.ceil(_SUPPORT * scale)) * 2 + 1
    return -(-ksize // 4) * 4


def _weights(
    in_sizes: "torch.Tensor", out_sizes: "torch.Tensor", size: int, taps: int
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """First source pixel, count (n, size) and weights (n, taps, size), int32, of each output pixel of the centre crop."""
    import torch

    from scoring.kernels import resize_weights

    num, device = len(in_sizes), in_sizes.device
    first, count = torch.empty((2, num, size), dtype=torch.int32, device=device)
    weights = torch.empty((num, taps, size), dtype=torch.int32, device=device)
    # One launch: as torch's operations it was 110, for each of which Python's lock is let go and waited for.
    resize_weights[(num, -(-size // _WEIGHTS_BLOCK))](
        in_sizes, out_sizes, first, count, weights, taps, size, BLOCK=_WEIGHTS_BLOCK, enable_fp_fusion=False
    )
    return first, count, weights
