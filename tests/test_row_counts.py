"""The compiled engine, less the GPU: which row counts its graphs are captured for, and when."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scoring.engines import ahead
from scoring.engines.ahead import AheadEngine
from scoring.engines.base import Shapes
from scoring.engines.row_counts import PLANNED_AFTER_ROWS
from scoring.spec import FeatureSpec, ImageModel

SHAPES = Shapes((32, 64, 128, 256, 512), (64,))
MODEL = ImageModel("image", 64, (0.5,) * 3, (0.5,) * 3, ("resize_shorter_side", "center_crop"), 1)


class StubGraphs:
    """Notes the row counts that it is given; answers with the first input, in one place for each count."""

    def __init__(self, run: object) -> None:
        self.seen: list[int] = []
        self._logits: dict[int, torch.Tensor] = {}

    def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        rows = len(tensors[0])
        self.seen.append(rows)
        return self._logits.setdefault(rows, torch.empty(rows, 1)).copy_(tensors[0])

    def clear(self) -> None: ...


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AheadEngine]:
    monkeypatch.setattr(ahead, "load_ahead", lambda path: None)
    monkeypatch.setattr(ahead, "Graphs", StubGraphs)
    monkeypatch.setattr(ahead, "device_name", lambda device: "a GPU")

    def made(*, images: bool = True) -> AheadEngine:
        models = (MODEL,) if images else ()
        spec = FeatureSpec("y", "binary", (0, 1), (), (), (), (), (), (), (), models, False)
        return AheadEngine(Path("none"), spec, "fp16", SHAPES)

    return made


def parts(engine: AheadEngine, rows: int) -> list[int]:
    """The row counts of the graphs that a batch goes through; its logits must be its own."""
    batch = torch.rand(rows, 1)
    graphs: Any = engine._graphs
    graphs.seen.clear()
    torch.testing.assert_close(engine.run([batch, batch]), batch, rtol=0, atol=0)
    return list(graphs.seen)


def test_the_first_rows_go_through_one_count_and_later_ones_through_two(make: Callable[..., AheadEngine]) -> None:
    engine = make()
    assert parts(engine, 32) == [128]
    assert parts(engine, 256) == [128, 128]
    left = PLANNED_AFTER_ROWS - 32 - 256
    while left > 0:
        assert parts(engine, 512) == [128] * 4
        left -= 512
    assert parts(engine, 512) == [512]
    assert parts(engine, 256) == [128, 128], "not one more count to plan for"
    assert parts(engine, 64) == [128]


def test_a_warm_engine_takes_the_largest_batches_whole(make: Callable[..., AheadEngine]) -> None:
    engine = make()
    engine.warm_up()
    assert parts(engine, 512) == [512]
    assert parts(engine, 64) == [128]
    engine.close()


def test_without_images_nothing_is_planned_and_each_count_has_its_graph(make: Callable[..., AheadEngine]) -> None:
    engine = make(images=False)
    assert [parts(engine, rows) for rows in SHAPES.rows] == [[rows] for rows in SHAPES.rows]
