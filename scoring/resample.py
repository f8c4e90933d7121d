"""Pillow's bicubic resize and the centre crop on a GPU, for images that lie anywhere in its memory, bit for bit.

Owns the weights, which are Pillow's own sums in float64 (Resample.c, precompute_coeffs and normalize_coeffs_8bpc), and the
geometry of the predictor's transforms. The sums over pixels are `kernels.py`'s, in Pillow's 32-bit integers; as matrix
products in float64 they would cost 27 us an image, and only where a card has units for them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from scoring.spec import ImageModel

if TYPE_CHECKING:
    import torch

_SUPPORT = 2.0  # bicubic's, in source pixels at scale 1
_BITS = 22
_BLOCK_Y, _BLOCK_X = 8, 64

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
    """RGB images of any size in one device's memory: address, bytes a row, width and height of each, (n,) int64."""

    addresses: Sizes
    pitches: Sizes
    widths: Sizes
    heights: Sizes

    def __len__(self) -> int:
        return len(self.addresses)

    def take(self, chosen: npt.NDArray[np.bool_]) -> "Frames":
        """Those of the mask."""
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
        addresses, pitches, in_heights, starts_, x_first, x_count, x_weights, x_weights.shape[2], rows, size,
        BLOCK_Y=_BLOCK_Y, BLOCK_X=_BLOCK_X,
    )  # fmt: skip
    block = 1 << (size * 3 - 1).bit_length()
    resize_columns[(len(frames), size)](
        rows, starts_, y_first, y_count, y_weights, y_weights.shape[2], slots_, out, size, BLOCK=block
    )


def _taps(in_sizes: Sizes, out_sizes: Sizes) -> int:
    """Pillow's ksize for the largest scale of a batch."""
    scale = max(1.0, float((in_sizes / out_sizes).max()))
    return int(np.ceil(_SUPPORT * scale)) * 2 + 1


def _weights(
    in_sizes: "torch.Tensor", out_sizes: "torch.Tensor", size: int, taps: int
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """First source pixel, count (n, size) and weights (n, size, taps), int32, of each output pixel of the centre crop.

    One operation a line and never a fused one: the float64 rounding is Pillow's then.
    """
    import torch

    in_sizes, out_sizes = in_sizes[:, None], out_sizes[:, None]
    # Python's round: half to even, as torchvision's center_crop has it.
    offset = torch.round((out_sizes - size).double() / 2.0)
    scale = in_sizes.double() / out_sizes.double()
    filter_scale = torch.clamp(scale, min=1.0)
    support = filter_scale * _SUPPORT
    center = (torch.arange(size, device=in_sizes.device).double() + offset + 0.5) * scale
    low = (center - support + 0.5).long().clamp(min=0)
    high = torch.minimum((center + support + 0.5).long(), in_sizes)
    places = torch.arange(taps, device=in_sizes.device)
    is_used = places < (high - low)[..., None]
    distance = (places + low[..., None]).double() - center[..., None] + 0.5
    distance = distance * (1.0 / filter_scale)[..., None]
    weights = torch.where(is_used, _bicubic(distance), 0.0)
    total = torch.zeros_like(center)
    for tap in range(taps):
        total = total + weights[..., tap]
    weights = torch.where(total[..., None] != 0.0, weights / total[..., None], weights)
    scaled = weights * float(1 << _BITS)
    rounded = torch.where(weights < 0, scaled - 0.5, scaled + 0.5).int()
    return low.int().contiguous(), (high - low).int().contiguous(), rounded.contiguous()


def _bicubic(x: "torch.Tensor") -> "torch.Tensor":
    """Pillow's bicubic_filter with a = -0.5, in its order of operations."""
    import torch

    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))
