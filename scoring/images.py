"""One image at a time: from a cell's reference to its bytes, from bytes to the model's pixels.

Owns references (paths, URIs, bytes, base64), fetching with a bound on time and concurrency, decoding and the transforms,
bit-equal to upstream's Pillow path. Does not know rows or batches (`features`).
"""

import base64
import binascii
import os
import posixpath
import re
import stat
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.types as pt

from scoring.config import ImagesConfig
from scoring.errors import Reason
from scoring.spec import ImageColumn, ImageModel
from scoring.storage import filesystem, is_local, redact, redact_text

if TYPE_CHECKING:
    from PIL.Image import Image

Reference = str | bytes | None
"""A path or URI, an image's own bytes, or a missing image."""

# Written so that it fails in linear time: a trailing \s* would try every split of a long run of blanks.
_BASE64_TEXT = re.compile(r"[A-Za-z0-9+/\s]+(?:=\s*){0,2}")
# JPEG, PNG, GIF, WEBP, TIFF (both byte orders), BMP, as base64 writes their first bytes.
_BASE64_MAGIC = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk")
_MIN_BASE64_CHARS = 64  # shorter than any image's header; a path may well be made of these characters alone
_URI_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_FETCH_THREADS = 16
# A file larger than its pixels can be (four channels of 16 bits, as they are) and this much beside them is not read.
_BYTES_PER_PIXEL = 8
_METADATA_BYTES = 64 * 2**20
# The largest WEBP that images.max_pixels allows by default took 5.5 s; a slow machine has ten times that.
_MAX_DECODE_S = 60.0
# Where libtiff stops too. Each one costs a pass over all pixels (20 ms for 16 million) and as little as 10 bytes.
_MAX_JPEG_SCANS = 100
# Bytes times pixels from which scans are counted (a fiftieth of the decoding): less is done in 12 s whatever it holds.
_COUNTED_WORK = 10**11
_JPEG, _START_OF_SCAN, _END_OF_IMAGE = b"\xff\xd8", 0xDA, 0xD9
_LIKE_A_SCAN = re.compile(rb"\xff\xda")
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_MESSAGE_CHARS = 500  # a cell, and with it its message, may be megabytes long


