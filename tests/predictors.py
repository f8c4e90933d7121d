"""A zoo of tiny, really trained predictors, and the reference scores of any predictor.

    python -m tests.predictors NAME [NAME ...] ROOT
    python -m tests.predictors --reference PREDICTOR ROWS.parquet OUT.parquet [--batch-size N] [--default-mode]

Both run as subprocesses of `build` and `reference`: importing AutoGluon costs 28 s and pytest's process stays free of
it. Owns the rows to score, odd ones included; what a scorer should make of them is the tests' business.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.demo_data import cut_photographs, fit_small, model_settings
from scoring.predictor import extract_spec, hash_predictor, load_predictor, store_spec

if TYPE_CHECKING:
    from autogluon.multimodal import MultiModalPredictor

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = "cache"
"""The zoo's `engine.cache`: feature specs by predictor hash."""
NUM_TRAIN_ROWS = 320
NUM_ROWS = 320
NUM_IMAGES = 40

COLUMN_TYPES: Mapping[str, str] = {
    "age": "numerical",
    "fee": "numerical",
    "weight": "numerical",
    "species": "categorical",
    "color": "categorical",
    "breed": "categorical",
    "state": "categorical",
    "vaccinated": "categorical",
    "description": "text",
    "title": "text",
    "photo": "image_path",
    "second_photo": "image_path",
}
NUMBERS = ("age", "fee", "weight")
CATEGORIES = ("species", "color", "breed", "state", "vaccinated")
WITH_NULLS_IN_TRAINING = ("age", "color", "breed", "description", "photo")
NULL_FRACTION = 0.06
LABELS = {"binary": "adopted", "multiclass": "speed", "regression": "price"}

GOOD_WORDS = ("friendly", "playful", "gentle", "healthy", "trained", "lovely")
BAD_WORDS = ("timid", "sick", "aggressive", "injured", "old", "noisy")
PLAIN_WORDS = ("found", "near", "the", "market", "please", "call", "for", "details", "kept", "indoors", "with", "a")


@dataclass(frozen=True)
class Predictor:
    """A trained predictor's folder, raw rows to score with it (no label), its label column and problem type."""

    path: Path
    rows: Path
    label: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one predictor of the zoo is made of."""

    kind: str
    columns: tuple[str, ...]
    models: tuple[str, ...]
    hyperparameters: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return LABELS[self.kind]


FUSION = ("categorical_mlp", "fusion_mlp", "hf_text", "numerical_mlp", "timm_image")
SMALL_IMAGES = {"model.timm_image.image_size": 96}
SMALL_TRANSFORMER = {
    "model.ft_transformer.token_dim": 32,
    "model.ft_transformer.hidden_size": 32,
    "model.ft_transformer.ffn_hidden_size": 32,
    "model.ft_transformer.num_blocks": 2,
}

RECIPES: Mapping[str, Recipe] = {
    "binary_fusion": Recipe(kind="binary", columns=(*NUMBERS, *CATEGORIES, "description", "photo"), models=FUSION),
    "multiclass_fusion": Recipe(
        kind="multiclass", columns=tuple(COLUMN_TYPES), models=FUSION, hyperparameters=SMALL_IMAGES
    ),
    "regression": Recipe(
        kind="regression",
        columns=(*NUMBERS, *CATEGORIES, "description"),
        models=("categorical_mlp", "fusion_mlp", "hf_text", "numerical_mlp"),
    ),
    "text_only": Recipe(kind="multiclass", columns=("description",), models=("hf_text",)),
    "image_only": Recipe(
        kind="binary", columns=("photo",), models=("timm_image",), hyperparameters={"model.timm_image.image_size": 128}
    ),
    "ft_transformer": Recipe(
        kind="binary",
        columns=(*NUMBERS, *CATEGORIES),
        models=("ft_transformer",),
        hyperparameters=SMALL_TRANSFORMER,
    ),
    # The model types that AutoGluon's own presets train.
    "preset_fusion": Recipe(
        kind="binary",
        columns=(*NUMBERS, *CATEGORIES, "description", "photo"),
        models=("ft_transformer", "fusion_mlp", "hf_text", "timm_image"),
        hyperparameters={**SMALL_TRANSFORMER, **SMALL_IMAGES},
    ),
    "numerical_only": Recipe(kind="binary", columns=NUMBERS, models=("numerical_mlp",)),
    "skip_images": Recipe(
        kind="binary",
        columns=(*NUMBERS, "photo"),
        models=("fusion_mlp", "numerical_mlp", "timm_image"),
        hyperparameters={"data.image.missing_value_strategy": "skip", **SMALL_IMAGES},
    ),
}
NAMES = tuple(RECIPES)


def build(name: str, root: Path) -> Predictor:
    """Return the predictor `name`, fitted under `root` unless an earlier call did so."""
    return build_all([name], root)[name]


def build_all(names: Iterable[str], root: Path) -> dict[str, Predictor]:
    """Return predictors by name; those not yet under `root` are fitted in one process, which pays one import."""
    names = list(names)
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [name for name in names if not (root / name / "done").exists()]
        if missing:
            run_self(*missing, str(root.absolute()))
    return {name: locate(name, root) for name in names}


def locate(name: str, root: Path) -> Predictor:
    recipe = RECIPES[name]
    folder = root.absolute() / name
    return Predictor(folder / "predictor", folder / "rows.parquet", recipe.label, recipe.kind)


def reference(predictor_path: Path, rows_path: Path, batch_size: int = 64, default_mode: bool = False) -> pa.Table:
    """Score rows with AutoGluon itself: `proba_<class>` float32 (none for regression) and `prediction`, in row order.

    `default_mode` scores with `realtime=False`, which gives a bad row its neighbour's scores. A row that upstream
    cannot score (a null photo under `skip`) fails the whole call: leave such rows out.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "reference.parquet"
        mode = ["--default-mode"] if default_mode else []
        paths = [str(path.absolute()) for path in (predictor_path, rows_path, out)]
        run_self("--reference", *paths, "--batch-size", str(batch_size), *mode)
        return pq.read_table(out)


