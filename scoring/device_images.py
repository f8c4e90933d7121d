"""Images prepared on the GPU: hardware JPEG decode, then Pillow's resize, for a table of features.

Owns the decoder, the copies to the device and who gets which place. Bytes come as `features.py` ships them; what comes out is
what an engine takes, uint8 pixels. The caller's stream does the work, so that it overlaps another stream's forward.
"""

import logging
import queue
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.decoding import ENCODED, FRAME, PIXELS
from scoring.engines.base import EngineUnavailable
from scoring.features import feature_name
from scoring.images import BadImageError, decode_image
from scoring.resample import Frames, resize_frames
from scoring.spec import ImageModel

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

# Threads of the decoder's own (it parses headers and feeds the engine): 4 gave 24,200 images/s, 1 and 8 19,500.
_DECODER_THREADS = 4
# Upsampling as Pillow does it. One image a stream instead of one call for all: what the decoder does on the GPU's cores waits
# for the forward's kernels, and the more images are on their way the less that matters. Rows/s beside a forward: 9,100 with
# one call, 12,200 with a stream an image, 14,400 with two such decoders (one call: 10,400).
_OPTIONS = ":fancy_upsampling=1 :force_batch_single=1"
NUM_DECODERS = 2
# Images a call: 512 were faster than 2,048 (24,200 against 20,700 images/s).
_DECODED_AT_ONCE = 512
_SWITCH_S = 1e-4


class _Image(NamedTuple):
    """One valid image of a table: its row, its place among all of them, its form, size and bytes."""

    row: int
    slot: int
    form: int
    width: int
    height: int
    content: Bytes


class Decoder(Protocol):
    """Decodes JPEGs on the device, one call at a time."""

    def decode(self, contents: Sequence[Bytes]) -> "AbstractContextManager[list[Any]]":
        """RGB frames, None where one cannot be read; work on the current stream may read them inside the `with`."""


class DeviceImages:
    """The prepared images of one table, on the device: (images + 1, size, size, 3) uint8, the last one blank."""

    def __init__(self, size: int, pixels: "torch.Tensor", slots: npt.NDArray[np.int64]) -> None:
        self._size = size
        self._pixels = pixels
        self._slots = slots

    def take(self, rows: npt.NDArray[np.intp], width: int) -> "torch.Tensor":
        """Pixels (n, width, size, size, 3) of some of the table's rows; places without an image are 0."""
        import torch

        index = torch.from_numpy(np.ascontiguousarray(self._slots[rows, :width].reshape(-1)))
        index = _to_device(index, self._pixels.device)
        return self._pixels.index_select(0, index).view(len(rows), width, self._size, self._size, 3)


