"""Raw columns to model-ready arrays, by the feature spec alone.

Owns the arithmetic of upstream's processors (numbers, categories, tokens, pixels) without importing them: arrow, numpy,
Pillow and tokenizers, 0.4 s and 66 MB a process. Does not read files of rows (`source`), cast their cells (`columns`) or
touch a model. A row that cannot be prepared gets a stage, a reason and a message and travels on beside its batch.

Columns in (see `columns.py`): `model:<name>` in canonical types, `keep:<name>`, identity, `stage`/`reason`/`message`.
Columns out: the same less `model:*`, plus `feat:*`: `feat:numerical` and `feat:categorical` (fixed-size lists, float32
and int32), and a model prefix's `feat:<prefix>:token_ids`, `:segment_ids` (int32 lists), `:pixels` (uint8, valid images one
after another, height x width x RGB), `:valid_num`, `:zero_num` (int32). Where a GPU prepares the images, `:pixels` holds
what it starts from, and each row's `:form` (int8, see `decoding.py`) and `:sizes` (int32 list: width, height and bytes of
each image) say what that is.
"""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from scoring.columns import MODEL_PREFIX, SOURCE_ROW, mark_rows
from scoring.decoding import ENCODED, PIXELS, DecodePlan, Prepared, find_encoded, prepare
from scoring.errors import Reason, Stage
from scoring.images import BadImageError, ImageFetcher, Reference, split_references
from scoring.sequences import TokenSequences
from scoring.spec import CategoricalColumn, FeatureSpec, ImageModel, NumericalColumn, TextColumn
from scoring.storage import redact

logger = logging.getLogger(__name__)

FEATURE_PREFIX = "feat:"
NUMERICAL = FEATURE_PREFIX + "numerical"
CATEGORICAL = FEATURE_PREFIX + "categorical"

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Fetched = tuple[Reference, bytes | BadImageError | None]
"""What a cell named and what was found there: encoded bytes, why not, or None for a missing image."""
ModelImages = tuple[list[Prepared], int]
"""A row's valid images for one model, and how many are blank."""

_SHOWN_CHARS = 300