def run_self(*arguments: str) -> None:
    # On the CPU even where there is a GPU: the reference is fp32, and a fit there would save another precision.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "tests.predictors", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {result.returncode}:\n{result.stderr[-4000:]}")


def fit(name: str, root: Path) -> None:
    recipe = RECIPES[name]
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    images = make_images(folder / "images", rng)
    train = blank(make_table(NUM_TRAIN_ROWS, images, rng), WITH_NULLS_IN_TRAINING, rng)
    if recipe.hyperparameters.get("data.image.missing_value_strategy") == "skip":
        # Upstream trains on a neighbour instead.
        train = train.dropna(subset="photo")
    rows = make_rows(images, rng)[list(recipe.columns)]
    rows.to_parquet(folder / "rows.parquet", index=False)
    texts = [*train["description"].dropna(), *train["title"]]
    settings = model_settings(recipe.models, folder / "backbones", texts)
    label_type = "numerical" if recipe.kind == "regression" else "categorical"
    fit_small(
        train,
        folder / "predictor",
        label=recipe.label,
        problem_type=recipe.kind,
        column_types={**{name: COLUMN_TYPES[name] for name in recipe.columns}, recipe.label: label_type},
        hyperparameters={**settings, **recipe.hyperparameters},
    )
    shutil.rmtree(folder / "backbones", ignore_errors=True)  # the predictor must load without
    keep_spec(folder / "predictor", root / CACHE)
    (folder / "done").touch()


def keep_spec(predictor: Path, cache: Path) -> None:
    """Extract the feature spec here, where AutoGluon is imported already: each run of a test would pay 45 s for it."""
    spec = extract_spec(load_predictor(predictor))
    store_spec(spec, hash_predictor(predictor), str(cache))


