"""One image at a time: from a cell's reference to its bytes, from bytes to the model's pixels.

Owns references (paths, URIs, bytes, base64), fetching with a bound on time and concurrency, decoding and the transforms,
bit-equal to upstream's Pillow path. Does not know rows or batches (`features`).
"""

import base64
import binascii
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
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
        self._schemes = frozenset(config.schemes)
        self._timeout_s = config.timeout_s
        self._pool: ThreadPoolExecutor | None = None
        self.max_pixels = config.max_pixels

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
        if _URI_SCHEME.match(location) is None:
            return _read_local(location)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="image-fetch")
        return location, self._pool.submit(_read_remote, location)

    def _finish(self, item: bytes | BadImageError | None | tuple[str, Future[bytes]]) -> bytes | BadImageError | None:
        if not isinstance(item, tuple):
            return item
        location, future = item
        try:
            return future.result(timeout=self._timeout_s)
        except FutureTimeout:
            return BadImageError(
                Reason.IMAGE_TIMEOUT, f"{redact(location)}: no answer within images.timeout_s={self._timeout_s}"
            )
        except FileNotFoundError:
            return BadImageError(Reason.IMAGE_MISSING, f"{redact(location)}: no such object")
        except Exception as error:  # whatever a storage driver raises is this row's problem alone
            message = redact_text(f"{type(error).__name__}: {error}")
            return BadImageError(Reason.IMAGE_MISSING, f"{redact(location)}: cannot be read: {message}")

    def _resolve(self, reference: str) -> str:
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
            return unquote(reference[match.end() :].removeprefix("localhost"))
        return location


def _read_local(path: str) -> bytes | BadImageError:
    try:
        # A pipe or a device could block the worker, or never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return BadImageError(Reason.IMAGE_MISSING, f"{path}: is not a file")
        return Path(path).read_bytes()
    except FileNotFoundError:
        return BadImageError(Reason.IMAGE_MISSING, f"{path}: no such file; relative paths start at images.base")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return BadImageError(
            Reason.IMAGE_MISSING, f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        )


def _read_remote(uri: str) -> bytes:
    fs, path = filesystem(uri)
    return cast(bytes, fs.cat_file(path))


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
    """Encoded bytes -> RGB. Truncated files decode as far as they go, as upstream has it. Raises BadImageError."""
    with open_image(content) as image:
        if image.width * image.height > max_pixels:
            raise BadImageError(
                Reason.IMAGE_TOO_LARGE,
                f"{image.width} x {image.height} pixels is over images.max_pixels={max_pixels}",
            )
        return image.convert("RGB")


@contextmanager
def open_image(content: bytes) -> "Iterator[Image]":
    """Encoded bytes as Pillow opens them: the header is read, pixels when they are asked for. Raises BadImageError."""
    import PIL.Image
    import PIL.ImageFile

    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True
    PIL.Image.MAX_IMAGE_PIXELS = None  # images.max_pixels is checked on every image
    try:
        with warnings.catch_warnings(), PIL.Image.open(BytesIO(content)) as image:
            warnings.simplefilter("ignore")
            yield image
    except BadImageError:
        raise
    except Exception as error:  # Pillow's plugins raise anything on bad bytes (SyntaxError, struct.error, ...)
        # Pillow names the stream by its address, another one in every run.
        reason = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")
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
