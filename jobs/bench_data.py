"""The rows that `jobs.benchmark pipeline` measures: seeded pets with long texts, photographs and, if asked, bad images.

Owns the cuts (`Recipe`) and their two layouts: image bytes in parquet, image paths in CSV. Pixels and columns are the
demo's (`jobs/demo_data.py`). A cut has a few thousand unique rows; more come from the same files under other names, so that
300,000 rows cost no time, and stay in the page cache. Photographs repeat too (`NUM_IMAGES`): nothing here caches pixels.
"""

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs import demo_data

SHARD_ROWS = 8192
GROUP_ROWS = 1024
NUM_IMAGES = 2048
BAD_SHARE, UNUSUAL_SHARE = 0.01, 0.001
# The protocol's size classes: width, height and share of the images.
SIZES = ((320, 240, 0.10), (500, 375, 0.60), (800, 600, 0.25), (1600, 1200, 0.05))
_NUM_SIZED_IMAGES = 400
_SPREAD = 0.7
_MAX_WORDS = 800
_RARE_SHARE = 0.1
_NUM_RARE = 20_000
_SYLLABLES = ("ba", "cor", "den", "fi", "gul", "ka", "lim", "mo", "nar", "pe", "qui", "rho", "sta", "ton", "vex", "zu")

Images = Literal["measured", "sizes", "none"]


@dataclass(frozen=True)
class Recipe:
    """A cut: how many unique rows, which photographs, how long the texts are, whether some images are bad."""

    rows: int = SHARD_ROWS
    seed: int = 0
    images: Images = "measured"
    median_words: int = 40
    bad: bool = False


@dataclass(frozen=True)
class Cut:
    """A cut as it lies on disk. `num_bad` rows of the unique ones must be quarantined, `num_unusual` must not."""

    folder: Path
    rows: int
    num_bad: int
    num_unusual: int

    @property
    def parquet(self) -> list[Path]:
        """The unique rows, image bytes in an `Images` column."""
        return sorted((self.folder / "bytes").glob("*.parquet"))

    @property
    def csv(self) -> list[Path]:
        """The same rows, image paths in CSV; a bad image may be a file that is not there."""
        return sorted((self.folder / "paths").glob("*.csv"))


def make_cut(folder: Path, recipe: Recipe) -> Cut:
    """Make the cut in `folder`, or take the one that lies there; a folder with another recipe's is made anew."""
    marker = folder / "cut.json"
    if marker.exists():
        found = json.loads(marker.read_text())
        if found["recipe"] == asdict(recipe):
            return Cut(folder, recipe.rows, found["num_bad"], found["num_unusual"])
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(recipe.seed)
    photographs = cut_photographs(folder / "images", recipe)
    table = demo_data.make_pets(recipe.rows, photographs or [folder], rng).drop(columns=demo_data.LABEL)
    table["Description"] = long_texts(recipe.rows, recipe.median_words, rng)
    table = demo_data.blank(table, demo_data.WITH_NULLS, rng)
    num_bad = num_unusual = 0
    if recipe.images == "none":
        table = table.drop(columns="Images")
    elif recipe.bad:
        table, num_bad, num_unusual = with_bad_images(table, folder / "images", rng)
    _write_layouts(table, folder)
    marker.write_text(json.dumps({"recipe": asdict(recipe), "num_bad": num_bad, "num_unusual": num_unusual}))
    return Cut(folder, recipe.rows, num_bad, num_unusual)


def repeat_files(files: Sequence[Path], file_rows: Sequence[int], rows: int, folder: Path) -> tuple[Path, int]:
    """`folder` filled with the files under new names, over and over, until it holds `rows` rows; the rows it really holds.

    Whole files only, so the count is rounded up. They are hard links, or copies where there are none.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    total = number = 0
    while total < rows:
        source = files[number % len(files)]
        target = folder / f"{number:05d}-{source.name}"
        try:
            os.link(source, target)
        except OSError:
            shutil.copy(source, target)
        total += file_rows[number % len(files)]
        number += 1
    return folder, total


def repeat_cut(cut: Cut, rows: int, folder: Path, layout: Literal["bytes", "paths"] = "bytes") -> tuple[Path, int]:
    """`repeat_files` of one layout of a cut."""
    file_rows = [pq.read_metadata(file).num_rows for file in cut.parquet]
    return repeat_files(cut.parquet if layout == "bytes" else cut.csv, file_rows, rows, folder)


def long_texts(num_rows: int, median_words: int, rng: np.random.Generator) -> list[str]:
    """Log-normal lengths around `median_words`: the demo's words, a tenth of them rare ones that tokenizers split."""
    common = " ".join((*demo_data.KIND, *demo_data.PLAIN, *demo_data.SHY)).split()
    rare = ["".join(rng.choice(_SYLLABLES, rng.integers(2, 5))) for _ in range(_NUM_RARE)]
    lengths = np.clip(np.exp(rng.normal(np.log(median_words), _SPREAD, num_rows)), 1, _MAX_WORDS).astype(int)
    total = int(lengths.sum())
    words = np.where(rng.random(total) < _RARE_SHARE, rng.choice(rare, total), rng.choice(common, total))
    return [" ".join(part) for part in np.split(words, np.cumsum(lengths)[:-1])]


