"""How rows are cut into micro-batches and batches padded: every row once, shapes that engines have, little padding."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from scoring.collate import collate, cut, micro_batches
from scoring.engines.base import Shapes, alike
from scoring.spec import FeatureSpec, ImageColumn, ImageModel, TextColumn, TextModel

SHAPES = Shapes((32, 64, 128, 256, 512), (32, 48, 64, 96, 128, 192, 256, 384, 512))
BUDGET = 512 * 128


def lengths(rows: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Token counts as texts have them: log-normal around 60, up to 512."""
    drawn = np.random.default_rng(seed).lognormal(4.1, 0.6, rows)
    return np.sort(np.clip(drawn, 2, 512).astype(np.int64))


@pytest.mark.parametrize("rows", [1, 31, 200, 1024, 4096])
def test_every_row_is_in_one_batch_and_no_batch_is_over_its_bounds(rows: int) -> None:
    found = lengths(rows, rows)
    for shapes in (SHAPES, None):
        ends = list(cut(found, 512, shapes, BUDGET))
        assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] == rows
        for start, end in ends:
            longest = int(found[end - 1])
            padded_rows, tokens = shapes.fit(end - start, longest) if shapes else (end - start, longest)
            assert padded_rows <= 512
            assert padded_rows * tokens <= BUDGET


def test_batches_are_full_or_as_many_rows_as_the_budget_allows() -> None:
    found = lengths(4096, 7)
    ends = list(cut(found, 512, SHAPES, BUDGET))
    for start, end in ends[:-1]:
        larger = next((rows for rows in SHAPES.rows if rows > end - start), None)
        assert end - start in SHAPES.rows
        if larger is not None and start + larger <= len(found):
            assert larger * SHAPES.fit(1, int(found[start + larger - 1]))[1] > BUDGET
    assert len(ends) <= 12


def test_padding_is_a_small_part_of_the_work() -> None:
    found = lengths(4096, 3)
    work = sum(np.prod(SHAPES.fit(end - start, int(found[end - 1]))) for start, end in cut(found, 512, SHAPES, BUDGET))
    assert found.sum() / work > 0.7


def test_a_budget_below_the_smallest_shape_does_not_pad_single_rows_to_it() -> None:
    assert list(cut(np.full(70, 500, dtype=np.int64), 512, SHAPES, 1_000)) == [(0, 32), (32, 64), (64, 70)]
    assert list(cut(np.full(3, 500, dtype=np.int64), 512, None, 400)) == [(0, 1), (1, 2), (2, 3)]


def test_without_texts_rows_are_cut_at_the_largest_batch() -> None:
    shapes = Shapes((64, 128), ())
    assert list(cut(np.zeros(300, dtype=np.int64), 128, shapes, None)) == [(0, 128), (128, 256), (256, 300)]


def features(rows: int, chunk_rows: int) -> pa.Table:
    """A window as feature workers leave it, in chunks: texts, numbers and at most one image of 2 x 2 a row."""
    random = np.random.default_rng(rows)
    ids = [random.integers(1, 99, random.integers(2, 60)).tolist() for _ in range(rows)]
    has_image = random.integers(0, 2, rows)
    table = pa.table(
        {
            "source_row": pa.array(range(rows)),
            "message": pa.array([None] * rows, pa.string()),
            "feat:text:token_ids": pa.array(ids, pa.list_(pa.int32())),
            "feat:text:segment_ids": pa.array([[1] * len(row) for row in ids], pa.list_(pa.int32())),
            "feat:numerical": pa.FixedSizeListArray.from_arrays(pa.array(random.random(2 * rows), pa.float32()), 2),
            "feat:image:pixels": pa.array([random.bytes(12) if has else b"" for has in has_image], pa.large_binary()),
            "feat:image:valid_num": pa.array(has_image, pa.int32()),
            "feat:image:zero_num": pa.array(1 - has_image, pa.int32()),
        }
    )
    return pa.concat_tables([table.slice(start, chunk_rows) for start in range(0, rows, chunk_rows)])


def test_a_batch_holds_what_its_rows_alone_come_to() -> None:
    text = TextModel("text", "", 1, 2, 2, 0, 64, False, 1, False)
    image = ImageModel("image", 2, (0.5,) * 3, (0.5,) * 3, ("resize_to_square",), 1)
    columns = (TextColumn("t"),), (ImageColumn("i", "image_path"),)
    spec = FeatureSpec("y", "binary", (0, 1), (), (), *columns, (), (), (text,), (image,), False)
    table = features(500, 37)
    seen: list[int] = []
    for places, arrays in micro_batches(table, spec, 64, None):
        alone = collate(table.take(pa.array(places)), spec)
        assert arrays.keys() == alone.keys()
        assert all(np.array_equal(arrays[name], alone[name]) for name in alone)
        assert {"numerical", "text:token_ids", "image:pixels"} <= arrays.keys()
        seen += places.tolist()
    assert sorted(seen) == list(range(500))


def text_and_images(tokens: list[int], images: list[int]) -> dict[str, np.ndarray[Any, Any]]:
    """A batch of rows so long and with so many images, as `collate` makes it; every value but padding is not 0."""
    widths, places = np.arange(max(tokens)), np.arange(max(images))
    ids = (widths < np.array(tokens)[:, None]).astype(np.int32) * (np.arange(len(tokens))[:, None] + 1)
    pixels = np.zeros((len(tokens), max(images), 2, 2, 3), dtype=np.uint8)
    pixels[places < np.array(images)[:, None]] = 9
    return {
        "text:token_ids": ids,
        "text:segment_ids": np.zeros_like(ids),
        "text:valid_length": np.array(tokens),
        "image:pixels": pixels,
        "image:image_num": np.array(images),
    }


def test_rows_that_torch_would_add_up_otherwise_are_in_groups_of_their_own_and_lose_nothing() -> None:
    tokens, images = [300, 20, 500, 5, 256, 390, 60], [1, 1, 1, 2, 1, 1, 1]
    batch = text_and_images(tokens, images)
    found = list(alike(batch, {"text": 500}))
    by_rows = {tuple(places.tolist()): group["text:token_ids"].shape for places, group in found}
    # 500 tokens at most are no multiple of 128, 16 or 8: that is a padded length of its own.
    assert by_rows == {(0,): (16, 384), (1, 4, 6): (16, 256), (2, 5): (16, 500), (3,): (16, 16)}
    for places, group in found:
        assert group["image:pixels"].shape[:2] == (16, images[places[0]])
        for name in ("text:valid_length", "image:image_num"):
            assert (group[name][: len(places)] == batch[name][places]).all()
        for name in ("text:token_ids", "image:pixels"):
            own, wide = group[name][: len(places)], batch[name][places]
            width = min(own.shape[1], wide.shape[1])
            assert (own[:, :width] == wide[:, :width]).all()
            assert own[:, width:].sum() == wide[:, width:].sum() == 0, "what was cut off or added is padding"


def test_a_groups_shape_does_not_hang_on_how_wide_the_batch_was() -> None:
    rows = text_and_images([30, 17, 300], [1, 1, 2])
    (_, alone), _ = alike(rows, {"text": 512})
    ((_, narrow),) = alike(text_and_images([30, 17], [1, 1]), {"text": 512})
    assert {name: array.shape for name, array in alone.items()} == {name: array.shape for name, array in narrow.items()}
