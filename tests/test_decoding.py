"""Which way an image takes, and what the ways have in common: no image is lost, none is read wrongly."""

import io
from typing import Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import PIL.Image
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scoring import features
from scoring.columns import MARK_FIELDS, SOURCE_ROW
from scoring.config import ImagesConfig
from scoring.decoding import ENCODED, FRAME, PIXELS, DecodePlan, Prepared, prepare
from scoring.features import FeatureBuilder, share_of_rows
from scoring.images import BadImageError, ImageFetcher, prepare_image
from scoring.jpeg import hardware_size, pillow_size, plain_file_size, plain_size
from scoring.spec import FeatureSpec, ImageColumn, ImageModel

MODEL = ImageModel("image", 64, (0.5,) * 3, (0.5,) * 3, ("resize_shorter_side", "center_crop"), 1)
GPU = DecodePlan("gpu", resizes_on_gpu=True, cpu_share=0.5)
MAX_PIXELS = 10**8


def picture(width: int = 120, height: int = 90) -> PIL.Image.Image:
    """A smooth picture: JPEG keeps it, and a resize has something to do."""
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 4, height))
    channels = [np.sin(x) * np.cos(y), np.cos(x + y), np.sin(x * y / 3)]
    return PIL.Image.fromarray((np.stack(channels, axis=-1) * 100 + 128).astype(np.uint8))