class BadImageError(Exception):
    """An image that cannot be scored: its reason from the closed set, and what to tell the reader."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message[:_MESSAGE_CHARS])
        self.reason = reason


def split_references(values: pa.ChunkedArray, column: ImageColumn, max_images: int) -> list[list[Reference]]:
    """A column of cells -> the references of each row, at most `max_images` (upstream ignores the rest).

    A text cell holds one path or URI, several separated by ";", or one image in base64; a list cell one a member.
    """
    as_base64 = column.fitted_as == "image_base64_str"
    rows: list[list[Reference]] = []
    for cell in values.to_pylist():
        members = cell if isinstance(cell, list) else [cell]
        references = [reference for member in members for reference in _cell_references(member, as_base64)]
        rows.append((references or [None])[:max_images])
    return rows


def _cell_references(cell: str | bytes | None, as_base64: bool) -> list[Reference]:
    if not cell:
        return [None]
    if isinstance(cell, bytes):
        return [cell]
    if _is_base64(cell, as_base64):
        try:
            return [base64.b64decode(cell, validate=False)]
        except binascii.Error:
            return [cell.encode()]  # fails to decode as an image, under its own row
    return [part or None for part in cell.split(";")]


def _is_base64(cell: str, as_base64: bool) -> bool:
    if len(cell) < _MIN_BASE64_CHARS or not _BASE64_TEXT.fullmatch(cell):
        return False
    return as_base64 or cell.startswith(_BASE64_MAGIC)


class ImageFetcher:
    """Reads what references point to: local files in line, remote ones `_FETCH_THREADS` at a time."""

    def __init__(self, config: ImagesConfig) -> None:
        assert config.base is not None, "images.base is made absolute when the configuration is loaded"
        self._base = config.base
        self._is_confined = bool(config.confined)
        self._real_base = os.path.realpath(config.base) if is_local(config.base) else None
        self._schemes = frozenset(config.schemes)
        self._timeout_s = config.timeout_s
        self._pool: ThreadPoolExecutor | None = None
        self.max_pixels = config.max_pixels
        self._max_bytes = config.max_pixels * _BYTES_PER_PIXEL + _METADATA_BYTES

    def fetch_all(
        self, rows: Sequence[Sequence[Sequence[Reference]]]
    ) -> list[list[list[bytes | BadImageError | None]]]:
        """Rows x columns x references -> the same shape of contents; a failure stands where the bytes would."""
        pending = [[[self._start(reference) for reference in column] for column in row] for row in rows]
        return [[[self._finish(item) for item in column] for column in row] for row in pending]

    def _start(self, reference: Reference) -> bytes | BadImageError | None | tuple[str, Future[bytes]]:
        if reference is None or isinstance(reference, bytes):
            return reference
        try:
            location = self._resolve(reference)
        except BadImageError as error:
            return error
        # Not by looking for a scheme again: a path may begin like one.
        if location.startswith("/"):
            return _read_local(location, self._max_bytes)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="image-fetch")
        return location, self._pool.submit(_read_remote, location, self._max_bytes, self._timeout_s)

    def _finish(self, item: bytes | BadImageError | None | tuple[str, Future[bytes]]) -> bytes | BadImageError | None:
        if not isinstance(item, tuple):
            return item
        location, future = item
        try:
            content = future.result(timeout=self._timeout_s)
        except FutureTimeout:
            return BadImageError(
                Reason.IMAGE_TIMEOUT, f"{redact(location)}: no answer within images.timeout_s={self._timeout_s}"
            )
        except FileNotFoundError:
            return BadImageError(Reason.IMAGE_MISSING, f"{redact(location)}: no such object")
        except Exception as error:  # whatever a storage driver raises is this row's problem alone
            message = redact_text(f"{type(error).__name__}: {error}")
            return BadImageError(Reason.IMAGE_MISSING, f"{redact(location)}: cannot be read: {message}")
        return content if len(content) <= self._max_bytes else _too_many_bytes(redact(location), self._max_bytes)

    def _resolve(self, reference: str) -> str:
        """An absolute local path, or a URI of an allowed scheme. Raises BadImageError."""
        match = _URI_SCHEME.match(reference)
        is_absolute = match is not None or reference.startswith("/")
        location = reference if is_absolute else f"{self._base.rstrip('/')}/{reference}"
        scheme = match.group(1).lower() if match is not None else "file"
        # A relative path below a remote base goes where the configuration says.
        if scheme not in self._schemes and (is_absolute or is_local(location)):
            raise BadImageError(
                Reason.URI_FORBIDDEN,
                f"{redact(reference)}: scheme {scheme!r} is not in images.schemes={sorted(self._schemes)}",
            )
        if match is not None and scheme == "file":
            location = unquote(reference[match.end() :].removeprefix("localhost"))
            # Also keeps file://http://host/x from being taken for what it holds.
            if not location.startswith("/"):
                raise BadImageError(
                    Reason.URI_FORBIDDEN, f"{redact_text(reference)}: names no file of this machine; write file:///path"
                )
        return self._confine(reference, location) if self._is_confined else location

    def _confine(self, reference: str, location: str) -> str:
        """The location, its links resolved, where it is below the base; URIs are images.schemes' matter. Raises BadImageError.

        What is opened is the path that was checked. Who can swap folders while the run reads them can still lead it out.
        """
        if location.startswith("/"):
            try:
                location = os.path.realpath(location)
            except ValueError:  # a NUL in the path: opening it says so
                return location
            is_below = self._real_base is not None and location.startswith(f"{self._real_base.rstrip('/')}/")
        else:
            # Web servers fold `..`, escaped or not, before they look.
            is_below = _URI_SCHEME.match(reference) is not None or not _climbs(unquote(reference))
        if not is_below:
            raise BadImageError(
                Reason.URI_FORBIDDEN,
                f"{redact(reference)}: leads out of images.base={redact(self._base)}; move it below, or set "
                "images.confined=false",
            )
        return location


def _climbs(path: str) -> bool:
    return posixpath.normpath(path).split("/")[0] == ".."


def _read_local(path: str, max_bytes: int) -> bytes | BadImageError:
    try:
        status = os.stat(path)
        # A pipe or a device could block the worker, or never end.
        if not stat.S_ISREG(status.st_mode):
            return BadImageError(Reason.IMAGE_MISSING, f"{path}: is not a file")
        if status.st_size > max_bytes:
            return _too_many_bytes(path, max_bytes)
        with open(path, "rb") as file:
            return file.read(status.st_size)
    except FileNotFoundError:
        return BadImageError(Reason.IMAGE_MISSING, f"{path}: no such file; relative paths start at images.base")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return BadImageError(
            Reason.IMAGE_MISSING, f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        )


def _read_remote(uri: str, max_bytes: int, timeout_s: float | None) -> bytes:
    """The object's bytes, and no more than one over `max_bytes` from a store that serves ranges."""
    from fsspec.asyn import AsyncFileSystem, sync

    fs, path = filesystem(uri)
    if not isinstance(fs, AsyncFileSystem):
        return cast(bytes, fs.cat_file(path, start=0, end=max_bytes + 1))
    # The call itself ends in time: else 16 dead addresses take all threads, and the images behind them their time.
    return cast(bytes, sync(fs.loop, fs._cat_file, path, start=0, end=max_bytes + 1, timeout=timeout_s))


