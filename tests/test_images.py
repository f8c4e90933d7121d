"""Images: references in cells, fetching them, decoding, and the transforms by hand-computed sizes and offsets."""

import base64
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import PIL.EpsImagePlugin
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
    def fail(uri: str, max_bytes: int, timeout_s: float) -> bytes:
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


def test_files_that_pixels_cannot_explain_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring.images, "_METADATA_BYTES", 1000)
    path = tmp_path / "a.png"
    root = f"memory://{uuid.uuid4().hex}"
    for size in (1800, 1801):
        with path.open("wb") as file:
            file.truncate(size)
        write_bytes(f"{root}/a.png", bytes(size))
        local = fetch("a.png", tmp_path, max_pixels=100)
        remote = fetch("a.png", root, max_pixels=100)
        if size == 1800:
            assert (local, remote) == (bytes(1800), bytes(1800))
        else:
            for error, shown in [(local, path), (remote, f"{root}/a.png")]:
                assert isinstance(error, BadImageError)
                assert (error.reason, str(error)) == (
                    Reason.IMAGE_TOO_LARGE,
                    f"{shown}: holds over 1800 bytes, more than images.max_pixels can need",
                )


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)
    assert refusal("a.png", tmp_path)[0] == Reason.IMAGE_TOO_LARGE


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is opened while the test runs: local paths, and the drivers asked for."""
    names: list[str] = []
    read_local, find_driver = scoring.images._read_local, fsspec.filesystem

    def note_local(path: str, max_bytes: int) -> bytes | BadImageError:
        names.append(path)
        return read_local(path, max_bytes)

    def note_driver(protocol: str, **options: Any) -> Any:
        names.append(protocol)
        return find_driver(protocol, **options)

    monkeypatch.setattr(scoring.images, "_read_local", note_local)
    monkeypatch.setattr(fsspec, "filesystem", note_driver)
    return names


@pytest.mark.parametrize(
    "reference",
    [
        "http://127.0.0.1:1/a.png",
        "HTTPS://127.0.0.1:1/a.png",
        "Memory://b/a.png",
        "ftp://127.0.0.1:1/a.png",
        "github://o:r@/a.png",
        "zip://a.png::file:///b.zip",
        "simplecache://a.png",
        "reference://a.png",
        "data://a",
        "file://http://127.0.0.1:1/a.png",
        "FILE://HTTP://127.0.0.1:1/a.png",
        "file://localhosthttp://127.0.0.1:1/a.png",
        "file://%68ttp://127.0.0.1:1/a.png",
        "file://memory://b/a.png",
        "file://other-host/etc/passwd",
        "file://etc/passwd",
    ],
)
@pytest.mark.parametrize("confined", [False, True])
def test_what_is_not_allowed_is_not_opened(tmp_path: Path, reference: str, confined: bool, opened: list[str]) -> None:
    assert refusal(reference, tmp_path, confined=confined)[0] == Reason.URI_FORBIDDEN
    assert opened == []


@pytest.mark.parametrize(
    "reference",
    [
        "simplecache::http://127.0.0.1:1/a.png",
        "filecache::memory://b/a.png",
        "SIMPLECACHE::HTTP://127.0.0.1:1/a.png",
        " http://127.0.0.1:1/a.png",
        "\thttp://127.0.0.1:1/a.png",
        "x://127.0.0.1:1/a.png",
        "http:/127.0.0.1:1/a.png",
        "file:/etc/passwd",
    ],
)
def test_what_is_no_uri_is_a_path_below_the_base(tmp_path: Path, reference: str, opened: list[str]) -> None:
    assert refusal(reference, tmp_path)[0] == Reason.IMAGE_MISSING
    assert opened == [f"{tmp_path}/{reference}"]
    opened.clear()
    assert refusal(reference, f"memory://{uuid.uuid4().hex}")[0] == Reason.IMAGE_MISSING
    assert opened == ["memory"]


def test_chained_uris_of_an_allowed_scheme_stay_with_it(opened: list[str]) -> None:
    write_bytes("memory://chained/a.png::memory://b", PNG)
    opened.clear()
    assert fetch("memory://chained/a.png::memory://b", "/", schemes=("memory",)) == PNG
    assert opened == ["memory"]


# --- staying below the base


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A base with a picture, one beside it, and links both ways."""
    for folder in ("base/in", "base2"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(PNG)
    base = tmp_path / "base"
    (base / "link.png").symlink_to(base / "in" / "a.png")
    (base / "out.png").symlink_to(tmp_path / "base2" / "a.png")
    (base / "folder").symlink_to(tmp_path / "base2")
    (base / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "door").symlink_to(base)
    return base


@pytest.mark.parametrize("confined", [False, True])
def test_paths_below_the_base_are_read(album: Path, confined: bool) -> None:
    for base in (album, f"{album}/", album.parent / "door", f"{album}/in/.."):
        for reference in (
            "in/a.png",
            "in/../in/./a.png",
            "../base/in/a.png",
            "link.png",
            f"{album}/in/a.png",
            f"{album.parent}/door/in/a.png",
            f"file://{album}/in/a.png",
        ):
            assert fetch(reference, base, confined=confined) == PNG
    assert fetch(f"{album}/in/a.png", "/", confined=confined) == PNG


def test_paths_that_leave_the_base_are_forbidden(album: Path, opened: list[str]) -> None:
    references = (
        "../base2/a.png",
        "in/../../base2/a.png",
        f"{album.parent}/base2/a.png",
        f"file://{album.parent}/base2/a.png",
        f"file://{album}/in/..%2F..%2Fbase2/a.png",
        "out.png",
        "folder/a.png",
        "folder/../base2/a.png",
        "dangling.png",
        "/etc/passwd",
        "/dev/zero",
        "..",
        ".",
    )
    for reference in references:
        assert refusal(reference, album, confined=True) == (
            Reason.URI_FORBIDDEN,
            f"{reference}: leads out of images.base={album}; move it below, or set images.confined=false",
        )
    assert opened == []
    for reference in references[:7]:
        assert fetch(reference, album) == PNG


def test_a_confined_path_that_is_not_there_is_missing(album: Path) -> None:
    assert refusal("in/gone.png", album, confined=True)[0] == Reason.IMAGE_MISSING
    assert refusal("a\0b", album, confined=True)[0] == Reason.IMAGE_MISSING
    assert refusal("n" * 300, album, confined=True)[0] == Reason.IMAGE_MISSING


def test_a_remote_base_is_left_by_uri_alone() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    write_bytes(f"{root}/in/a.png", PNG)
    for reference in ("a.png", "./a.png", "x/../a.png", "..a.png"):
        content = fetch(reference, f"{root}/in", confined=True)
        assert content == PNG or (isinstance(content, BadImageError) and content.reason == Reason.IMAGE_MISSING)
    for reference in ("../in/a.png", "x/../../in/a.png", "%2e%2e/in/a.png", "..%2Fin/a.png", "/etc/passwd", ".."):
        assert refusal(reference, f"{root}/in", confined=True)[0] == Reason.URI_FORBIDDEN
    assert fetch(f"{root}/in/a.png", f"{root}/other", confined=True, schemes=("memory",)) == PNG
    assert fetch(f"{root}/in/a.png", "/nowhere", confined=True, schemes=("memory",)) == PNG


# --- slow servers


@pytest.fixture
def server() -> Iterator[str]:
    """A web server: /a.png is a picture, /redirect leads to it, anything else takes the request and never answers."""
    done = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "/a.png")
                self.end_headers()
            elif self.path == "/a.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(PNG)
            else:
                done.wait(30)

        def log_message(self, *arguments: Any) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads = True
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    done.set()
    served.shutdown()
    served.server_close()


