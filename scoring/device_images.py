"""Images prepared on the GPU: hardware JPEG decode, then Pillow's resize, for a table of features.

Owns the copies to the device and who gets which place; the decoder is `nvjpeg.py`'s. Bytes come as `features.py` ships them;
what comes out is what an engine takes, uint8 pixels. The caller's stream does the work, so that it overlaps another stream's
forward.
"""

import ctypes
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.decoding import ENCODED, FRAME, PIXELS
from scoring.features import feature_name
from scoring.frame_memory import BUFFER_BYTES, FILE_BYTES, FrameMemory, Reached
from scoring.images import BadImageError, decode_image
from scoring.resample import OVERREAD, Frames, Sizes, resize_frames
from scoring.spec import ImageModel
from scoring.streams import record_event

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Images decoded before they are resized, as far as their frames fit into a buffer.
_DECODED_AT_ONCE = 512
_ALIGNMENT = 256


@dataclass(frozen=True)
class Images:
    """Images of a table, in the order of its rows, (n,) int64 each: row, place among all of them, form (see `decoding.py`),
    width and height, address and length of the bytes, which are the table's."""

    rows: Sizes
    slots: Sizes
    forms: Sizes
    widths: Sizes
    heights: Sizes
    addresses: Sizes
    lengths: Sizes

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: npt.NDArray[Any]) -> "Images":
        """Some of them, by place or by mask."""
        return Images(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


class Decoder(Protocol):
    """Decodes JPEGs on the device, from any thread."""

    def decode(
        self, addresses: Sizes, lengths: Sizes, frames: Frames, stream: Any, order: int
    ) -> npt.NDArray[np.bool_]:
        """Write each image's RGB pixels to its frame, where they are for later work on `stream`; which could be read.

        It may write before `stream` has done what it was given earlier. Of several threads the lowest `order` goes first.
        """


class DeviceImages:
    """The prepared images of one table, on the device: (images + 1, size, size, 3) uint8, the last one blank."""

    def __init__(self, size: int, pixels: "torch.Tensor", slots: npt.NDArray[np.int64]) -> None:
        self._size = size
        self._pixels = pixels
        self._slots = slots

    def take(self, rows: npt.NDArray[np.intp], width: int) -> "torch.Tensor":
        """Pixels (n, width, size, size, 3) of some of the table's rows; places without an image are 0."""
        import torch

        places = torch.from_numpy(self.places(rows, width))
        return self.gather(_to_device(places, self._pixels.device))

    def places(self, rows: npt.NDArray[np.intp], width: int) -> Sizes:
        """Where the images of some of the table's rows are, (n, width)."""
        return np.ascontiguousarray(self._slots[rows, :width])

    def gather(self, places: "torch.Tensor") -> "torch.Tensor":
        """Pixels of `places` (n, width), which are on the device: (n, width, size, size, 3)."""
        return self._pixels.index_select(0, places.view(-1)).view(*places.shape, self._size, self._size, 3)


class ImageStage:
    """Prepares tables of images on one device; without a decoder, tables that have none encoded."""

    def __init__(self, model: ImageModel, device: str, decoder: "Decoder | None", *, max_pixels: int) -> None:
        import torch

        self._model = model
        self._device = torch.device(device)
        self._max_pixels = max_pixels
        self._decoder = decoder
        on_gpu = self._device.type == "cuda"
        record = record_event if on_gpu else Reached
        empty = partial(torch.empty, dtype=torch.uint8)
        self._frames = FrameMemory(partial(empty, device=self._device), record, BUFFER_BYTES)
        # Pinned. From other memory the driver copies each image by itself: 17 us of a turn that all threads wait for.
        self._files = FrameMemory(partial(empty, pin_memory=on_gpu), record, FILE_BYTES)
        self._orders = count()

    def load(self, table: pa.Table) -> tuple[DeviceImages, dict[int, BadImageError]]:
        """The table's images on the device, and the rows with one that cannot be decoded after all.

        Works on the current stream and does not wait for it: the caller does, before another stream uses the result.
        """
        import torch

        images, places = list_images(table, self._model)
        size = self._model.size
        pixels = torch.empty((len(images) + 1, size, size, 3), dtype=torch.uint8, device=self._device)
        pixels[-1].zero_()
        self._upload(images.take(images.forms != ENCODED), pixels)
        encoded = images.take(images.forms == ENCODED)
        failed = self._decode_all(encoded, pixels)
        bad: dict[int, BadImageError] = {}
        if len(failed):
            logger.info(
                "images: the GPU's decoder could not read %d of %d, Pillow decodes them", len(failed), len(encoded)
            )
            self._decode_exactly(failed, pixels, bad)
        places[list(bad)] = len(images)
        return DeviceImages(size, pixels, places), bad

    def _decode_all(self, images: Images, pixels: "torch.Tensor") -> Images:
        """Decode on the hardware and resize; returns what it could not read."""
        is_good = np.ones(len(images), dtype=bool)
        # The table that came first goes first. Where eight took turns, the first one was ready 4.4 s after the engine of an H200,
        # of six with a decoder each after 2.3 s.
        order = next(self._orders)
        for chunk in _chunks(_frame_bytes(images)):
            is_good[chunk] = self._decode(images.take(np.arange(len(images))[chunk]), pixels, order)
        return images.take(~is_good)

    def _decode(self, images: Images, pixels: "torch.Tensor", order: int) -> npt.NDArray[np.bool_]:
        import torch

        ends, file_ends = np.cumsum(_frame_bytes(images)), np.cumsum(images.lengths)
        starts = np.concatenate([[0], ends[:-1]])
        stream = torch.cuda.current_stream() if self._device.type == "cuda" else None
        assert self._decoder is not None, "encoded images are shipped only where the plan says gpu"
        with self._files.lend(int(file_ends[-1])) as files, self._frames.lend(int(ends[-1]) + OVERREAD) as buffer:
            addresses = _gather(images, files)
            frames = Frames(buffer.data_ptr() + starts, images.widths * 3, images.widths, images.heights)
            is_good = self._decoder.decode(addresses, images.lengths, frames, stream, order)
            resize_frames(frames.take(is_good), self._model, images.slots[is_good], pixels)
        return is_good

    def _decode_exactly(self, images: Images, pixels: "torch.Tensor", bad: dict[int, BadImageError]) -> None:
        """What the hardware could not read, by Pillow; what Pillow cannot read either goes to `bad`."""
        good, contents = [], []
        for place, (row, address, length) in enumerate(
            zip(images.rows.tolist(), images.addresses.tolist(), images.lengths.tolist(), strict=True)
        ):
            try:
                decoded = decode_image(ctypes.string_at(address, length), max_pixels=self._max_pixels)
            except BadImageError as error:
                bad.setdefault(row, error)
                continue
            good.append((place, *decoded.size))
            contents.append(np.frombuffer(decoded.tobytes(), dtype=np.uint8))
        places, widths, heights = np.array(good, dtype=np.int64).reshape(-1, 3).T
        kept = images.take(places)
        frames = Images(
            rows=kept.rows,
            slots=kept.slots,
            forms=np.full(len(places), FRAME),
            widths=widths,
            heights=heights,
            addresses=np.array([content.ctypes.data for content in contents], dtype=np.int64),
            lengths=np.array([len(content) for content in contents], dtype=np.int64),
        )
        self._upload(frames, pixels)

    def _upload(self, images: Images, pixels: "torch.Tensor") -> None:
        """Copy prepared images to their places and resize frames into theirs."""
        import torch

        if not len(images):
            return
        # Prepared ones first: they lie as one array then.
        images = images.take(np.argsort(images.forms != PIXELS, kind="stable"))
        ends = np.cumsum(images.lengths)
        starts = ends - images.lengths
        staging = torch.empty(int(ends[-1]) + OVERREAD, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        _gather(images, staging)
        on_device = staging.to(self._device, non_blocking=True)
        num_prepared = int((images.forms == PIXELS).sum())
        if num_prepared:
            prepared = on_device[: int(ends[num_prepared - 1])].view(num_prepared, *pixels.shape[1:])
            slots = torch.from_numpy(np.ascontiguousarray(images.slots[:num_prepared]))
            pixels.index_copy_(0, _to_device(slots, self._device), prepared)
        framed = images.take(np.arange(num_prepared, len(images)))
        addresses = on_device.data_ptr() + starts[num_prepared:]
        frames = Frames(addresses, framed.widths * 3, framed.widths, framed.heights)
        # On the current stream, as `on_device` is: its memory is not used again before that is done.
        resize_frames(frames, self._model, framed.slots, pixels)


def _frame_bytes(images: Images) -> Sizes:
    sizes: Sizes = -(-images.widths * images.heights * 3 // _ALIGNMENT) * _ALIGNMENT
    return sizes


def _chunks(sizes: Sizes) -> Iterator[slice]:
    """Images that are decoded together: as many as a buffer holds, at least one."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        limit = BUFFER_BYTES + (int(ends[start - 1]) if start else 0)
        fitting = int(np.searchsorted(ends, limit, side="right"))
        stop = max(start + 1, min(start + _DECODED_AT_ONCE, fitting))
        yield slice(start, stop)
        start = stop


def _gather(images: Images, memory: "torch.Tensor") -> Sizes:
    """Copy the images' bytes there, one behind the other; their new addresses."""
    starts: Sizes = np.cumsum(images.lengths) - images.lengths
    for address, start, length in _runs(images.addresses, images.lengths, starts):
        ctypes.memmove(memory.data_ptr() + start, address, length)
    return memory.data_ptr() + starts


def _runs(addresses: Sizes, lengths: Sizes, starts: Sizes) -> "list[tuple[int, int, int]]":
    """(address, place, bytes) of each stretch of images that lie one behind the other, as they do in a block."""
    first = np.flatnonzero(np.concatenate([[True], addresses[1:] != addresses[:-1] + lengths[:-1]]))
    sums = np.add.reduceat(lengths, first)
    return list(zip(addresses[first].tolist(), starts[first].tolist(), sums.tolist(), strict=True))


def _to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def list_images(table: pa.Table, model: ImageModel) -> tuple[Images, Sizes]:
    """A table's valid images, and each row's places among them (rows, most images of a row), their number where there is none.

    The images' bytes are the table's: it must stay.
    """
    valid_num = table[feature_name(model.prefix, "valid_num")].to_numpy().astype(np.int64)
    blank_num = table[feature_name(model.prefix, "zero_num")].to_numpy()
    num = int(valid_num.sum())
    rows = np.repeat(np.arange(len(valid_num)), valid_num)
    first = np.cumsum(valid_num) - valid_num  # each row's first image
    width = max(1, int((valid_num + blank_num).max(initial=1)))
    column = np.arange(width)
    places = np.where(column < valid_num[:, None], first[:, None] + column, num)
    name = feature_name(model.prefix, "form")
    if name in table.column_names:
        forms = table[name].to_numpy().astype(np.int64)[rows]
        shapes = _flat(table[feature_name(model.prefix, "sizes")]).reshape(-1, 3)
    else:
        forms = np.full(num, PIXELS)
        shapes = np.tile(np.array([model.size, model.size, model.size * model.size * 3], dtype=np.int64), (num, 1))
    widths, heights, lengths = np.ascontiguousarray(shapes.T)
    ends = np.cumsum(lengths)
    in_row = (ends - lengths) - (ends - lengths)[first[rows]] if num else ends
    starts = _addresses(table[feature_name(model.prefix, "pixels")])
    return Images(rows, np.arange(num), forms, widths, heights, starts[rows] + in_row, lengths), places


def _flat(column: pa.ChunkedArray) -> Sizes:
    """The values of a column of lists, one after the other."""
    flat: Sizes = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks] or [[]]).astype(np.int64)
    return flat


def _addresses(column: pa.ChunkedArray) -> Sizes:
    """Where each row's bytes start in memory."""
    found = [np.empty(0, dtype=np.int64)]
    for chunk in column.chunks:
        _, offsets_buffer, data = chunk.buffers()
        offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk)]
        found.append(offsets + (data.address if data is not None else 0))
    return np.concatenate(found)
