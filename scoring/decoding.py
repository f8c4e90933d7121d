"""How images become pixels: which way a run takes, and what one image is when it leaves a feature worker.

Owns the three ways (exact, fast, gpu) and the choice an image at a time between them. Decoding itself is `images.py`'s, the
GPU's part `device_images.py`'s. What a fast way cannot read takes the exact one.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.images import decode_image, transform_image
from scoring.jpeg import hardware_size, plain_file_size
from scoring.resample import can_resize
from scoring.spec import FeatureSpec, ImageModel

Mode = Literal["exact", "fast", "gpu"]

# Forms of an image on its way to the scoring actor.
PIXELS, FRAME, ENCODED = 0, 1, 2

# Larger ones are resized where they are decoded (12 MB on the wire instead of 0.15), and so are strips and specks, whose
# resized size `images.max_pixels` may forbid.
_MAX_FRAME_PIXELS = 4_000_000
_MIN_SIDE, _MAX_RATIO = 16, 8


@dataclass(frozen=True)
class DecodePlan:
    """The run's way. `resizes_on_gpu`: what the worker decodes leaves it unresized; `cpu_share`: under `gpu`, the part of
    the rows that workers decode all the same, so that cores and decoder are both busy (0 to 1)."""

    mode: Mode = "exact"
    resizes_on_gpu: bool = False
    cpu_share: float = 0.0

    @property
    def uses_gpu(self) -> bool:
        return self.mode == "gpu" or self.resizes_on_gpu


def can_use_gpu(spec: FeatureSpec) -> bool:
    """Whether a GPU can prepare this predictor's images: one image model, whose transforms are a resize and a crop."""
    return bool(spec.image) and len(spec.image_models) == 1 and can_resize(spec.image_models[0])


@dataclass(frozen=True)
class Prepared:
    """One image as it leaves a worker: its form, its bytes, and its size where that is not the model's."""

    form: int
    content: bytes
    width: int
    height: int


def prepare(content: bytes, model: ImageModel, plan: DecodePlan, *, on_cpu: bool, max_pixels: int) -> Prepared:
    """An encoded image in the form that the plan asks for. `on_cpu`: this one is of the share that workers decode.

    Raises BadImageError for what Pillow cannot decode either.
    """
    size = hardware_size(content) if plan.mode != "exact" else None
    if size is not None and _is_ordinary(size, max_pixels):
        if plan.mode == "gpu" and not on_cpu:
            return Prepared(ENCODED, content, *size)
        pixels = _prepare_fast(content, model) if plan.mode == "fast" else None
        if pixels is not None:
            return Prepared(PIXELS, pixels, model.size, model.size)
    image = decode_image(content, max_pixels=max_pixels)
    if plan.uses_gpu and _is_ordinary(image.size, max_pixels):
        return Prepared(FRAME, image.tobytes(), image.width, image.height)
    return Prepared(PIXELS, transform_image(image, model, max_pixels=max_pixels), model.size, model.size)


def find_encoded(cells: pa.ChunkedArray, candidates: npt.NDArray[np.bool_], max_pixels: int) -> npt.NDArray[np.int32]:
    """Width, height and bytes (n, 3) of the candidates among binary cells that ship as they are: plain JPEGs.

    Zeros for all others, whose way is `prepare`'s to find. Looks at headers in place: as Python's objects, joined and made
    arrow's again, the bytes of a photograph cost 40 us of a core.
    """
    found = np.zeros((len(cells), 3), dtype=np.int32)
    start = 0
    for chunk in cells.chunks:
        _, offsets_buffer, data = chunk.buffers()
        if data is None:  # nothing but nulls
            start += len(chunk)
            continue
        offsets = np.frombuffer(offsets_buffer, dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        view = memoryview(data).cast("B")  # arrow says signed
        for row, (begin, end) in enumerate(pairwise(offsets.tolist()), start):
            size = plain_file_size(view[begin:end]) if candidates[row] else None
            if size is not None and _is_ordinary(size, max_pixels):
                found[row] = *size, end - begin
        start += len(chunk)
    return found


def _is_ordinary(size: tuple[int, int], max_pixels: int) -> bool:
    shorter, longer = sorted(size)
    return (
        shorter * longer <= min(max_pixels, _MAX_FRAME_PIXELS)
        and shorter >= _MIN_SIDE
        and longer <= _MAX_RATIO * shorter
    )


def _prepare_fast(content: bytes, model: ImageModel) -> bytes | None:
    """Decode and resize with torchvision's 8-bit kernels: within 2 levels of Pillow's. None: it cannot read this one."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional as transforms

    if not can_resize(model):
        return None
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    try:
        image: torch.Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
    size = [model.size] if "resize_shorter_side" in model.transforms else [model.size, model.size]
    image = transforms.resize(image, size, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True)
    image = transforms.center_crop(image, [model.size, model.size])
    return bytes(image.permute(1, 2, 0).contiguous().numpy().data)