class ImageStage:
    """Prepares tables of images on one device; without decoders, tables that have none encoded."""

    def __init__(self, model: ImageModel, device: str, decoders: "Sequence[Decoder]", *, max_pixels: int) -> None:
        import torch

        self._model = model
        self._device = torch.device(device)
        self._max_pixels = max_pixels
        self._decoders: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        for decoder in decoders:
            self._decoders.put(decoder)

    def load(self, table: pa.Table) -> tuple[DeviceImages, dict[int, BadImageError]]:
        """The table's images on the device, and the rows with one that cannot be decoded after all.

        Works on the current stream and waits for it at the end, so that any other stream may read the result. Threads with
        a decoder each work side by side; others wait for one.
        """
        import torch

        images, slots = list_images(table, self._model)
        size = self._model.size
        pixels = torch.empty((len(images) + 1, size, size, 3), dtype=torch.uint8, device=self._device)
        pixels[-1].zero_()
        shipped = [image for image in images if image.form != ENCODED]
        encoded = [image for image in images if image.form == ENCODED]
        held = [self._upload(shipped, pixels)]
        failed = self._decode_all(encoded, pixels) if encoded else []
        bad: dict[int, BadImageError] = {}
        if failed:
            logger.info(
                "images: the GPU's decoder could not read %d of %d, Pillow decodes them", len(failed), len(encoded)
            )
        held.append(self._upload(self._decode_exactly(failed, bad), pixels))
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        del held
        for image in images:
            if image.row in bad:
                slots[image.row] = len(images)
        return DeviceImages(size, pixels, slots), bad

    def _decode_all(self, images: Sequence[_Image], pixels: "torch.Tensor") -> list[_Image]:
        """Decode on the hardware and resize; returns what it could not read."""
        decoder = self._decoders.get()  # there are some: encoded images are shipped only where the plan says gpu
        try:
            chunks = [images[start : start + _DECODED_AT_ONCE] for start in range(0, len(images), _DECODED_AT_ONCE)]
            return [image for chunk in chunks for image in self._decode(decoder, chunk, pixels)]
        finally:
            self._decoders.put(decoder)

    def _decode(self, decoder: "Decoder", images: Sequence[_Image], pixels: "torch.Tensor") -> list[_Image]:
        failed, decoded = [], []
        with decoder.decode([image.content for image in images]) as found:
            for image, frame in zip(images, found, strict=True):
                # A decoder that disagrees with the header about the size read something else.
                if frame is None or (frame.width, frame.height) != (image.width, image.height):
                    failed.append(image)
                else:
                    decoded.append((image, frame))
            if decoded:
                arrays = [frame.__cuda_array_interface__ for _, frame in decoded]
                widths = np.array([image.width for image, _ in decoded], dtype=np.int64)
                frames = Frames(
                    addresses=np.array([array["data"][0] for array in arrays], dtype=np.int64),
                    pitches=np.array([(array["strides"] or (array["shape"][1] * 3,))[0] for array in arrays]),
                    widths=widths,
                    heights=np.array([image.height for image, _ in decoded], dtype=np.int64),
                )
                slots = np.array([image.slot for image, _ in decoded], dtype=np.int64)
                resize_frames(frames, self._model, slots, pixels)
        return failed

    def _decode_exactly(self, images: Sequence[_Image], bad: dict[int, BadImageError]) -> list[_Image]:
        """What the hardware could not read, as frames by Pillow; what Pillow cannot read either goes to `bad`."""
        frames = []
        for image in images:
            try:
                decoded = decode_image(image.content.tobytes(), max_pixels=self._max_pixels)
            except BadImageError as error:
                bad.setdefault(image.row, error)
                continue
            content = np.frombuffer(decoded.tobytes(), dtype=np.uint8)
            frames.append(image._replace(form=FRAME, width=decoded.width, height=decoded.height, content=content))
        return frames

    def _upload(self, images: Sequence[_Image], pixels: "torch.Tensor") -> "torch.Tensor | None":
        """Copy prepared images to their places and resize frames into theirs; hold the result until that is done."""
        import torch

        if not images:
            return None
        # Prepared ones first: they lie as one array then.
        ordered = sorted(images, key=lambda image: image.form != PIXELS)
        ends = np.cumsum([len(image.content) for image in ordered])
        starts = ends - [len(image.content) for image in ordered]
        staging = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        view = staging.numpy()
        for image, start, end in zip(ordered, starts, ends, strict=True):
            view[start:end] = image.content
        on_device = staging.to(self._device, non_blocking=True)
        num_prepared = sum(image.form == PIXELS for image in ordered)
        slots = np.array([image.slot for image in ordered], dtype=np.int64)
        if num_prepared:
            prepared = on_device[: int(ends[num_prepared - 1])].view(num_prepared, *pixels.shape[1:])
            pixels.index_copy_(0, _to_device(torch.from_numpy(slots[:num_prepared]), self._device), prepared)
        if num_prepared < len(ordered):
            framed = ordered[num_prepared:]
            widths = np.array([image.width for image in framed], dtype=np.int64)
            frames = Frames(
                addresses=on_device.data_ptr() + starts[num_prepared:].astype(np.int64),
                pitches=widths * 3,
                widths=widths,
                heights=np.array([image.height for image in framed], dtype=np.int64),
            )
            resize_frames(frames, self._model, slots[num_prepared:], pixels)
        return on_device


