"""What every engine is: named arrays in, logits out, and the shapes it is given.

Owns the interface and the padding of a batch to a shape. Engines that build something for a shape (TensorRT profiles, CUDA
graphs) see only shapes of `Shapes`: an unseen one cost 19 to 100 s where upstream rebuilt its engine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from scoring.flat import ROWS, TOKENS, BatchArrays, Input, Logits, Precision
from scoring.spec import FeatureSpec

if TYPE_CHECKING:
    import torch

# Texts padded to the next power of two are a quarter of a batch's work for nothing. Steps at 80 and 160 save 2 % of an H100's
# forward of texts of 60 tokens (by the rates of h100-pipeline.json's L); with 17 steps up to 512 it is 4 %, but each is a CUDA
# graph more for each row count, captured in 0.1 s, and 11 steps are ahead up to some 3 million rows.
_TOKEN_STEPS = (32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
# On the CPU, see `alike`.
_CPU_ROWS, _CPU_TOKENS, _LONG_TOKENS, _LONG = 16, 16, 128, 256
# A group of rows is padded to one of these shares of a full batch: on an H100 128 rows run at 3/4 of the rate of 512.
_ROW_SHARES = (16, 8, 4, 2, 1)


class EngineUnavailable(Exception):  # noqa: N818 -- not an error of the run until a named engine raises it
    """This engine cannot run here; the text is the reason, and what would make it run."""


class Engine(Protocol):
    """Runs one predictor's network."""

    @property
    def provider(self) -> str:
        """auto's ladder and the configuration call it this."""

    @property
    def precision(self) -> Precision:
        """What it computes in."""

    @property
    def device(self) -> str:
        """The GPU's product name, or cpu."""

    def forward(self, arrays: BatchArrays) -> Logits:
        """Logits (n, classes) or (n, 1) of a batch, float32 on the host, rows in order."""

    def submit(self, arrays: BatchArrays) -> "Logits | torch.Tensor":
        """As `forward`, without waiting for a GPU: its logits are a tensor there."""

    def warm_up(self) -> None:
        """Wait for what it still prepares beside its first batches; it scores without, less fast."""

    def close(self) -> None:
        """Free the engine's memory; it is not used again."""


@dataclass(frozen=True)
class Shapes:
    """The row and token counts that batches are padded to, ascending; no tokens: no text. One shape is one pair."""

    rows: tuple[int, ...]
    tokens: tuple[int, ...]

    @staticmethod
    def of(spec: FeatureSpec, batch_rows: int) -> "Shapes":
        """Powers of two up to the predictor's longest text, and shares of `batch_rows`."""
        longest = max((model.max_len for model in spec.text_models), default=0) if spec.text else 0
        tokens = [step for step in _TOKEN_STEPS if step < longest]
        rows = sorted({max(1, batch_rows // share) for share in _ROW_SHARES})
        return Shapes(tuple(rows), (*tokens, longest) if longest else ())

    def fit(self, rows: int, tokens: int) -> tuple[int, int]:
        """The smallest shape that holds a batch; sizes past the largest stay as they are."""
        return _round_up(rows, self.rows), _round_up(tokens, self.tokens)


def _round_up(size: int, steps: tuple[int, ...]) -> int:
    return next((step for step in steps if step >= size), size)


def num_rows(arrays: BatchArrays) -> int:
    return len(next(iter(arrays.values())))


def num_tokens(arrays: BatchArrays) -> int:
    """The widest token array of a batch; 0 without text."""
    return max((array.shape[1] for name, array in arrays.items() if name.endswith(":token_ids")), default=0)


def pad_arrays(arrays: BatchArrays, rows: int, tokens: int) -> dict[str, npt.NDArray[Any]]:
    """Grow a batch to `rows` x `tokens`: rows repeat the last one, tokens past a text's end are masked by its length.

    Arrays may be tensors on the device, which stay there.
    """
    missing_rows = rows - num_rows(arrays)
    padded: dict[str, Any] = {}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # on the device already
            padded[name] = repeat_last(array, missing_rows) if missing_rows else array
            continue
        widths = [(0, 0)] * array.ndim
        if name.endswith((":token_ids", ":segment_ids")) and array.shape[1] < tokens:
            widths[1] = (0, tokens - array.shape[1])
            array = np.pad(array, widths)
        if missing_rows:
            array = np.concatenate([array, np.repeat(array[-1:], missing_rows, axis=0)])
        padded[name] = array
    return padded


def repeat_last(tensor: "torch.Tensor", times: int) -> "torch.Tensor":
    """As `np.repeat` for the host's arrays; an index from the host would make it wait for all work of the stream."""
    import torch

    return torch.cat([tensor, tensor[-1:].expand(times, *tensor.shape[1:])])


def alike(
    arrays: BatchArrays, max_tokens: Mapping[str, int]
) -> Iterator[tuple[npt.NDArray[np.intp], dict[str, npt.NDArray[Any]]]]:
    """A host batch in groups in which torch gives a row the same bits whatever rows are beside it: their places, and arrays.

    `max_tokens` is the longest text of each text model, by prefix. A group has a multiple of 16 rows, more than its places:
    the last one repeated. Products end in other kernels where rows are no such multiple (38 of 200 rows of ELECTRA differed,
    by up to 5e-7), and softmax where tokens are none (9 of 200). Beyond 256 tokens (AVX2; 384 with AVX-512) sums over tokens
    are cut at a share of the padded length, so that these rows are only with those of the same one, as they are where
    the longest text is no multiple of 16. Rows of another number of images are apart.
    """
    padded: dict[str, npt.NDArray[np.int64]] = {}
    kinds = [np.zeros(num_rows(arrays), dtype=np.int64)]
    for name, counts in arrays.items():
        prefix, _, content = name.partition(":")
        if content == "valid_length":
            step = np.where(counts <= _LONG, _CPU_TOKENS, _LONG_TOKENS)
            tokens = np.maximum(counts, np.minimum(-(-counts // step) * step, max_tokens[prefix]))
            padded[f"{prefix}:token_ids"] = padded[f"{prefix}:segment_ids"] = tokens
            kinds.append(np.where((tokens > _LONG) | (tokens % _CPU_TOKENS > 0), tokens, 0))
        elif content == "image_num":
            padded[f"{prefix}:pixels"] = np.maximum(counts, 1)
            kinds.append(counts)
    stacked = np.stack(kinds, axis=1)
    for kind in np.unique(stacked, axis=0):
        places = np.flatnonzero((stacked == kind).all(axis=1))
        group = {name: array[places] for name, array in arrays.items()}
        for name, sizes in padded.items():
            group[name] = _resize(group[name], int(sizes[places].max()))
        yield places, pad_arrays(group, -(-len(places) // _CPU_ROWS) * _CPU_ROWS, 0)


def _resize(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Cut or padded with zeros to `size` along the second axis."""
    missing = max(0, size - array.shape[1])
    return np.pad(array, [(0, 0), (0, missing)]) if missing else array[:, :size]


def sizes_of(item: Input, rows: int, tokens: int, images: Mapping[str, int]) -> tuple[int, ...]:
    """An input's shape with its free axes filled in."""
    known = {ROWS: rows, TOKENS: tokens, **images}
    return tuple(known[size] if isinstance(size, str) else size for size in item.shape)
