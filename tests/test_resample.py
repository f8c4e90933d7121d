"""The GPU's resize against Pillow's, on the CPU: Triton's interpreter runs the same kernels. Bit for bit.

In a process of its own: whether Triton interprets is decided when it is imported.
"""

import json

from tests.interpreted import run_interpreted

# Larger, smaller and as large as the model's, upright and lying, odd and even; few, as the interpreter takes a second each.
SIZES = ((75, 50), (33, 90), (16, 16), (10, 13), (41, 17))

WAYS = ("resize_shorter_side+center_crop", "resize_to_square")


def compare(transforms: str) -> dict[str, int]:
    """{height x width: values that differ from Pillow's}, and what is left of a place that got no image."""
    import ctypes

    import numpy as np
    import PIL.Image
    import torch

    from scoring.images import transform_image
    from scoring.resample import Frames, can_resize, resize_frames
    from scoring.spec import ImageModel

    model = ImageModel("image", 16, (0.5,) * 3, (0.5,) * 3, tuple(transforms.split("+")), 1)
    assert can_resize(model)
    rng = np.random.default_rng(0)
    # A padded line, as decoders leave it: 7 bytes more than the pixels.
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in SIZES]
    memory = [np.pad(image.reshape(len(image), -1), ((0, 0), (0, 7))) for image in images]
    frames = Frames(
        addresses=np.array([line.ctypes.data_as(ctypes.c_void_p).value for line in memory], dtype=np.int64),
        pitches=np.array([line.shape[1] for line in memory], dtype=np.int64),
        widths=np.array([image.shape[1] for image in images], dtype=np.int64),
        heights=np.array([image.shape[0] for image in images], dtype=np.int64),
    )
    out = torch.full((len(images) + 1, 16, 16, 3), 7, dtype=torch.uint8)
    slots = np.arange(len(images))[::-1].copy()
    resize_frames(frames, model, slots, out)
    found = {}
    for image, slot in zip(images, slots, strict=True):
        wanted = transform_image(PIL.Image.fromarray(image), model, max_pixels=10**9)
        found[f"{image.shape[0]}x{image.shape[1]}"] = int(
            (np.frombuffer(wanted, dtype=np.uint8) != out[slot].numpy().reshape(-1)).sum()
        )
    return {**found, "untouched": int((out[-1] != 7).sum())}


def test_every_pixel_is_pillows() -> None:
    found = run_interpreted("tests.test_resample")
    differing = {**{f"{height}x{width}": 0 for height, width in SIZES}, "untouched": 0}
    assert found == dict.fromkeys(WAYS, differing)


if __name__ == "__main__":
    print(json.dumps({way: compare(way) for way in WAYS}))