class FeatureBuilder:
    """Applies one spec to tables of raw columns; built once a worker (it parses the tokenizers)."""

    def __init__(
        self,
        spec: FeatureSpec,
        fetcher: ImageFetcher,
        plan: DecodePlan | None = None,
        *,
        blank_bad_images: bool = False,
    ) -> None:
        self._spec = spec
        self._fetcher = fetcher
        self._plan = plan or DecodePlan()
        self._blank_bad_images = blank_bad_images
        self._tokenizers = [TokenSequences(model) for model in spec.text_models]
        self._image_names = [MODEL_PREFIX + column.name for column in spec.image]
        self._blanked: list[str] = []

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace the `model:*` columns by `feat:*`; rows, their order and their identity stay.

        Rows that arrive with a reason get empty features. Raises nothing for a bad row: it is marked.
        """
        features: dict[str, pa.Array] = {}
        usable = pc.is_null(table["reason"]).to_numpy(zero_copy_only=False)
        if self._spec.numerical and self._spec.numerical_models:
            features[NUMERICAL] = _fixed_lists([self._numbers(table, column) for column in self._spec.numerical])
        if self._spec.categorical and self._spec.categorical_models:
            features[CATEGORICAL] = _fixed_lists([self._codes(table, column) for column in self._spec.categorical])
        if self._spec.text:
            features |= self._tokens(table)
        bad: dict[int, BadImageError] = {}
        if self._spec.image:
            images, bad = self._images(table, usable)
            features |= images
        rest = table.drop_columns([name for name in table.column_names if name.startswith(MODEL_PREFIX)])
        marked = mark_rows(rest, Stage.FEATURES, {row: (error.reason, str(error)) for row, error in bad.items()})
        for name, values in features.items():
            marked = marked.append_column(name, values)
        return marked

    @staticmethod
    def _numbers(table: pa.Table, column: NumericalColumn) -> Float32:
        return scale_numbers(table[MODEL_PREFIX + column.name], column)

    @staticmethod
    def _codes(table: pa.Table, column: CategoricalColumn) -> Int32:
        return encode_categories(table[MODEL_PREFIX + column.name], column)

    def _tokens(self, table: pa.Table) -> dict[str, pa.Array]:
        texts = {column.name: write_text(table[MODEL_PREFIX + column.name], column) for column in self._spec.text}
        arrays: dict[str, pa.Array] = {}
        for sequences in self._tokenizers:
            token_ids, segment_ids = sequences.build(texts)
            arrays[feature_name(sequences.model.prefix, "token_ids")] = token_ids
            arrays[feature_name(sequences.model.prefix, "segment_ids")] = segment_ids
        return arrays

    def _images(
        self, table: pa.Table, usable: npt.NDArray[np.bool_]
    ) -> tuple[dict[str, pa.Array], dict[int, BadImageError]]:
        on_cpu = share_of_rows(table[SOURCE_ROW].to_numpy(), self._plan.cpu_share)
        encoded = self._find_encoded(table, usable & ~on_cpu)
        is_encoded = encoded[:, 0] > 0
        images = self._fetch(table, usable & ~is_encoded)
        rows = [self._row_images(images.get(row), bool(on_cpu[row])) for row in range(table.num_rows)]
        bad = {row: images for row, images in enumerate(rows) if isinstance(images, BadImageError)}
        if self._blanked:
            logger.warning(
                "images.on_error=blank: %d images scored as black, first: %s", len(self._blanked), self._blanked[0]
            )
            self._blanked.clear()
        arrays: dict[str, pa.Array] = {}
        for position, model in enumerate(self._spec.image_models):
            empty: ModelImages = ([], 0)
            per_row = [empty if isinstance(images, BadImageError) else images[position] for images in rows]
            arrays |= _pixel_columns(model, per_row)
            if self._plan.uses_gpu:
                arrays |= _form_columns(model, per_row)
        if is_encoded.any():
            arrays = _with_encoded(arrays, self._spec.image_models[0], table[self._image_names[0]], encoded)
        return arrays, bad

    def _find_encoded(self, table: pa.Table, candidates: npt.NDArray[np.bool_]) -> Int32:
        """See `find_encoded`; none where a row's image is not one cell's bytes, or nothing ships as it is."""
        name = self._image_names[0]
        if (
            self._plan.mode != "gpu"
            or len(self._image_names) > 1
            or len(self._spec.image_models) > 1
            or not pa.types.is_binary(table.schema.field(name).type)
        ):
            return np.zeros((table.num_rows, 3), dtype=np.int32)
        is_valid = pc.is_valid(table[name]).to_numpy(zero_copy_only=False)
        return find_encoded(table[name], candidates & is_valid, self._fetcher.max_pixels)

    def _fetch(self, table: pa.Table, wanted: npt.NDArray[np.bool_]) -> dict[int, list[list[Fetched]]]:
        """What the wanted rows' cells name, by row and column."""
        max_images = max(model.max_images for model in self._spec.image_models)
        cells = table.select(self._image_names).filter(pa.array(wanted))
        references = [
            split_references(cells[name], column, max_images)
            for name, column in zip(self._image_names, self._spec.image, strict=True)
        ]
        named = [list(row) for row in zip(*references, strict=True)]
        fetched = [
            [list(zip(*column, strict=True)) for column in zip(names, contents, strict=True)]
            for names, contents in zip(named, self._fetcher.fetch_all(named), strict=True)
        ]
        return dict(zip(np.flatnonzero(wanted).tolist(), fetched, strict=True))

    def _row_images(self, columns: list[list[Fetched]] | None, on_cpu: bool) -> list[ModelImages] | BadImageError:
        """One row's images a model, or the first thing wrong with it."""
        if columns is None:
            return [([], 0) for _ in self._spec.image_models]
        try:
            return [self._model_images(model, columns, self._plan, on_cpu) for model in self._spec.image_models]
        except BadImageError as error:
            return error

    def _model_images(
        self, model: ImageModel, columns: list[list[Fetched]], plan: DecodePlan, on_cpu: bool
    ) -> ModelImages:
        valid: list[Prepared] = []
        num_blank = 0
        for images in columns:
            for reference, content in images[: model.max_images]:
                image = self._prepared(model, reference, content, plan, on_cpu)
                if image is None:
                    num_blank += 1
                else:
                    valid.append(image)
        # A row has one form: where its images differ, all of them are prepared here.
        if len({image.form for image in valid}) > 1:
            return self._model_images(model, columns, DecodePlan(), on_cpu)
        return valid, num_blank

    def _prepared(
        self,
        model: ImageModel,
        reference: Reference,
        content: bytes | BadImageError | None,
        plan: DecodePlan,
        on_cpu: bool,
    ) -> Prepared | None:
        """One image on its way to the model; None is a blank image (a null under the predictor's `zero` rule)."""
        if content is None:
            if self._spec.skip_missing:
                raise BadImageError(
                    Reason.IMAGE_MISSING, "the image is null and the predictor was trained to skip such rows"
                )
            return None
        try:
            if isinstance(content, BadImageError):
                raise content
            return prepare(content, model, plan, on_cpu=on_cpu, max_pixels=self._fetcher.max_pixels)
        except BadImageError as error:
            if self._blank_bad_images:
                self._blanked.append(
                    f"{redact(reference)[:_SHOWN_CHARS]}: {error}" if isinstance(reference, str) else str(error)
                )
                return None
            if content is error or not isinstance(reference, str):
                raise
            raise BadImageError(error.reason, f"{redact(reference)[:_SHOWN_CHARS]}: {error}") from error


