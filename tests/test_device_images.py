"""The GPU's part of image preparation, on the CPU: Triton's interpreter for its kernels, Pillow in the decoder's place.

In a process of its own, as in `test_resample.py`.
"""

import ctypes
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pyarrow as pa
import pytest

from scoring import device_images
from scoring.columns import MARK_FIELDS, SOURCE_ROW
from scoring.config import ImagesConfig
from scoring.decoding import DecodePlan
from scoring.features import FeatureBuilder
from scoring.images import ImageFetcher
from scoring.resample import Frames, Sizes
from scoring.spec import FeatureSpec, ImageColumn, ImageModel
from tests.interpreted import run_interpreted
from tests.test_decoding import jpeg, picture, png

MODEL = ImageModel("image", 16, (0.5,) * 3, (0.5,) * 3, ("resize_shorter_side", "center_crop"), 2)
# Small, and few: Triton's interpreter takes a second an image.
GOOD = (jpeg(picture(30, 40)), jpeg(picture(41, 26)), png(picture(24, 20)), jpeg(picture(40, 30))[:-60])


class PillowDecoder:
    """In the hardware decoder's place: what Pillow reads, nothing where it is told to fail."""

    def __init__(self, fails_on: Sequence[bytes]) -> None:
        self._fails_on = frozenset(fails_on)
        self.asked = 0
        self.orders: list[int] = []

    def decode(
        self, addresses: Sizes, lengths: Sizes, frames: Frames, stream: object, order: int
    ) -> npt.NDArray[np.bool_]:
        self.asked += len(frames)
        self.orders.append(order)
        contents = [ctypes.string_at(*where) for where in zip(addresses.tolist(), lengths.tolist(), strict=True)]
        for content, address, width, height in zip(
            contents, frames.addresses.tolist(), frames.widths.tolist(), frames.heights.tolist(), strict=True
        ):
            with PIL.Image.open(io.BytesIO(content)) as image:
                assert image.size == (width, height)
                pixels = image.convert("RGB").tobytes()
            if content not in self._fails_on:
                ctypes.memmove(address, pixels, len(pixels))
        return np.array([content not in self._fails_on for content in contents], dtype=bool)


def features_of(rows: Sequence[Sequence[bytes | None]], plan: DecodePlan) -> pa.Table:
    spec = FeatureSpec(
        "y", "binary", (0, 1), (), (), (), (ImageColumn("Images", "image_bytearray"),), (), (), (), (MODEL,), False
    )
    cells = pa.array([list(row) for row in rows], pa.list_(pa.binary()))
    columns = {"model:Images": cells, SOURCE_ROW: pa.array(range(len(rows)), pa.int64())}
    marks = {field.name: pa.nulls(len(rows), field.type) for field in MARK_FIELDS}
    return FeatureBuilder(spec, ImageFetcher(ImagesConfig(base="/")), plan)(pa.table({**columns, **marks}))


def compare() -> dict[str, Any]:
    """What each way makes of the same rows, against the workers' own exact pixels."""
    from scoring.collate import collate
    from scoring.device_images import ImageStage

    rows: list[list[bytes | None]] = [[content] for content in GOOD]
    rows += [[GOOD[0], GOOD[1]], [None], [None, GOOD[1]], [GOOD[0], GOOD[2]]]
    exact = features_of(rows, DecodePlan())
    spec_free = collate(exact, _spec())["image:pixels"]
    found: dict[str, Any] = {}
    for name, plan in (
        ("frames", DecodePlan("exact", resizes_on_gpu=True)),
        ("encoded", DecodePlan("gpu", resizes_on_gpu=True)),
        ("shared", DecodePlan("gpu", resizes_on_gpu=True, cpu_share=0.5)),
        ("pixels", DecodePlan()),
    ):
        table = features_of(rows, plan)
        # Two chunks: what arrives at the actor is several blocks.
        table = pa.concat_tables([table.slice(0, 3), table.slice(3)])
        decoder = PillowDecoder(fails_on=[GOOD[1]])
        stage = ImageStage(MODEL, "cpu", decoder, max_pixels=10**8)
        images, bad = stage.load(table)
        order = np.arange(len(rows))[::-1].copy()
        pixels = images.take(order, 2).numpy()[::-1]
        found[name] = {"differing": int((pixels != spec_free).sum()), "bad": len(bad), "decoded": decoder.asked}
    # Pillow refuses it as well where the limit is lower than the worker's was.
    decoder = PillowDecoder(fails_on=[GOOD[1]])
    stage = ImageStage(MODEL, "cpu", decoder, max_pixels=1_000)
    table = features_of([[GOOD[0]], [GOOD[1]], [GOOD[0]]], DecodePlan("gpu", resizes_on_gpu=True))
    images, bad = stage.load(table)
    found["refused"] = {
        "forms": table["feat:image:form"].to_pylist(),
        "bad": {row: error.reason for row, error in bad.items()},
        "left": int(images.take(np.array([1]), 1).sum()),
    }
    device_images._DECODED_AT_ONCE = 2
    stage.load(table)
    found["orders"] = decoder.orders
    return found


def _spec() -> FeatureSpec:
    column = ImageColumn("Images", "image_bytearray")
    return FeatureSpec("y", "binary", (0, 1), (), (), (), (column,), (), (), (), (MODEL,), False)


def test_images_are_decoded_together_as_far_as_a_buffer_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_images, "BUFFER_BYTES", 1_000)
    monkeypatch.setattr(device_images, "_DECODED_AT_ONCE", 3)
    sizes = np.array([400, 600, 1, 2_000, 500, 500, 10, 10, 10, 10])
    chunks = [list(sizes[chunk]) for chunk in device_images._chunks(sizes)]
    # One that is too large has a buffer of its own; never more than three.
    assert chunks == [[400, 600], [1], [2_000], [500, 500], [10, 10, 10], [10]]
    assert list(device_images._chunks(sizes[:0])) == []


def test_every_way_gives_the_same_pixels_and_what_the_decoder_cannot_read_goes_to_pillow() -> None:
    found = run_interpreted("tests.test_device_images")
    for name in ("frames", "encoded", "shared", "pixels"):
        assert (found[name]["differing"], found[name]["bad"]) == (0, 0), name
    # Two plain JPEGs alone, two rows of two, one beside a missing one; not the row that a PNG shares.
    assert found["encoded"]["decoded"] == 5
    assert 0 < found["shared"]["decoded"] < 5
    assert found["frames"]["decoded"] == found["pixels"]["decoded"] == 0
    assert found["orders"] == [0, 1, 1], "a table that came first goes first, all its images"
    assert found["refused"] == {"forms": [2, 2, 2], "bad": {"1": "image_too_large"}, "left": 0}


if __name__ == "__main__":
    print(json.dumps(compare()))