def _too_many_bytes(shown: str, max_bytes: int) -> BadImageError:
    return BadImageError(
        Reason.IMAGE_TOO_LARGE, f"{shown}: holds over {max_bytes} bytes, more than images.max_pixels can need"
    )


def prepare_image(content: bytes, model: ImageModel, *, max_pixels: int) -> bytes:
    """Encoded image -> `size` x `size` RGB uint8, rows first, as bytes. Raises BadImageError.

    Bit-equal to upstream's val_transforms up to ToTensor: the scoring actor divides by 255 and normalises.
    """
    return transform_image(decode_image(content, max_pixels=max_pixels), model, max_pixels=max_pixels)


def transform_image(image: "Image", model: ImageModel, *, max_pixels: int) -> bytes:
    """A decoded RGB image through the model's transforms, as bytes. Raises BadImageError."""
    for name in model.transforms:
        image = _apply_transform(image, name, model.size, max_pixels)
    return image.tobytes()


def decode_image(content: bytes, *, max_pixels: int) -> "Image":
    """Encoded bytes -> RGB. Truncated files decode as far as they go, as upstream has it. Raises BadImageError.

    Bounded: the pixels, by the header and by those of pictures inside; a JPEG's scans; the time, whenever Pillow asks for
    the next piece of the file. WEBP, AVIF, JPEG 2000 and TIFF decode in one call, whose time pixels alone bound, and libavif
    takes 16384 x 16384 of them whatever the header says.
    """
    with open_image(content, max_pixels=max_pixels) as image:
        # Ghostscript runs it, where it is installed: a programming language, with no bound on time or memory.
        if image.format == "EPS":
            raise BadImageError(Reason.IMAGE_UNDECODABLE, "an EPS file is a program, which is not run; convert it")
        _check_pixels("", image.size, max_pixels)
        if content.startswith(_JPEG) and len(content) * image.width * image.height > _COUNTED_WORK:
            _check_scans(content)
        if image.format == "TIFF":
            # libtiff makes room for a whole tile, of any size, to cut a small picture from.
            tags = getattr(image, "tag_v2", {})
            _check_pixels("a tile of ", (tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)), max_pixels)
        rgb = image.convert("RGB")
        _check_pixels("", rgb.size, max_pixels)  # an icon's size is known once it is decoded
        return rgb