def feature_name(prefix: str, key: str) -> str:
    """The block column of one model's feature, e.g. `feat:hf_text:token_ids`."""
    return f"{FEATURE_PREFIX}{prefix}:{key}"


def scale_numbers(values: pa.ChunkedArray, column: NumericalColumn) -> Float32:
    """float64 with nulls (n,) -> float32 (n,): SimpleImputer, then StandardScaler, in upstream's order of operations."""
    numbers: Float64 = pc.fill_null(values, column.fill).to_numpy().astype(np.float64)
    if column.mean is not None:
        numbers -= column.mean
    if column.scale is not None:
        numbers /= column.scale
    return numbers.astype(np.float32)


def encode_categories(values: pa.ChunkedArray, column: CategoricalColumn) -> Int32:
    """Canonical category values (n,) -> int32 codes (n,); unseen and null values get the unknown code."""
    known = pa.array(column.values, type=values.type)
    codes = pc.fill_null(pc.index_in(values, value_set=known), column.unknown)
    encoded: Int32 = codes.to_numpy().astype(np.int32)
    if column.fill is not None:
        encoded[pc.is_null(values).to_numpy(zero_copy_only=False)] = column.fill
    return encoded


def write_text(values: pa.ChunkedArray, column: TextColumn) -> pa.LargeStringArray:
    """The text upstream feeds the tokenizer: null is empty; categories and numbers are written out by its templates."""
    if column.origin == "numerical":
        numbers = [f"{float('nan') if value is None else value:.3f}" for value in values.to_pylist()]
        return pa.array(numbers, pa.large_string())
    texts = pc.fill_null(values, "").cast(pa.large_string()).combine_chunks()
    if column.origin == "text" or column.template == "direct":
        return texts
    frames = {"list": f"{column.name}: {{}}", "text": f"{column.name} is {{}}", "latex": "{} & "}
    present = pc.is_valid(values).to_pylist()
    # replace, not format: a column name or a value may hold braces.
    frame = frames[column.template]
    written = [
        frame.replace("{}", text) if valid else "" for text, valid in zip(texts.to_pylist(), present, strict=True)
    ]
    return pa.array(written, pa.large_string())