def _to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def list_images(table: pa.Table, model: ImageModel) -> tuple[list[_Image], npt.NDArray[np.int64]]:
    """A table's valid images, and each row's places in the list (rows, most images of a row), its end where there is none."""
    valid_num = table[feature_name(model.prefix, "valid_num")].to_numpy()
    blank_num = table[feature_name(model.prefix, "zero_num")].to_numpy()
    width = max(1, int((valid_num + blank_num).max(initial=1)))
    name = feature_name(model.prefix, "form")
    forms = table[name].to_numpy() if name in table.column_names else np.full(len(valid_num), PIXELS)
    sizes = table[feature_name(model.prefix, "sizes")].to_pylist() if name in table.column_names else None
    slots = np.full((len(valid_num), width), int(valid_num.sum()), dtype=np.int64)
    images: list[_Image] = []
    for row, content in enumerate(_payloads(table[feature_name(model.prefix, "pixels")])):
        num, start = int(valid_num[row]), 0
        shapes = sizes[row] if sizes else (model.size, model.size, model.size * model.size * 3) * num
        for place in range(num):
            image_width, image_height, length = shapes[3 * place : 3 * place + 3]
            slots[row, place] = len(images)
            end = start + length
            images.append(_Image(row, len(images), int(forms[row]), image_width, image_height, content[start:end]))
            start = end
    return images, slots


def _payloads(column: pa.ChunkedArray) -> Iterator[Bytes]:
    """The bytes of each row, without a copy."""
    for chunk in column.chunks:
        _, offsets_buffer, data = chunk.buffers()
        offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        values = np.frombuffer(data, dtype=np.uint8) if data is not None else np.empty(0, dtype=np.uint8)
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            yield values[start:end]


class HardwareDecoder:
    """nvImageCodec with the GPU's JPEG engine first; frames it returns are valid inside the `with` that asked for them.

    Raises EngineUnavailable where it is not installed.
    """

    def __init__(self) -> None:
        try:
            from nvidia import nvimgcodec
        except ImportError as error:
            raise EngineUnavailable(
                f"nvImageCodec is missing ({error}); install multimodal-scorer[gpu-images]"
            ) from error
        # It asks for Python's lock at every image, and waited 5 ms for each while another thread was busy: 2,048 images took
        # 19 s.
        sys.setswitchinterval(_SWITCH_S)
        self._codec = nvimgcodec
        kinds = (nvimgcodec.BackendKind.HW_GPU_ONLY, nvimgcodec.BackendKind.GPU_ONLY)
        self._decoder = nvimgcodec.Decoder(
            device_id=0,
            max_num_cpu_threads=_DECODER_THREADS,
            backends=[nvimgcodec.Backend(kind) for kind in kinds],
            options=_OPTIONS,
        )
        # Upstream does not turn images by their EXIF either.
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
        # Two sets of frames in turn: the resize still reads one while the next is decoded into the other.
        self._sets: list[tuple[list[Any], Any]] = [([], None), ([], None)]

    @contextmanager
    def decode(self, contents: Sequence[Bytes]) -> Iterator[list[Any]]:
        """RGB frames of JPEGs, None where one cannot be read; work on the current stream may read them."""
        import torch

        stream = torch.cuda.current_stream()
        spare, was_read = self._sets.pop(0)
        if was_read is not None:
            was_read.synchronize()
        try:
            streams = [self._codec.CodeStream(content) for content in contents]
            common = {"params": self._params, "cuda_stream": stream.cuda_stream}
            if len(spare) >= len(streams):
                frames = self._decoder.decode(streams, images=spare[: len(streams)], **common)
            else:
                frames = self._decoder.decode(streams, **common)
                spare = max([frame for frame in frames if frame is not None], spare, key=len)
            yield frames
        finally:
            read = torch.cuda.Event()  # type: ignore[no-untyped-call]
            read.record(stream)
            self._sets.append((spare, read))
