"""The demo's ingredients: made-up pets, cut photographs, random backbones and a small predictor.

Nothing is downloaded: the photographs ship inside the wheels of scikit-learn and scikit-image, the backbones are
initialised at random. Owns no command line (`jobs/demo.py`) and no scoring.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

# All of these lie in the wheel's own data folder; other names in skimage.data would be downloaded.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "retina")

LABEL = "AdoptionSpeed"
NUMBERS = ("Age", "Quantity", "Fee", "VideoAmt", "PhotoAmt")
TEXTS = ("Name", "Description")
NUM_CATEGORIES: Mapping[str, int] = {
    "Type": 2,
    "Breed1": 24,
    "Breed2": 12,
    "Gender": 3,
    "Color1": 7,
    "Color2": 7,
    "Color3": 5,
    "MaturitySize": 4,
    "FurLength": 3,
    "Vaccinated": 3,
    "Dewormed": 3,
    "Sterilized": 3,
    "Health": 3,
    "State": 14,
}
COLUMN_TYPES: Mapping[str, str] = {
    **dict.fromkeys(NUMBERS, "numerical"),
    **dict.fromkeys(NUM_CATEGORIES, "categorical"),
    **dict.fromkeys(TEXTS, "text"),
    "Images": "image_path",
    LABEL: "categorical",
}
# The tutorial's order. PetID and RescuerID say nothing about adoption: the shards have them, the predictor does not.
COLUMNS = (
    *("Type", "Name", "Age", "Breed1", "Breed2", "Gender", "Color1", "Color2", "Color3", "MaturitySize", "FurLength"),
    *("Vaccinated", "Dewormed", "Sterilized", "Health", "Quantity", "Fee", "State", "RescuerID", "VideoAmt"),
    *("Description", "PetID", "PhotoAmt", LABEL, "Images"),
)
WITH_NULLS = ("Age", "Fee", "Breed2", "Color3", "Health", "Name", "Description", "Images")
NULL_FRACTION = 0.03

NAMES = ("Milo", "Luna", "Brisco", "Kali", "Puppy", "No Name", "Siu Pak", "Bulat", "Coco", "Abu", "Mimi & Friends")
KIND = ("Very friendly and good with children.", "Playful, healthy and toilet trained.", "Lovely, gentle lap pet.")
PLAIN = (
    "Found near the market last week.",
    "Please call for details.",
    "Must be kept indoors.",
    "Rescued from a drain.",
)
SHY = ("Timid with strangers.", "Needs medical follow-up.", "Not good with other animals.")


def cut_photographs(folder: Path, count: int, rng: np.random.Generator) -> list[Path]:
    """Write `count` JPEG crops of 320-640 x 300-500 pixels; file i is cut from photograph i modulo their number."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs = load_photographs()
    return [cut(photographs[i % len(photographs)], folder / f"{i:04d}.jpg", rng) for i in range(count)]


def load_photographs() -> list[Image.Image]:
    import skimage.data
    from sklearn.datasets import load_sample_images

    arrays = [*load_sample_images().images, *(getattr(skimage.data, name)() for name in PHOTOGRAPHS)]
    return [Image.fromarray(array) for array in arrays]


def cut(photograph: Image.Image, path: Path, rng: np.random.Generator) -> Path:
    width = int(rng.integers(320, min(640, photograph.width), endpoint=True))
    height = int(rng.integers(300, min(500, photograph.height), endpoint=True))
    left = int(rng.integers(0, photograph.width - width, endpoint=True))
    top = int(rng.integers(0, photograph.height - height, endpoint=True))
    crop = photograph.crop((left, top, left + width, top + height))
    crop.save(path, quality=int(rng.integers(85, 92, endpoint=True)))
    return path


def make_pets(num_rows: int, images: list[Path], rng: np.random.Generator) -> pd.DataFrame:
    """Make pets with the tutorial's columns. The label follows age, fee, sterilisation, words and photograph."""
    mood = rng.normal(size=num_rows)
    image = rng.integers(0, len(images), size=num_rows)
    table = pd.DataFrame({name: rng.integers(1, top, num_rows, endpoint=True) for name, top in NUM_CATEGORIES.items()})
    table["Age"] = rng.gamma(1.5, 8, num_rows).round()
    table["Quantity"] = rng.poisson(0.6, num_rows) + 1
    table["Fee"] = rng.choice([0, 0, 0, 50, 100, 250.5], num_rows)
    table["VideoAmt"] = rng.poisson(0.1, num_rows)
    table["PhotoAmt"] = rng.poisson(3, num_rows).astype(float)
    table["Name"] = rng.choice(NAMES, num_rows)
    table["Description"] = [describe(value, rng) for value in mood]
    table["Images"] = [str(images[i]) for i in image]
    table["PetID"] = [f"{value:016x}" for value in rng.integers(0, 2**63, num_rows)]
    table["RescuerID"] = [f"rescuer-{value:03d}" for value in rng.integers(0, 200, num_rows)]
    logit = 1.5 * mood - 0.06 * (table["Age"] - 12) + 0.8 * (table["Sterilized"] == 1) + 0.4 * (image % 4) - 1
    table[LABEL] = (rng.logistic(size=num_rows) * 0.5 < logit).astype(np.int64)
    return table[list(COLUMNS)]


def describe(mood: float, rng: np.random.Generator) -> str:
    tone = KIND if mood > 0 else SHY
    sentences = [*rng.choice(PLAIN, rng.integers(0, 5)), *rng.choice(tone, rng.integers(1, 4))]
    return " ".join(rng.permutation(sentences))


