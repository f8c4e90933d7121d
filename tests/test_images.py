"""Images: references in cells, fetching them, decoding, and the transforms by hand-computed sizes and offsets."""

import base64
import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pyarrow as pa
import pytest

import scoring.images
from scoring.config import ImagesConfig
from scoring.errors import Reason
from scoring.images import (
    BadImageError,
    ImageFetcher,
    Reference,
    decode_image,
    is_image_type,
    prepare_image,
    split_references,
)
from scoring.spec import ImageColumn, ImageModel
from scoring.storage import write_bytes

MAX_PIXELS = 1_000_000


def encode(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def coordinates(width: int, height: int) -> PIL.Image.Image:
    """Red is the column, green the row, blue 200: a pixel tells where it came from."""
    pixels = np.full((height, width, 3), 200, dtype=np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = np.arange(width), np.arange(height)[:, None]
    return PIL.Image.fromarray(pixels)


PNG = encode(coordinates(8, 6))
JPEG = encode(PIL.Image.effect_noise((64, 64), 80), "JPEG")
BASE64 = base64.b64encode(JPEG).decode()


# --- references


def split(*cells: Any, kind: pa.DataType | None = None, fitted_as: Any = "image_path", most: int = 9) -> list[Any]:
    values = pa.chunked_array([pa.array(cells, kind or pa.string())])
    return split_references(values, ImageColumn("p", fitted_as), most)


def test_paths_uris_and_nulls() -> None:
    assert split("a.jpg", "s3://b/x y.jpg", None, "") == [["a.jpg"], ["s3://b/x y.jpg"], [None], [None]]


def test_several_paths_in_one_cell() -> None:
    assert split("a;b;c", "a;;c", "a;", ";") == [["a", "b", "c"], ["a", None, "c"], ["a", None], [None, None]]
    assert split("a;b;c", "a", most=2) == [["a", "b"], ["a"]]


def test_lists_hold_one_image_a_member() -> None:
    cells = [["a", "b"], [], None, [None, "c"], ["a;b"]]
    expected = [["a", "b"], [None], [None], [None, "c"], ["a", "b"]]
    assert split(*cells, kind=pa.list_(pa.string())) == expected
    assert split([b"1", b"", b"3"], kind=pa.list_(pa.binary())) == [[b"1", None, b"3"]]
    assert split([b"1", b"2"], kind=pa.list_(pa.binary()), most=1) == [[b"1"]]


def test_bytes_are_the_image_itself() -> None:
    assert split(b"\xff\xd8;x", b"", None, kind=pa.binary()) == [[b"\xff\xd8;x"], [None], [None]]


@pytest.mark.parametrize("fitted_as", ["image_path", "image_base64_str"])
def test_base64_is_known_by_its_first_bytes(fitted_as: str) -> None:
    wrapped = "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)) + "\n"
    assert split(BASE64, wrapped, fitted_as=fitted_as) == [[JPEG], [JPEG]]
    for image in (
        PNG,
        encode(coordinates(8, 6), "GIF"),
        encode(coordinates(8, 6), "BMP"),
        encode(coordinates(8, 6), "TIFF"),
    ):
        assert split(base64.b64encode(image).decode(), fitted_as=fitted_as) == [[image]]


def test_base64_of_other_bytes_is_one_only_where_it_was_fitted() -> None:
    text = base64.b64encode(bytes(range(60))).decode()
    assert split(text, fitted_as="image_base64_str") == [[bytes(range(60))]]
    assert split(text) == [[text]]


def test_paths_made_of_base64_characters_stay_paths() -> None:
    short, long = "photos/abc", "photos/" + "a" * 80
    assert split(short, long, long + ".jpg") == [[short], [long], [long + ".jpg"]]
    assert split(short, long + ".jpg", fitted_as="image_base64_str") == [[short], [long + ".jpg"]]


def test_base64_cut_short_is_an_image_that_does_not_decode() -> None:
    cut = BASE64[:101]
    assert split(cut) == [[cut.encode()]]
    with pytest.raises(BadImageError, match="Pillow cannot decode"):
        decode_image(cut.encode(), max_pixels=MAX_PIXELS)


@pytest.mark.timeout(20)
def test_a_hostile_cell_is_split_in_linear_time() -> None:
    cell = "A" + " " * 400_000 + "!"
    assert split(cell, "A=" + " " * 400_000 + "=!") == [[cell], ["A=" + " " * 400_000 + "=!"]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (pa.string(), True),
        (pa.binary(), True),
        (pa.list_(pa.string()), True),
        (pa.large_list(pa.binary()), True),
        (pa.int64(), False),
        (pa.list_(pa.int8()), False),
        (pa.list_(pa.list_(pa.string())), False),
        (pa.struct({"bytes": pa.binary()}), False),
    ],
)
def test_is_image_type(kind: pa.DataType, expected: bool) -> None:
    assert is_image_type(kind) is expected


# --- fetching


def fetch(reference: Reference, base: str | Path, **settings: Any) -> bytes | BadImageError | None:
    fetcher = ImageFetcher(ImagesConfig(base=str(base), **settings))
    (((content,),),) = fetcher.fetch_all([[[reference]]])
    return content


def refusal(reference: str, base: str | Path, **settings: Any) -> tuple[Reason, str]:
    error = fetch(reference, base, **settings)
    assert isinstance(error, BadImageError)
    return error.reason, str(error)


def test_local_files_by_every_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a b%20.png").write_bytes(PNG)
    (tmp_path / "in" / "c d.png").write_bytes(JPEG)
    assert fetch("in/a b%20.png", tmp_path) == PNG
    assert fetch("in/a b%20.png", f"{tmp_path}/") == PNG
    assert fetch("../in/a b%20.png", tmp_path / "in") == PNG
    assert fetch(f"{tmp_path}/in/a b%20.png", "/nowhere") == PNG
    assert fetch(f"file://{tmp_path}/in/a%20b%2520.png", "/nowhere") == PNG
    assert fetch(f"FILE://localhost{tmp_path}/in/c%20d.png", "/nowhere") == JPEG
    assert fetch(b"raw", tmp_path) == b"raw"
    assert fetch(None, tmp_path) is None


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert refusal("gone.jpg", tmp_path) == (
        Reason.IMAGE_MISSING,
        f"{tmp_path}/gone.jpg: no such file; relative paths start at images.base",
    )
    assert refusal("folder", tmp_path) == (Reason.IMAGE_MISSING, f"{tmp_path}/folder: is not a file")
    assert refusal("pipe", tmp_path) == (Reason.IMAGE_MISSING, f"{tmp_path}/pipe: is not a file")
    assert refusal("/dev/zero", tmp_path) == (Reason.IMAGE_MISSING, "/dev/zero: is not a file")
    for name, message in [
        ("a\0b", "null byte"),
        ("n" * 300, "File name too long"),
        ("folder/../gone/a", "no such file"),
    ]:
        reason, text = refusal(name, tmp_path)
        assert (reason, message in text) == (Reason.IMAGE_MISSING, True)


def test_messages_stay_short(tmp_path: Path) -> None:
    for reference in ("n" * 100_000, "http://h/" + "n" * 100_000):
        assert len(refusal(reference, tmp_path)[1]) == 500


def test_forbidden_schemes_are_not_fetched(tmp_path: Path) -> None:
    assert refusal("https://user:hush@host/a.jpg?sig=hush", tmp_path) == (
        Reason.URI_FORBIDDEN,
        "https://host/a.jpg: scheme 'https' is not in images.schemes="
        "['abfs', 'abfss', 'az', 'file', 'gcs', 'gs', 's3']",
    )
    assert refusal("HTTP://host/a.jpg", tmp_path)[0] == Reason.URI_FORBIDDEN


def test_without_the_file_scheme_no_local_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    for reference in (f"{tmp_path}/a.png", f"file://{tmp_path}/a.png", "a.png"):
        reason, message = refusal(reference, tmp_path, schemes=("s3",))
        assert reason == Reason.URI_FORBIDDEN
        assert message == f"{reference}: scheme 'file' is not in images.schemes=['s3']"


def test_object_stores() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    write_bytes(f"{root}/in/a.png", PNG)
    assert fetch(f"{root}/in/a.png", "/nowhere", schemes=("memory",)) == PNG
    assert fetch("in/a.png", root, schemes=("s3",)) == PNG
    assert refusal(f"{root}/in/b.png", "/", schemes=("memory",)) == (
        Reason.IMAGE_MISSING,
        f"{root}/in/b.png: no such object",
    )
    assert refusal(f"{root}/in", "/", schemes=("memory",))[0] == Reason.IMAGE_MISSING
    assert refusal("nowhere://x/a.png", "/", schemes=("nowhere",))[0] == Reason.IMAGE_MISSING


def test_failures_of_a_driver_stay_with_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> bytes:
        if "slow" in uri:
            Event().wait(5)
        if "broken" in uri:
            raise RuntimeError("403 for https://key:hush@host/x")
        return b"fine"

    monkeypatch.setattr(scoring.images, "_read_remote", fail)
    fetcher = ImageFetcher(ImagesConfig(base="/", timeout_s=0.2))
    rows: list[list[list[Reference]]] = [[["s3://b/1", None]], [["s3://b/broken"]], [["s3://b/slow"]], [["s3://b/4"]]]
    first, broken, slow, last = fetcher.fetch_all(rows)
    assert (first, last) == ([[b"fine", None]], [[b"fine"]])
    (error,), (late,) = broken[0], slow[0]
    assert isinstance(error, BadImageError)
    assert (error.reason, str(error)) == (
        Reason.IMAGE_MISSING,
        "s3://b/broken: cannot be read: RuntimeError: 403 for https://host/x",
    )
    assert isinstance(late, BadImageError)
    assert (late.reason, str(late)) == (Reason.IMAGE_TIMEOUT, "s3://b/slow: no answer within images.timeout_s=0.2")


# --- decoding


def pixels_of(content: bytes) -> npt.NDArray[np.uint8]:
    image = decode_image(content, max_pixels=MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_lossless_pictures_keep_their_pixels() -> None:
    expected = np.asarray(coordinates(8, 6))
    for kind in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(pixels_of(encode(coordinates(8, 6), kind)), expected)
    assert expected[2, 5].tolist() == [5, 2, 200]


def solid(mode: str, color: Any) -> PIL.Image.Image:
    return PIL.Image.new(mode, (4, 4), color)


def palette(kind: str) -> Callable[[], bytes]:
    return lambda: encode(solid("RGB", (10, 20, 30)).convert("P", palette=PIL.Image.Palette.ADAPTIVE), kind)


@pytest.mark.parametrize(
    ("content", "color"),
    [
        (lambda: encode(solid("RGBA", (10, 20, 30, 0))), (10, 20, 30)),
        (lambda: encode(solid("L", 77)), (77, 77, 77)),
        (lambda: encode(solid("LA", (77, 3))), (77, 77, 77)),
        (lambda: encode(solid("1", 1)), (255, 255, 255)),
        (lambda: encode(solid("CMYK", (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
        (lambda: encode(solid("CMYK", (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
        (palette("PNG"), (10, 20, 30)),
        (palette("GIF"), (10, 20, 30)),
    ],
    ids=["RGBA", "L", "LA", "1", "CMYK-JPEG", "CMYK-TIFF", "P-PNG", "P-GIF"],
)
def test_every_mode_becomes_rgb(content: Callable[[], bytes], color: tuple[int, int, int]) -> None:
    assert set(map(tuple, pixels_of(content()).reshape(-1, 3).tolist())) == {color}


def test_sixteen_bit_pictures_are_cut_as_pillow_has_it() -> None:
    gray = PIL.Image.fromarray(np.array([[0, 100], [255, 60_000]], dtype=np.uint16))
    assert pixels_of(encode(gray))[:, :, 0].tolist() == [[0, 100], [255, 255]]


def test_an_animation_is_its_first_frame() -> None:
    frames = [solid("RGB", (255, 0, 0)), solid("RGB", (0, 0, 255))]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels_of(content)[0, 0].tolist() == [255, 0, 0]


def test_a_truncated_jpeg_decodes_as_far_as_it_goes() -> None:
    cut = pixels_of(JPEG[: len(JPEG) // 2])
    assert cut.shape == (64, 64, 3)
    np.testing.assert_array_equal(cut[:8], pixels_of(JPEG)[:8])
    assert not np.array_equal(cut[-8:], pixels_of(JPEG)[-8:])


@pytest.mark.parametrize("content", [b"", b"not an image", bytes(1000), JPEG[:10], PNG[:20], b"GIF89a" + b"\xff" * 50])
def test_garbage_is_undecodable(content: bytes) -> None:
    with pytest.raises(BadImageError) as caught:
        decode_image(content, max_pixels=MAX_PIXELS)
    assert caught.value.reason == Reason.IMAGE_UNDECODABLE
    assert str(caught.value).startswith(f"{len(content)} bytes that Pillow cannot decode: ")


def test_max_pixels_is_a_limit_on_the_product() -> None:
    assert decode_image(PNG, max_pixels=48).size == (8, 6)
    with pytest.raises(BadImageError) as caught:
        decode_image(PNG, max_pixels=47)
    assert (caught.value.reason, str(caught.value)) == (
        Reason.IMAGE_TOO_LARGE,
        "8 x 6 pixels is over images.max_pixels=47",
    )


# --- transforms


def prepare(image: PIL.Image.Image, size: int, *transforms: str, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    model = ImageModel("m", size, (0.0,) * 3, (1.0,) * 3, transforms, 1)
    content = prepare_image(encode(image), model, max_pixels=max_pixels)
    return np.frombuffer(content, dtype=np.uint8).reshape(size, size, 3)


@pytest.mark.parametrize(
    ("width", "height", "left", "top"),
    # (width - size) / 2 at halves goes to the even neighbour, as Python rounds.
    [
        (4, 4, 0, 0),
        (5, 4, 0, 0),
        (6, 4, 1, 0),
        (7, 4, 2, 0),
        (9, 4, 2, 0),
        (11, 4, 4, 0),
        (4, 7, 0, 2),
        (4, 9, 0, 2),
        (9, 7, 2, 2),
    ],
)
def test_center_crop_offsets(width: int, height: int, left: int, top: int) -> None:
    pixels = prepare(coordinates(width, height), 4, "center_crop")
    assert pixels[:, :, 0].tolist() == [list(range(left, left + 4))] * 4
    assert pixels[:, :, 1].tolist() == [[row] * 4 for row in range(top, top + 4)]
    assert set(pixels[:, :, 2].ravel().tolist()) == {200}


@pytest.mark.parametrize(
    ("width", "height", "left", "top", "first_row"),
    [(3, 2, 1, 2, 0), (6, 3, 0, 1, 0), (3, 9, 1, 0, 2)],
)
def test_center_crop_pads_small_images_with_black(width: int, height: int, left: int, top: int, first_row: int) -> None:
    pixels = prepare(coordinates(width, height), 6, "center_crop")
    expected = np.zeros((6, 6, 3), dtype=np.uint8)
    shown = min(height, 6)
    expected[top : top + shown, left : left + width] = np.asarray(coordinates(width, height))[
        first_row : first_row + shown
    ]
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    # The longer side is cut: 224 * 640 / 480 = 298.67.
    [
        (640, 480, (298, 224)),
        (480, 640, (224, 298)),
        (100, 100, (224, 224)),
        (1, 10, (224, 2240)),
        (333, 250, (298, 224)),
    ],
)
def test_resize_shorter_side(width: int, height: int, expected: tuple[int, int]) -> None:
    resized = scoring.images._apply_transform(
        PIL.Image.new("RGB", (width, height)), "resize_shorter_side", 224, MAX_PIXELS
    )
    assert resized.size == expected


def test_resize_then_crop_takes_the_middle() -> None:
    # 40 x 20, left half dark and right half light -> 20 x 10 -> columns 5 to 15: the edge is in the middle.
    image = PIL.Image.new("RGB", (40, 20), (10, 10, 10))
    image.paste((240, 240, 240), (20, 0, 40, 20))
    pixels = prepare(image, 10, "resize_shorter_side", "center_crop")
    assert set(pixels[:, :3].ravel().tolist()) == {10}
    assert set(pixels[:, 7:].ravel().tolist()) == {240}
    np.testing.assert_array_equal(250 - pixels[:, ::-1].astype(int), pixels)


def test_resize_to_square_keeps_the_right_size_and_squeezes_others() -> None:
    np.testing.assert_array_equal(prepare(coordinates(6, 6), 6, "resize_to_square"), np.asarray(coordinates(6, 6)))
    squeezed = prepare(coordinates(60, 30), 6, "resize_to_square")
    # A ramp stays one: each pixel is about the mean of the ones it stands for, less exact at the borders.
    np.testing.assert_allclose(squeezed[2, :, 0], [4.5, 14.5, 24.5, 34.5, 44.5, 54.5], atol=1.5)
    np.testing.assert_allclose(squeezed[:, 2, 1], [2, 7, 12, 17, 22, 27], atol=1.5)


def test_an_image_that_would_grow_too_large_is_refused() -> None:
    with pytest.raises(BadImageError) as caught:
        prepare(coordinates(200, 1), 100, "resize_shorter_side", "center_crop", max_pixels=1_999_999)
    assert (caught.value.reason, str(caught.value)) == (
        Reason.IMAGE_TOO_LARGE,
        "200 x 1 becomes 20000 x 100, over images.max_pixels=1999999",
    )
    assert prepare(coordinates(200, 1), 100, "resize_shorter_side", "center_crop", max_pixels=2_000_000).shape[0] == 100