def _fixed_lists(columns: list[npt.NDArray[Any]]) -> pa.Array:
    """k arrays (n,) -> one fixed-size list array of n lists of k."""
    flat = np.ascontiguousarray(np.stack(columns, axis=1)).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), len(columns))


def _pixel_columns(model: ImageModel, rows: list[ModelImages]) -> dict[str, pa.Array]:
    contents = [b"".join(image.content for image in valid) for valid, _ in rows]
    return {
        feature_name(model.prefix, "pixels"): pa.array(contents, type=pa.large_binary()),
        feature_name(model.prefix, "valid_num"): pa.array([len(valid) for valid, _ in rows], type=pa.int32()),
        feature_name(model.prefix, "zero_num"): pa.array([blank for _, blank in rows], type=pa.int32()),
    }


def _form_columns(model: ImageModel, rows: list[ModelImages]) -> dict[str, pa.Array]:
    forms = [valid[0].form if valid else PIXELS for valid, _ in rows]
    sizes = [[size for image in valid for size in (image.width, image.height, len(image.content))] for valid, _ in rows]
    return {
        feature_name(model.prefix, "form"): pa.array(forms, type=pa.int8()),
        feature_name(model.prefix, "sizes"): pa.array(sizes, type=pa.list_(pa.int32())),
    }


def _with_encoded(
    arrays: dict[str, pa.Array], model: ImageModel, cells: pa.ChunkedArray, encoded: Int32
) -> dict[str, pa.Array]:
    """The image columns with the cells of those rows put in that `find_encoded` found, which have no image in them."""
    is_encoded = encoded[:, 0] > 0
    pixels, valid_num, form, sizes = (
        feature_name(model.prefix, key) for key in ("pixels", "valid_num", "form", "sizes")
    )
    lengths = np.where(is_encoded, 3, arrays[sizes].value_lengths().to_numpy())
    flat = np.empty(int(lengths.sum()), dtype=np.int32)
    is_theirs = np.repeat(is_encoded, lengths)
    flat[is_theirs] = encoded[is_encoded].ravel()
    flat[~is_theirs] = arrays[sizes].flatten().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    others, contents = arrays[pixels], cells.cast(pa.large_binary())
    own = np.concatenate([np.diff(_offsets(chunk)) for chunk in contents.chunks])
    if own[~is_encoded].any() or pc.max(pc.binary_length(others)).as_py():
        contents = pc.if_else(pa.array(is_encoded), contents, others)
    else:
        # The others have no image at all. A copy of all bytes, only to leave nulls out, was an eighth of the work.
        contents = pa.chunked_array([_without_nulls(chunk) for chunk in contents.chunks], contents.type)
    return {
        **arrays,
        pixels: contents,
        valid_num: pc.if_else(pa.array(is_encoded), pa.scalar(1, pa.int32()), arrays[valid_num]),
        form: pc.if_else(pa.array(is_encoded), pa.scalar(ENCODED, pa.int8()), arrays[form]),
        sizes: pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)),
    }


def _offsets(array: pa.LargeBinaryArray) -> npt.NDArray[np.int64]:
    """Where each value starts among the array's bytes, and where the last one ends."""
    found: npt.NDArray[np.int64] = np.frombuffer(array.buffers()[1], dtype=np.int64)
    return found[array.offset : array.offset + len(array) + 1]


def _without_nulls(array: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """The values with what lies in a null's place, which stays where it is."""
    _, offsets, data = array.buffers()
    return pa.Array.from_buffers(array.type, len(array), [None, offsets, data], 0, array.offset)


def share_of_rows(source_rows: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Which rows belong to a share of all (0 to 1): the same ones in every run, spread evenly over a file."""
    spread = (source_rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    chosen: npt.NDArray[np.bool_] = spread < np.uint64(share * 2**32)
    return chosen