def make_images(folder: Path, rng: np.random.Generator) -> list[Path]:
    """Write photographs, the first ones in the odd encodings that a decoder must not get wrong."""
    images = cut_photographs(folder, NUM_IMAGES, rng)
    photograph = Image.open(images[0]).convert("RGB")
    odd = {
        "grey.jpg": photograph.convert("L"),
        "cmyk.jpg": photograph.convert("CMYK"),
        "palette.png": photograph.convert("P"),
        "alpha.png": photograph.convert("RGBA"),
        "grey16.png": Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 256),
        "narrow.jpg": photograph.resize((31, 400)),
        "progressive.jpg": photograph,
    }
    for name, image in odd.items():
        image.save(folder / name, progressive=name == "progressive.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the viewer should turn it by 90 degrees, AutoGluon does not
    photograph.save(folder / "rotated.jpg", exif=exif)
    # Pillow opens it with the missing half grey, because AutoGluon switches LOAD_TRUNCATED_IMAGES on.
    whole = images[0].read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    return [*(folder / name for name in (*odd, "rotated.jpg", "truncated.jpg")), *images]


def make_table(num_rows: int, images: list[Path], rng: np.random.Generator) -> pd.DataFrame:
    """Make features and every label; each modality carries a part of the labels' signal."""
    mood = rng.normal(size=num_rows)
    photo = rng.integers(0, len(images), num_rows)
    table = pd.DataFrame(
        {
            "age": rng.gamma(2, 6, num_rows),
            "fee": rng.integers(0, 300, num_rows),
            "weight": rng.normal(10, 4, num_rows).astype(np.float32),
            "species": rng.integers(1, 3, num_rows),
            "color": rng.integers(1, 8, num_rows),
            "breed": rng.choice([f"breed-{i:02d}" for i in range(12)], num_rows),
            "state": rng.choice(["Selangor", "Johor", "Perak", "Sabah", "NA"], num_rows),
            "vaccinated": rng.random(num_rows) < 0.5,
            "description": [describe(value, rng) for value in mood],
            "title": [describe(value, rng)[:30] for value in mood],
            "photo": [str(images[i]) for i in photo],
            "second_photo": [str(images[i]) for i in rng.permutation(photo)],
        }
    )
    signal = mood - 0.12 * (table["age"] - 12) + 0.15 * (table["weight"] - 10) + (table["color"] > 4) - 0.5
    signal += 0.8 * np.where(photo % 8 < 4, 1, -1)  # there are eight photographs to cut from
    table["adopted"] = (signal > 0).astype(np.int64)
    table["speed"] = pd.cut(signal, [-np.inf, -0.6, 0.6, np.inf], labels=["slow", "medium", "fast"]).astype(str)
    table["price"] = 50 + 20 * signal / signal.std()
    return table


def describe(mood: float, rng: np.random.Generator) -> str:
    tone = GOOD_WORDS if mood > 0 else BAD_WORDS
    return " ".join(rng.permutation([*rng.choice(PLAIN_WORDS, rng.integers(2, 30)), *rng.choice(tone, 4)]))


def blank(table: pd.DataFrame, columns: Iterable[str], rng: np.random.Generator) -> pd.DataFrame:
    table = table.copy()
    for name in columns:
        is_blank = pd.Series(rng.random(len(table)) < NULL_FRACTION, index=table.index)
        values = table[name].astype(object) if table[name].dtype == bool else table[name]
        table[name] = values.mask(is_blank)
    return table


def make_rows(images: list[Path], rng: np.random.Generator) -> pd.DataFrame:
    """Make rows to score: nulls in every column, categories never trained on, and texts of every awkward kind."""
    rows = blank(make_table(NUM_ROWS, images, rng), COLUMN_TYPES, rng)
    rows.loc[5:9, "description"] = [
        " ".join(rows["description"].dropna())[:6000],
        "",
        "NA",
        " \n\t ",
        "naïve 犬 \U0001f415",
    ]
    rows.loc[10:12, "title"] = ["", "NA", "nan"]
    rows.loc[20:22, "breed"] = ["breed-99", "", "NA"]
    rows.loc[23:25, "color"] = [99, -1, 0]
    rows.loc[26, "species"] = 7
    rows.loc[27:29, "fee"] = [-5, 1_000_000, 0]
    return rows


def write_reference(predictor_path: Path, rows_path: Path, out: Path, batch_size: int, default_mode: bool) -> None:
    import torch
    from autogluon.multimodal import MultiModalPredictor

    torch.set_num_threads(2)
    predictor = MultiModalPredictor.load(str(predictor_path), verbosity=1)
    rows = pd.read_parquet(rows_path)
    chunks = [rows.iloc[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    scored = [score_chunk(predictor, chunk.reset_index(drop=True), not default_mode) for chunk in chunks]
    pq.write_table(pa.Table.from_pandas(pd.concat(scored), preserve_index=False), out)


def score_chunk(predictor: "MultiModalPredictor", chunk: pd.DataFrame, realtime: bool) -> pd.DataFrame:
    prediction: pd.Series = predictor.predict(chunk, realtime=realtime)
    if predictor.problem_type == "regression":
        return pd.DataFrame({"prediction": prediction.astype(np.float32)})
    proba: pd.DataFrame = predictor.predict_proba(chunk, as_multiclass=True, realtime=realtime)
    return proba.astype(np.float32).add_prefix("proba_").assign(prediction=prediction)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names_and_root", nargs="*")
    parser.add_argument("--reference", nargs=3, type=Path, metavar=("PREDICTOR", "ROWS", "OUT"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--default-mode", action="store_true")
    arguments = parser.parse_args()
    if arguments.reference:
        predictor_path, rows_path, out = arguments.reference
        write_reference(predictor_path, rows_path, out, arguments.batch_size, arguments.default_mode)
        return
    *names, root = arguments.names_and_root
    for name in names:
        fit(name, Path(root).absolute())


if __name__ == "__main__":
    main()