def test_dead_addresses_do_not_hold_up_the_others(server: str) -> None:
    fetcher = ImageFetcher(ImagesConfig(base="/", schemes=("http",), timeout_s=1.0))
    started = time.monotonic()
    contents = fetcher.fetch_all([[[f"{server}/dead{i}", None]] for i in range(20)])
    # 16 at a time: two rounds of a second, not 20 of them.
    assert time.monotonic() - started < 10
    errors = [row[0][0] for row in contents]
    assert {error.reason for error in errors if isinstance(error, BadImageError)} == {Reason.IMAGE_TIMEOUT}
    assert len(errors) == 20
    assert fetcher.fetch_all([[[f"{server}/a.png", f"{server}/redirect"]]]) == [[[PNG, PNG]]]


def test_a_closed_port_is_a_missing_image() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reason, message = refusal(f"http://127.0.0.1:{port}/a.png", "/", schemes=("http",))
    assert (reason, "cannot be read: ClientConnectorError" in message) == (Reason.IMAGE_MISSING, True)


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


# --- bombs: small files that want much memory or time


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG of zeros, whose pixels pack a thousandfold."""
    packer = zlib.compressobj()
    rows = [packer.compress(bytes(width + 1)) for _ in range(height)]
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", b"".join([*rows, packer.flush()])), (b"IEND", b"")]
    sealed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(sealed)


def icon(picture: bytes) -> bytes:
    """An ICO whose directory says 16 x 16."""
    directory = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture), 22)
    return struct.pack("<HHH", 0, 1, 1) + directory + picture


def mac_icon(picture: bytes) -> bytes:
    """An ICNS whose block is that of a 128 x 128 picture."""
    block = b"ic07" + struct.pack(">I", len(picture) + 8) + picture
    return b"icns" + struct.pack(">I", len(block) + 8) + block


def tiff(size: tuple[int, int], tile: tuple[int, int]) -> bytes:
    packer = zlib.compressobj()
    data = b"".join([*(packer.compress(bytes(tile[0])) for _ in range(tile[1])), packer.flush()])
    tags = {
        256: size[0],
        257: size[1],
        258: 8,
        259: 8,
        262: 1,
        277: 1,
        322: tile[0],
        323: tile[1],
        324: 8,
        325: len(data),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def gif(screen: tuple[int, int], frame: tuple[int, int], num_frames: int = 1) -> bytes:
    palette = b"\0\0\0\xff\xff\xff"
    one = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + palette + one * num_frames + b";"


def webp(canvas: tuple[int, int]) -> bytes:
    """A film with one frame of one pixel."""
    frame = encode(solid("RGB", 0).resize((1, 1)), "WEBP", lossless=True)[12:]
    flags = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + b"".join(struct.pack("<I", n - 1)[:3] for n in canvas)
    placed = bytes(12) + b"\x64\0\0\0" + frame
    body = (
        b"WEBP" + flags + b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(placed)) + placed
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(width: int, height: int) -> bytes:
    """Run lengths: the picture ends with its first row."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 2, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + 2, 0, 0, 54 + 1024) + header + bytes(1024) + b"\0\1"