def blank(table: pd.DataFrame, columns: Iterable[str], rng: np.random.Generator) -> pd.DataFrame:
    """Return a copy with NULL_FRACTION of the cells of `columns` null; whole numbers stay whole (Int64)."""
    table = table.copy()
    for name in columns:
        values = table[name].astype("Int64") if table[name].dtype.kind == "i" else table[name]
        table[name] = values.mask(pd.Series(rng.random(len(table)) < NULL_FRACTION, index=table.index))
    return table


def write_shards(table: pd.DataFrame, folder: Path, num_parquet: int = 4) -> None:
    """Cut the rows into `num_parquet` parquet files, the first with several row groups, and one CSV file."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = np.linspace(0, len(table), num_parquet + 2).astype(int)
    for i in range(num_parquet):
        shard = pa.Table.from_pandas(table.iloc[bounds[i] : bounds[i + 1]], preserve_index=False)
        row_group_size = shard.num_rows // 4 if i == 0 else shard.num_rows
        pq.write_table(shard, folder / f"pets-{i}.parquet", row_group_size=row_group_size)
    table.iloc[bounds[-2] :].to_csv(folder / f"pets-{num_parquet}.csv", index=False)


def save_text_backbone(folder: Path, texts: Iterable[str], *, hidden: int = 64, seed: int = 0) -> None:
    """Save a two-layer Electra with random weights and a WordPiece tokenizer trained on `texts`."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import ElectraConfig, ElectraModel, ElectraTokenizer

    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=2000, min_frequency=2, show_progress=False)
    torch.manual_seed(seed)
    config = ElectraConfig(
        vocab_size=pieces.get_vocab_size(),
        embedding_size=hidden,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=512,
    )
    ElectraModel(config).save_pretrained(folder)
    ElectraTokenizer(vocab=pieces.get_vocab(), model_max_length=512).save_pretrained(folder)


def save_image_backbone(folder: Path, *, architecture: str = "mobilenetv3_small_050", seed: int = 0) -> None:
    """Save a timm model with random weights in the layout that AutoGluon reads as a local checkpoint."""
    import timm
    import torch

    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=0)
    config = {"architecture": architecture, "num_features": model.num_features, "pretrained_cfg": model.default_cfg}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def model_settings(models: Iterable[str], folder: Path, texts: Iterable[str], *, seed: int = 0) -> dict[str, object]:
    """Return the hyperparameters for AutoGluon's model types `models`, on random backbones saved under `folder`."""
    models = list(models)
    settings: dict[str, object] = {"model.names": models}
    if "hf_text" in models:
        save_text_backbone(folder / "text", texts, seed=seed)
        settings["model.hf_text.checkpoint_name"] = str(folder / "text")
        # Any other value downloads NLTK's word lists.
        settings["model.hf_text.text_trivial_aug_maxscale"] = 0
    if "timm_image" in models:
        save_image_backbone(folder / "image", seed=seed)
        settings["model.timm_image.checkpoint_name"] = str(folder / "image")
        # Augmentation would cost more than it teaches in so few steps.
        settings["model.timm_image.train_transforms"] = ["resize_shorter_side", "center_crop"]
    return settings


def fit_small(
    table: pd.DataFrame,
    folder: Path,
    *,
    label: str,
    problem_type: str,
    column_types: Mapping[str, str],
    hyperparameters: Mapping[str, object],
    min_spread: float = 1e-3,
    num_threads: int = 1,
) -> None:
    """Fit a predictor on a core or a few in seconds. Raises RuntimeError if it ignores a column or answers the same to all.

    `min_spread` is the least standard deviation of its answers that counts as an answer.
    """
    import torch
    from autogluon.multimodal import MultiModalPredictor

    # Models this small gain nothing from a second thread, and where other processes want the cores too, two threads
    # that wait for each other took eight times as long.
    torch.set_num_threads(num_threads)
    predictor = MultiModalPredictor(
        label=label, problem_type=problem_type, path=str(folder), verbosity=1, enable_progress_bar=False
    )
    defaults = {
        # With num_gpus=0 alone, Lightning would still take every GPU it finds.
        "env.accelerator": "cpu",
        "env.num_workers": 0,
        "env.num_workers_inference": 0,
        "env.batch_size": 16,
        "env.per_gpu_batch_size": 16,
        "optim.lr": 3e-3,
        "optim.lr_choice": "single_stage",
        "optim.max_epochs": 3,
        "optim.top_k": 1,
        "optim.val_check_interval": 1.0,
        # A category seen fewer than 100 times would count as rare: in a table this small, every one.
        "data.categorical.minimum_cat_count": 1,
    }
    predictor.fit(
        table[list(column_types)],
        column_types=dict(column_types),
        hyperparameters={**defaults, **hyperparameters},
        standalone=True,
    )
    make_portable(folder)
    ignored = predictor._learner._df_preprocessor._ignore_columns_set
    if ignored:
        raise RuntimeError(f"{folder}: the predictor ignores {sorted(ignored)}; they have one value in training")
    answer = predictor.predict if problem_type == "regression" else predictor.predict_proba
    spread = float(np.asarray(answer(table.head(64), realtime=True)).std(axis=0).max())
    if not spread > min_spread:
        raise RuntimeError(f"{folder}: scores differ by {spread:.1e} between rows; train longer or with a higher lr")


def make_portable(folder: Path) -> None:
    """Let the saved predictor load without its image backbone, from whatever folder it is copied to.

    `standalone=True` does so for text alone: a local timm checkpoint stays in config.yaml as a path that load() opens.
    With the architecture's name there, load() builds the model and fills it from the predictor's own weights.
    """
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    timm_image = config["model"].get("timm_image")
    if timm_image:
        backbone = json.loads((Path(timm_image["checkpoint_name"]) / "config.json").read_text())
        timm_image["checkpoint_name"] = backbone["architecture"]
        path.write_text(yaml.safe_dump(config, sort_keys=False))
