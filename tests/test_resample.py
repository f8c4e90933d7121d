"""The GPU's resize against Pillow's, on the CPU: Triton's interpreter runs the same kernels. Bit for bit.

In a process of its own: whether Triton interprets is decided when it is imported.
"""

import json

import pytest

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
    from scoring.resample import OVERREAD, Frames, can_resize, resize_frames
    from scoring.spec import ImageModel

    model = ImageModel("image", 16, (0.5,) * 3, (0.5,) * 3, tuple(transforms.split("+")), 1)
    assert can_resize(model)
    rng = np.random.default_rng(0)
    # A padded line, as decoders leave it: 7 bytes more than the pixels.
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in SIZES]
    lines = [np.pad(image.reshape(len(image), -1), ((0, 0), (0, 7))) for image in images]
    # Any address: the first begins a word, the others 1 to 3 bytes later.
    memory = [np.pad(part.ravel(), (place % 4, OVERREAD), constant_values=255) for place, part in enumerate(lines)]
    starts = [part.ctypes.data_as(ctypes.c_void_p).value or 0 for part in memory]
    frames = Frames(
        addresses=np.array([start + place % 4 for place, start in enumerate(starts)], dtype=np.int64),
        pitches=np.array([part.shape[1] for part in lines], dtype=np.int64),
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


TYPES = {"addresses": "*i64", "pitches": "*i64", "heights": "*i64", "starts": "*i64", "slots": "*i64"}
TYPES |= {"in_sizes": "*i64", "out_sizes": "*i64", "first": "*i32", "count": "*i32", "weights": "*i32"}
TYPES |= {"taps": "i32", "size": "i32", "out": "*u8", "rows": "*u8"}


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from scoring import kernels

    for kernel in (kernels.resize_weights, kernels.resize_rows, kernels.resize_columns):
        types = {name: TYPES.get(name, "constexpr") for name in kernel.arg_names}
        sizes = {(kernel.arg_names.index(name),): 64 for name, kind in types.items() if kind == "constexpr"}
        compiled = triton.compile(ASTSource(kernel, types, sizes), target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]


if __name__ == "__main__":
    print(json.dumps({way: compare(way) for way in WAYS}))
