"""The feature stage without AutoGluon: what it imports, and images as paths, bytes and base64 giving the same pixels.

Equality with upstream's own processors is test_upstream.py's.
"""

import base64
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest

from scoring.config import ImagesConfig
from scoring.features import FeatureBuilder
from scoring.images import ImageFetcher
from scoring.predictor import hash_predictor, load_spec
from scoring.sequences import trim_lengths
from scoring.spec import FeatureSpec
from tests import predictors
from tests.predictors import Predictor
from tests.upstream import build_blocks, build_features

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def images(zoo: Mapping[str, Predictor], zoo_root: Path) -> tuple[FeatureSpec, pd.DataFrame]:
    """The image predictor's spec and fifty rows of photographs of every kind, some null."""
    predictor = zoo["image_only"]
    spec = load_spec(hash_predictor(predictor.path), str(zoo_root / predictors.CACHE))
    assert spec is not None
    return spec, pd.read_parquet(predictor.rows).head(50)


def test_feature_workers_and_the_driver_import_neither_autogluon_nor_torch() -> None:
    code = (
        "import sys, scoring.features, scoring.reading, scoring.images, scoring.shards, scoring.predictor, scoring.ledger;"
        "print([name for name in ('autogluon', 'torch', 'transformers', 'onnxruntime', 'ray') if name in sys.modules]);"
        "import jobs.score, scoring.pipeline;"
        "print([name for name in ('autogluon', 'torch', 'transformers', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"]


def convert(path: Path, form: str) -> bytes | str:
    if form == "relative":
        return path.name
    return path.read_bytes() if form == "bytes" else base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("form", ["bytes", "base64", "relative"])
def test_images_as_bytes_base64_and_relative_paths_give_the_pixels_of_their_paths(
    form: str, images: tuple[FeatureSpec, pd.DataFrame], tmp_path: Path
) -> None:
    spec, rows = images
    rows.to_parquet(tmp_path / "paths.parquet")
    wanted = build_features(spec, tmp_path / "paths.parquet")
    folder = Path(rows["photo"].dropna().iloc[0]).parent
    photos = pd.Series([None if pd.isna(path) else convert(Path(path), form) for path in rows["photo"]], dtype=object)
    rows.assign(photo=photos).to_parquet(tmp_path / "other.parquet")
    builder = FeatureBuilder(spec, ImageFetcher(ImagesConfig(base=str(folder))))
    found = builder(build_blocks(spec, tmp_path / "other.parquet"))
    assert found["reason"].null_count == 50
    names = [name for name in found.column_names if name.startswith("feat:")]
    assert {name.rpartition(":")[2] for name in names} == {"pixels", "valid_num", "zero_num"}
    for name in names:
        assert found[name].to_pylist() == wanted[name].to_pylist()
    nulls = int(rows["photo"].isna().sum())
    assert nulls > 0
    assert sum(found["feat:timm_image:zero_num"].to_pylist()) == nulls, "a null image is a blank one under zero"


def test_a_bad_image_marks_its_row_alone_and_blank_scores_it_as_a_black_one(
    images: tuple[FeatureSpec, pd.DataFrame], tmp_path: Path
) -> None:
    spec, rows = images
    rows = rows[rows["photo"].notna()].head(6).reset_index(drop=True)
    (tmp_path / "corrupt.jpg").write_bytes(b"no picture")
    rows.loc[2, "photo"] = str(tmp_path / "corrupt.jpg")
    rows.to_parquet(tmp_path / "rows.parquet")
    block = build_blocks(spec, tmp_path / "rows.parquet")
    fetcher = ImageFetcher(ImagesConfig(base=str(tmp_path)))
    marked = FeatureBuilder(spec, fetcher)(block)
    assert marked["reason"].to_pylist() == [None, None, "image_undecodable", None, None, None]
    message = marked["message"][2].as_py()
    assert message.startswith(f"{tmp_path / 'corrupt.jpg'}: 10 bytes that Pillow cannot decode")
    blanked = FeatureBuilder(spec, fetcher, blank_bad_images=True)(block)
    assert blanked["reason"].null_count == 6
    assert blanked["feat:timm_image:zero_num"].to_pylist() == [0, 0, 1, 0, 0, 0]
    pixels = [table["feat:timm_image:pixels"].to_pylist() for table in (marked, blanked)]
    assert pixels[0] == pixels[1]


@pytest.mark.parametrize(
    ("lengths", "budget", "trimmed"),
    [
        ([3, 4], 7, [3, 4]),
        ([10, 2], 8, [6, 2]),
        ([10, 10], 7, [4, 3]),
        ([5, 0, 9], 6, [3, 0, 3]),
        ([1, 9, 9], 8, [1, 4, 3]),
    ],
)
def test_the_longest_texts_are_trimmed_first(lengths: list[int], budget: int, trimmed: list[int]) -> None:
    assert trim_lengths(lengths, budget) == trimmed