def progressive(num_scans: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A progressive JPEG of this many scans, the last one repeated; `before` is a comment."""
    content = encode(PIL.Image.new("RGB", (64, 64), (200, 10, 10)), "JPEG", progressive=True)
    start, end = content.rindex(b"\xff\xda"), len(content) - 2
    scans = content[start:end] * (num_scans - content.count(b"\xff\xda") + 1)
    comment = b"\xff\xfe" + struct.pack(">H", len(before) + 2) + before if before else b""
    return content[:2] + comment + content[2:start] + scans + content[end:] + after


SIDE = 8000  # 64 MB as it is packed, 256 MB as RGB

BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "png": (lambda: png(SIDE, SIDE), "image_too_large"),
    "png text": (lambda: png(8, 6, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**27)))), "8 x 6"),
    "png profile": (lambda: png(8, 6, (b"iCCP", b"k\0\0" + zlib.compress(bytes(2**27)))), "8 x 6"),
    "ico": (lambda: icon(png(SIDE, SIDE)), "image_too_large"),
    "icns": (lambda: mac_icon(png(SIDE, SIDE)), "image_too_large"),
    "tiff": (lambda: tiff((SIDE, SIDE), (SIDE, SIDE)), "image_too_large"),
    "tiff tile": (lambda: tiff((10, 10), (SIDE, SIDE)), "image_too_large"),
    "gif screen": (lambda: gif((65535, 65535), (1, 1)), "image_too_large"),
    "gif frame": (lambda: gif((1, 1), (65535, 65535)), "image_too_large"),
    "webp": (lambda: webp((SIDE, SIDE)), "image_too_large"),
    "webp canvas": (lambda: webp((2**24, 255)), "image_too_large"),
    "bmp": (lambda: bmp(SIDE, SIDE), "image_too_large"),
    "garbage": (lambda: b"\x89PNG\r\n\x1a\n" + b"\xff" * 1000, "image_undecodable"),
}

_MEASURE = """
import json, resource, sys
from pathlib import Path
from scoring.images import BadImageError, decode_image

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

try:
    decode_image(b"", max_pixels=1)  # Pillow's plugins are loaded now
except BadImageError:
    pass
for path in sys.argv[1:]:
    content, before = Path(path).read_bytes(), peak_mib()
    try:
        image = decode_image(content, max_pixels=1_000_000)
        outcome = f"{image.width} x {image.height}"
    except BadImageError as error:
        outcome = error.reason.value
    print(json.dumps([Path(path).name, outcome, peak_mib() - before]))
"""


def test_headers_that_lie_take_no_memory(tmp_path: Path) -> None:
    for name, (make, _) in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    paths = [str(tmp_path / name) for name in BOMBS]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *paths], capture_output=True, text=True, check=True, timeout=300
    )
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name: outcome for name, outcome, _ in measured} == {name: outcome for name, (_, outcome) in BOMBS.items()}
    assert {name: grown for name, _, grown in measured if grown > 30} == {}


def test_a_picture_inside_is_told_by_its_pixels() -> None:
    with pytest.raises(BadImageError) as caught:
        decode_image(icon(png(300, 200)), max_pixels=20_000)
    assert (caught.value.reason, str(caught.value)) == (
        Reason.IMAGE_TOO_LARGE,
        "a picture of 60000 pixels is over images.max_pixels=20000",
    )
    with pytest.raises(BadImageError, match=r"^300 x 200 pixels is over images\.max_pixels=40000$"):
        decode_image(icon(png(300, 200)), max_pixels=40_000)
    assert decode_image(icon(png(300, 200)), max_pixels=60_000).size == (300, 200)


def test_tiles_count_like_pixels() -> None:
    with pytest.raises(BadImageError) as caught:
        decode_image(tiff((10, 10), (64, 64)), max_pixels=4095)
    assert (caught.value.reason, str(caught.value)) == (
        Reason.IMAGE_TOO_LARGE,
        "a tile of 64 x 64 pixels is over images.max_pixels=4095",
    )
    assert decode_image(tiff((10, 10), (64, 64)), max_pixels=4096).size == (10, 10)


@pytest.mark.timeout(30)
def test_films_of_many_frames_cost_one(tmp_path: Path) -> None:
    assert decode_image(gif((10, 10), (10, 10), num_frames=500_000), max_pixels=100).size == (10, 10)
    frames = [solid("RGB", (i, 0, 0)) for i in range(40)]
    for kind in ("WEBP", "PNG", "TIFF"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode_image(content, max_pixels=16).size == (4, 4)


def test_a_jpeg_of_very_many_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_image(progressive(101), max_pixels=MAX_PIXELS).size == (64, 64)  # small: done in no time
    monkeypatch.setattr(scoring.images, "_COUNTED_WORK", 64 * 64 * 1000)
    assert decode_image(progressive(100), max_pixels=MAX_PIXELS).size == (64, 64)
    with pytest.raises(BadImageError) as caught:
        decode_image(progressive(101), max_pixels=MAX_PIXELS)
    assert (caught.value.reason, str(caught.value)) == (
        Reason.IMAGE_TOO_LARGE,
        "a JPEG of 101 scans, where encoders write about 10; 100 are read",
    )


def test_what_looks_like_scans_in_a_comment_or_behind_the_picture_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring.images, "_COUNTED_WORK", 0)
    film = b"\xff\xda\0\x0c" * 2000
    for content in (progressive(10, before=film), progressive(10, after=film)):
        np.testing.assert_array_equal(pixels_of(content), pixels_of(progressive(10)))


def test_a_slow_image_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow decodes QOI in Python: 62 pixels a byte, a second for 30 million.
    content = b"qoif" + struct.pack(">II", 4000, 4000) + b"\3\0" + b"\xfd" * 300_000
    monkeypatch.setattr(scoring.images, "_MAX_DECODE_S", 0.02)
    with pytest.raises(BadImageError) as caught:
        decode_image(content, max_pixels=16_000_000)
    assert (caught.value.reason, str(caught.value)) == (Reason.IMAGE_TIMEOUT, "not decoded within 0.02 s")


def test_a_program_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", run)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n%%EOF\n"
    with pytest.raises(BadImageError) as caught:
        decode_image(content, max_pixels=MAX_PIXELS)
    assert (caught.value.reason, str(caught.value)) == (
        Reason.IMAGE_UNDECODABLE,
        "an EPS file is a program, which is not run; convert it",
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