def jpeg(image: PIL.Image.Image | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    (image or picture()).save(out, "JPEG", **options)
    return out.getvalue()


def png(image: PIL.Image.Image | None = None) -> bytes:
    out = io.BytesIO()
    (image or picture()).save(out, "PNG")
    return out.getvalue()


def adobe_rgb() -> bytes:
    """A JPEG whose Adobe marker says that no colour conversion was made."""
    content = jpeg()
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    return content[:2] + marker + content[2:]


UNUSUAL = {
    "progressive": jpeg(progressive=True),
    "gray": jpeg(picture().convert("L")),
    "cmyk": jpeg(picture().convert("CMYK")),
    "png": png(),
    "cut off": jpeg()[:-200],
    "bytes after the end": jpeg() + b"\0\0",
    "adobe rgb": adobe_rgb(),
}


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_plain_jpegs_go_to_the_hardware_decoder_as_they_are(subsampling: int) -> None:
    content = jpeg(subsampling=subsampling)
    assert hardware_size(content) == (120, 90)
    assert prepare(content, MODEL, GPU, on_cpu=False, max_pixels=MAX_PIXELS) == Prepared(ENCODED, content, 120, 90)


@pytest.mark.parametrize("name", UNUSUAL)
def test_anything_else_is_decoded_by_pillow(name: str) -> None:
    content = UNUSUAL[name]
    assert hardware_size(content) is None
    prepared = prepare(content, MODEL, GPU, on_cpu=False, max_pixels=MAX_PIXELS)
    assert prepared.form == FRAME
    assert (prepared.width, prepared.height, len(prepared.content)) == (120, 90, 120 * 90 * 3)
    fast = prepare(content, MODEL, DecodePlan("fast"), on_cpu=False, max_pixels=MAX_PIXELS)
    assert fast.content == prepare_image(content, MODEL, max_pixels=MAX_PIXELS)


def test_headers_that_end_too_soon_are_no_jpeg() -> None:
    content = jpeg()
    for end in range(2, 200):
        assert hardware_size(content[:end] + b"\xff\xd9") in (None, (120, 90))
    assert hardware_size(b"") is None
    assert hardware_size(b"\xff\xd8\xff\xd9") is None


SOUND = (jpeg(), jpeg(subsampling=0, dpi=(72, 72)), jpeg(subsampling=1, comment=b"a picture", restart_marker_blocks=4))


@pytest.mark.parametrize("content", SOUND, ids=["4:2:0", "4:4:4", "4:2:2"])
def test_pillow_is_not_asked_about_plain_files(content: bytes) -> None:
    assert plain_size(content) == (120, 90)


@given(
    st.sampled_from(SOUND),
    st.lists(
        st.tuples(st.integers(2, 640), st.one_of(st.integers(0, 255), st.sampled_from((0xFF, 0xDA, 0xC0, 0)))),
        max_size=4,
    ),
    st.one_of(st.none(), st.tuples(st.integers(2, 640), st.integers(0, 40))),
)
@example(SOUND[0], [(163, 0), (164, 0)], None)  # no height
def test_what_looks_plain_is_what_pillow_says_it_is(
    content: bytes, changes: list[tuple[int, int]], cut: tuple[int, int] | None
) -> None:
    changed = bytearray(content)
    for place, value in changes:
        changed[place] = value
    if cut is not None:
        del changed[cut[0] : cut[0] + cut[1]]
    assert plain_size(bytes(changed)) in (None, pillow_size(bytes(changed)))
    if changed.endswith(b"\xff\xd9"):
        assert plain_file_size(memoryview(changed)) in (None, plain_size(bytes(changed)))


def test_a_known_header_gives_each_file_its_own_size() -> None:
    for content in (*SOUND, *SOUND):
        assert plain_file_size(memoryview(content)) == (120, 90)
    assert plain_file_size(memoryview(jpeg(picture(90, 120)))) == (90, 120)
    no_height = bytearray(SOUND[0])
    no_height[163:165] = b"\0\0"
    assert plain_file_size(memoryview(no_height)) is None
    # A comment that looks like the frame: what it says is not the size, whatever was seen before.
    for width in (1, 2, 3):
        fake = b"\xff\xc0\0\x11\x08\0\x07\0" + bytes([width])
        assert plain_file_size(memoryview(jpeg(comment=fake))) == (120, 90)
    assert plain_file_size(memoryview(jpeg(comment=b"long" * 300))) is None, "left to who reads the whole file"


def image_table(cells: list[bytes | None]) -> pa.Table:
    """Rows as feature workers get them, the image column in three chunks, one of them a slice."""
    third = len(cells) // 3
    chunks = [pa.array(cells[:third], pa.binary()), pa.array([b"before", *cells[third : 2 * third]], pa.binary())[1:]]
    marks = {field.name: pa.nulls(len(cells), field.type) for field in MARK_FIELDS}
    column = pa.chunked_array([*chunks, pa.array(cells[2 * third :], pa.binary())])
    return pa.table({"model:Images": column, SOURCE_ROW: pa.array(range(len(cells)), pa.int64()), **marks})


def test_cells_that_ship_as_they_are_ship_as_when_each_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    usual: list[bytes | None] = [jpeg(picture(90 + i, 100), quality=80 + i) for i in range(9)]
    odd = [*UNUSUAL.values(), None, b"", b"no image", jpeg(picture(700, 80)), jpeg(comment=b"long" * 300)]
    column = ImageColumn("Images", "image_bytearray")
    spec = FeatureSpec("y", "binary", (0, 1), (), (), (), (column,), (), (), (), (MODEL,), False)
    fetcher = ImageFetcher(ImagesConfig(base="/", max_pixels=MAX_PIXELS))
    whole = DecodePlan("gpu", resizes_on_gpu=True)
    for cells, plan in (
        (usual, whole),
        ([*usual, None], whole),
        ([*usual, *odd, *usual], whole),
        ([*usual, *odd], GPU),
    ):
        table, looked_at = image_table(cells), Mock(wraps=prepare)
        monkeypatch.setattr(features, "prepare", looked_at)
        at_once = FeatureBuilder(spec, fetcher, plan)(table)
        assert looked_at.call_count <= len(cells) - len(usual) // 3
        looked_at.reset_mock()
        with monkeypatch.context() as patches:
            patches.setattr(features, "find_encoded", lambda cells, *_: np.zeros((len(cells), 3), dtype=np.int32))
            one_by_one = FeatureBuilder(spec, fetcher, plan)(table)
        assert looked_at.call_count >= len(usual)
        assert at_once.column_names == one_by_one.column_names
        for name in at_once.column_names:
            assert at_once[name].to_pylist() == one_by_one[name].to_pylist(), name
    missing = table.set_column(0, "model:Images", pa.nulls(table.num_rows, pa.binary()))
    assert set(FeatureBuilder(spec, fetcher, whole)(missing)["feat:image:valid_num"].to_pylist()) == {0}


def test_cells_ship_from_where_they_lie_also_beside_rows_without_an_image() -> None:
    cells: list[bytes | None] = [None, jpeg(picture(90, 100)), None, jpeg(picture(91, 100)), None, None]
    column = ImageColumn("Images", "image_bytearray")
    spec = FeatureSpec("y", "binary", (0, 1), (), (), (), (column,), (), (), (), (MODEL,), False)
    fetcher = ImageFetcher(ImagesConfig(base="/", max_pixels=MAX_PIXELS))
    table = image_table(cells)
    built = FeatureBuilder(spec, fetcher, DecodePlan("gpu", resizes_on_gpu=True))(table)
    assert built["feat:image:pixels"].to_pylist() == [cell or b"" for cell in cells]
    assert built["feat:image:valid_num"].to_pylist() == [0, 1, 0, 1, 0, 0]
    before, after = (
        [chunk.buffers()[2].address for chunk in found.chunks if chunk.buffers()[2] is not None]
        for found in (table["model:Images"], built["feat:image:pixels"])
    )
    assert after == before, "41 KB a row are not copied"


@pytest.mark.parametrize("plan", [GPU, DecodePlan("exact", resizes_on_gpu=True)])
def test_strips_specks_and_giants_are_resized_where_they_are_decoded(plan: DecodePlan) -> None:
    for width, height in ((700, 80), (12, 90), (2100, 2000)):
        content = jpeg(picture(width, height))
        prepared = prepare(content, MODEL, plan, on_cpu=False, max_pixels=MAX_PIXELS)
        assert prepared.form == PIXELS
        assert prepared.content == prepare_image(content, MODEL, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("plan", [GPU, DecodePlan("fast"), DecodePlan("exact", resizes_on_gpu=True), DecodePlan()])
def test_no_way_reads_what_is_too_large_or_no_image(plan: DecodePlan) -> None:
    for content in (jpeg(picture(120, 90)), b"no image"):
        with pytest.raises(BadImageError):
            prepare(content, MODEL, plan, on_cpu=False, max_pixels=120 * 90 - 1)


@pytest.mark.parametrize("transforms", [("resize_shorter_side", "center_crop"), ("resize_to_square",)])
def test_fast_pixels_are_within_two_levels(transforms: tuple[str, ...]) -> None:
    model = ImageModel("image", 64, (0.5,) * 3, (0.5,) * 3, transforms, 1)
    for width, height in ((120, 90), (333, 401), (64, 64), (40, 50)):
        content = jpeg(picture(width, height), quality=90)
        fast, exact = (
            np.frombuffer(
                prepare(content, model, DecodePlan(mode), on_cpu=False, max_pixels=MAX_PIXELS).content, np.uint8
            ).astype(int)
            for mode in ("fast", "exact")
        )
        assert np.abs(fast - exact).max() <= 2
        assert (fast == exact).mean() >= 0.98


def test_a_share_of_rows_is_that_large_and_the_same_in_every_block() -> None:
    rows: npt.NDArray[np.int64] = np.arange(100_000, dtype=np.int64)
    for share in (0.0, 0.2, 1.0):
        chosen = share_of_rows(rows, share)
        assert abs(chosen.mean() - share) < 0.01
        np.testing.assert_array_equal(share_of_rows(rows[5_000:6_000], share), chosen[5_000:6_000])
        assert abs(chosen[:256].mean() - share) < 0.1