def cut_photographs(folder: Path, recipe: Recipe) -> list[Path]:
    """The cut's JPEGs, each from a generator of its own, so that any number of threads makes the same files."""
    if recipe.images == "none":
        return []
    folder.mkdir(parents=True)
    photographs = demo_data.load_photographs()
    most = NUM_IMAGES if recipe.images == "measured" else _NUM_SIZED_IMAGES
    sizes = _spread_sizes(most)

    def cut(number: int) -> Path:
        photograph, path = photographs[number % len(photographs)], folder / f"{number:05d}.jpg"
        rng = np.random.default_rng([recipe.seed, number])
        if recipe.images == "measured":
            return demo_data.cut(photograph, path, rng)
        return _cut_to_size(photograph, path, sizes[number], rng)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(cut, range(min(most, recipe.rows))))


def _spread_sizes(count: int) -> list[tuple[int, int]]:
    """`count` sizes in the classes' shares, in an order that any number of first ones follows about as well."""
    shares = np.array([share for _, _, share in SIZES])
    given = np.zeros(len(SIZES))
    sizes = []
    for number in range(1, count + 1):
        behind = int(np.argmax(shares * number - given))
        given[behind] += 1
        sizes.append(SIZES[behind][:2])
    return sizes


def _cut_to_size(photograph: Image.Image, path: Path, size: tuple[int, int], rng: np.random.Generator) -> Path:
    """A crop of the size's shape, scaled to it; the photographs are smaller than the largest class."""
    share = min(photograph.width / size[0], photograph.height / size[1]) * rng.uniform(0.7, 1.0)
    width, height = int(size[0] * share), int(size[1] * share)
    left = int(rng.integers(0, photograph.width - width, endpoint=True))
    top = int(rng.integers(0, photograph.height - height, endpoint=True))
    crop = photograph.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
    crop.save(path, quality=int(rng.integers(85, 92, endpoint=True)))
    return path


def with_bad_images(table: pd.DataFrame, images: Path, rng: np.random.Generator) -> tuple[pd.DataFrame, int, int]:
    """Give BAD_SHARE of the rows an image that is missing or none, UNUSUAL_SHARE one that is odd and fine; their counts."""
    bad = _bad_files(images)
    unusual = _unusual_files(images, sorted(images.glob("?????.jpg"))[0])
    with_image = np.flatnonzero(table["Images"].notna().to_numpy())
    num_bad = max(len(bad), round(BAD_SHARE * len(table)))
    num_unusual = max(len(unusual), round(UNUSUAL_SHARE * len(table)))
    rows = rng.choice(with_image, num_bad + num_unusual, replace=False)
    cells = table["Images"].tolist()
    for number, row in enumerate(rows.tolist()):
        kinds = bad if number < num_bad else unusual
        cells[row] = str(kinds[number % len(kinds)])
    return table.assign(Images=cells), num_bad, num_unusual


def _bad_files(images: Path) -> list[Path]:
    # No truncated JPEG: AutoGluon makes Pillow open those, with the missing part grey.
    (images / "corrupt.jpg").write_bytes(b"This file is named like a JPEG and is none.\n" * 200)
    return [images / "missing.jpg", images / "corrupt.jpg"]


def _unusual_files(images: Path, photograph: Path) -> list[Path]:
    content = photograph.read_bytes()
    image = Image.open(io.BytesIO(content))
    files = [images / "unusual.png", images / "unusual-cmyk.jpg", images / "unusual-truncated.jpg"]
    image.save(files[0])
    image.convert("CMYK").save(files[1])
    files[2].write_bytes(content[: len(content) * 2 // 3])
    return files


def _write_layouts(table: pd.DataFrame, folder: Path) -> None:
    (folder / "bytes").mkdir(parents=True)
    (folder / "paths").mkdir()
    contents = _read_contents(table) if "Images" in table else {}
    for number, start in enumerate(range(0, len(table), SHARD_ROWS)):
        shard = table.iloc[start : start + SHARD_ROWS]
        shard.to_csv(folder / "paths" / f"rows-{number:04d}.csv", index=False)
        arrow = pa.Table.from_pandas(shard, preserve_index=False)
        if contents:
            cells = pa.array([contents.get(cell) for cell in shard["Images"]], pa.binary())
            arrow = arrow.set_column(arrow.column_names.index("Images"), "Images", cells)
        pq.write_table(arrow, folder / "bytes" / f"rows-{number:04d}.parquet", row_group_size=GROUP_ROWS)


def _read_contents(table: pd.DataFrame) -> Mapping[str, bytes]:
    """Each named image's bytes; bytes cannot be missing, so a file that is not there is a corrupt one."""
    paths = [Path(name) for name in table["Images"].dropna().unique()]
    return {str(path): (path if path.exists() else path.with_name("corrupt.jpg")).read_bytes() for path in paths}