def _check_pixels(of_what: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImageError(
            Reason.IMAGE_TOO_LARGE, f"{of_what}{width} x {height} pixels is over images.max_pixels={max_pixels}"
        )


def _check_scans(content: bytes) -> None:
    """Refuse a JPEG of more passes over its pixels than encoders write. Counting bytes is fast, and so comes first."""
    if len(_LIKE_A_SCAN.findall(content)) <= _MAX_JPEG_SCANS:
        return
    num_scans = sum(1 for marker in _jpeg_markers(content) if marker == _START_OF_SCAN)
    if num_scans > _MAX_JPEG_SCANS:
        raise BadImageError(
            Reason.IMAGE_TOO_LARGE,
            f"a JPEG of {num_scans} scans, where encoders write about 10; {_MAX_JPEG_SCANS} are read",
        )


def _jpeg_markers(content: bytes) -> Iterator[int]:
    """The markers of the first picture, not what looks like one in its segments or in what follows, say a phone's film."""
    position = 0
    while match := _JPEG_MARKER.search(content, position):
        marker = match.group(1)[0]
        yield marker
        if marker == _END_OF_IMAGE:
            return
        position = match.end() + int.from_bytes(content[match.end() : match.end() + 2], "big")


class _TimedBytes(BytesIO):
    """An image's bytes, for as long as its decoding may take."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._deadline = time.monotonic() + _MAX_DECODE_S

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._deadline:
            raise BadImageError(Reason.IMAGE_TIMEOUT, f"not decoded within {_MAX_DECODE_S:g} s")
        return super().read(size)


@contextmanager
def open_image(content: bytes, *, max_pixels: int | None = None) -> "Iterator[Image]":
    """Encoded bytes as Pillow opens them: the header is read, pixels when they are asked for. Raises BadImageError.

    `max_pixels` is for callers who do ask for them.
    """
    import PIL.Image
    import PIL.ImageFile

    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True
    if max_pixels is not None:
        # Pillow refuses twice this: a second bound, which alone covers pictures inside of icons and textures.
        PIL.Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(_TimedBytes(content)) as image:
                yield image
    except BadImageError:
        raise
    except PIL.Image.DecompressionBombError as error:
        num_pixels = re.findall(r"\d+", str(error))[0]
        raise BadImageError(
            Reason.IMAGE_TOO_LARGE, f"a picture of {num_pixels} pixels is over images.max_pixels={max_pixels}"
        ) from error
    except Exception as error:  # Pillow's plugins raise anything on bad bytes (SyntaxError, struct.error, ...)
        # Pillow names the stream by its address, another one in every run.
        reason = re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")
        raise BadImageError(
            Reason.IMAGE_UNDECODABLE, f"{len(content)} bytes that Pillow cannot decode: {reason}"
        ) from error


def _apply_transform(image: "Image", name: str, size: int, max_pixels: int) -> "Image":
    from PIL.Image import Resampling

    if name == "resize_to_square":
        return image if image.size == (size, size) else image.resize((size, size), Resampling.BICUBIC)
    if name == "resize_shorter_side":
        target = _shorter_side_size(image.size, size)
        if target[0] * target[1] > max_pixels:
            raise BadImageError(
                Reason.IMAGE_TOO_LARGE,
                f"{image.width} x {image.height} becomes {target[0]} x {target[1]}, over images.max_pixels={max_pixels}",
            )
        return image if image.size == target else image.resize(target, Resampling.BICUBIC)
    assert name == "center_crop", f"unknown transform {name}; predictor.extract_spec refuses it"
    return _center_crop(image, size)


def _shorter_side_size(image_size: tuple[int, int], size: int) -> tuple[int, int]:
    """torchvision's rule (_compute_resized_image_output_size): the longer side is cut to an int, not rounded."""
    width, height = image_size
    longer = int(size * max(width, height) / min(width, height))
    return (size, longer) if width <= height else (longer, size)


def _center_crop(image: "Image", size: int) -> "Image":
    """torchvision's center_crop: smaller images are padded with black first; offsets use Python's rounding."""
    import PIL.Image

    if image.width < size or image.height < size:
        padded = PIL.Image.new("RGB", (max(image.width, size), max(image.height, size)))
        padded.paste(image, (max(size - image.width, 0) // 2, max(size - image.height, 0) // 2))
        image = padded
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def is_image_type(data_type: pa.DataType) -> bool:
    """Whether a column of this arrow type can hold images: text, bytes, or a list of one of them."""
    if pt.is_list(data_type) or pt.is_large_list(data_type):
        data_type = data_type.value_type
    return bool(pt.is_string(data_type) or pt.is_binary(data_type))
