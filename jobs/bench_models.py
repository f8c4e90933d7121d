"""Predictors to measure: every kind of network that people train, on random backbones of a small or the usual size.

    python -m jobs.bench_models FOLDER [--size small|usual] [NAME ...]

Speed needs the architecture alone; a short fit gives the head something to say, so that parity figures mean something.
Owns the recipes; the rows are the demo's pets.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from jobs import demo_data

Size = Literal["small", "usual"]

SEED_MODEL = "seed"
NUM_ROWS = 400
NUM_IMAGES = 60
TABULAR = (*demo_data.NUMBERS, *demo_data.NUM_CATEGORIES)
EVERYTHING = (*TABULAR, *demo_data.TEXTS, "Images")
FUSION = ("categorical_mlp", "fusion_mlp", "hf_text", "numerical_mlp", "timm_image")
PRESET = ("ft_transformer", "fusion_mlp", "hf_text", "timm_image")


@dataclass(frozen=True)
class Recipe:
    """What one predictor is made of. `image` is timm's name, by size; `text` a transformers family."""

    models: tuple[str, ...]
    columns: tuple[str, ...]
    kind: Literal["binary", "multiclass", "regression"] = "binary"
    text: str = "electra"
    image: Mapping[str, str] | None = None

    def image_name(self, size: Size) -> str:
        return (self.image or {"small": "mobilenetv3_small_050", "usual": "mobilenetv3_small_100"})[size]


RECIPES: Mapping[str, Recipe] = {
    SEED_MODEL: Recipe(FUSION, EVERYTHING),
    # What AutoGluon's own presets train.
    "preset": Recipe(PRESET, EVERYTHING, image={"small": "mobilenetv3_small_050", "usual": "mobilenetv3_large_100"}),
    "fusion_transformer": Recipe(
        ("ft_transformer", "fusion_transformer", "hf_text", "timm_image"), EVERYTHING, "multiclass"
    ),
    # What a run without images is measured on.
    "text_tabular": Recipe(("categorical_mlp", "fusion_mlp", "hf_text", "numerical_mlp"), (*TABULAR, *demo_data.TEXTS)),
    "text_bert": Recipe(("hf_text",), demo_data.TEXTS, "multiclass", text="bert"),
    "text_electra": Recipe(("hf_text",), demo_data.TEXTS),
    "text_roberta": Recipe(("hf_text",), demo_data.TEXTS, text="roberta"),
    "text_deberta_v3": Recipe(("hf_text",), demo_data.TEXTS, text="deberta_v3"),
    "image_mobilenet": Recipe(("timm_image",), ("Images",), "multiclass"),
    "image_vit": Recipe(
        ("timm_image",), ("Images",), image={"small": "vit_tiny_patch16_224", "usual": "vit_small_patch16_224"}
    ),
    "image_swin": Recipe(
        ("timm_image",), ("Images",), image=dict.fromkeys(("small", "usual"), "swin_tiny_patch4_window7_224")
    ),
    "tabular": Recipe(("categorical_mlp", "fusion_mlp", "numerical_mlp"), TABULAR, "regression"),
    "tabular_ft": Recipe(("ft_transformer",), TABULAR, "multiclass"),
}

# hidden, layers, heads, feed-forward: ELECTRA-small and its like, and something that fits in a second.
_WIDTHS: Mapping[str, tuple[int, int, int, int]] = {"small": (64, 2, 2, 128), "usual": (256, 12, 4, 1024)}
_VOCABULARY = {"small": 2000, "usual": 30522}


def build_predictor(name: str, folder: Path, size: Size) -> Path:
    """The fitted predictor `name` in `folder`, made now unless it is there; its rows lie in `rows.parquet`."""
    if (folder / "done").exists():
        return folder / "predictor"
    recipe = RECIPES[name]
    rng = np.random.default_rng(0)
    images = demo_data.cut_photographs(folder / "images", NUM_IMAGES, rng)
    rows = demo_data.blank(demo_data.make_pets(NUM_ROWS, images, rng), demo_data.WITH_NULLS, rng)
    label, labels = _label(rows, recipe.kind)
    rows = rows[list(recipe.columns)].assign(**{label: labels})
    rows.drop(columns=label).to_parquet(folder / "rows.parquet", index=False)
    settings: dict[str, Any] = {"model.names": list(recipe.models)}
    if len(recipe.models) > 1 or "hf_text" not in recipe.models or size == "usual":
        # Few small steps: a deep network with random weights soon answers the same to every row at the demo's rate.
        settings |= {"optim.max_epochs": 1, "optim.lr": 1e-4}
    else:
        # A text alone must be learned, or its scores are rounding noise that the wider head makes large.
        settings |= {"optim.max_epochs": 20, "optim.lr": 1e-3}
    if "hf_text" in recipe.models:
        save_text_backbone(folder / "text", recipe.text, size, rows["Description"].dropna().tolist())
        settings["model.hf_text.checkpoint_name"] = str(folder / "text")
        settings["model.hf_text.text_trivial_aug_maxscale"] = 0
    if "timm_image" in recipe.models:
        demo_data.save_image_backbone(folder / "image", architecture=recipe.image_name(size))
        settings["model.timm_image.checkpoint_name"] = str(folder / "image")
        settings["model.timm_image.train_transforms"] = ["resize_shorter_side", "center_crop"]
    types = {column: demo_data.COLUMN_TYPES[column] for column in recipe.columns}
    types[label] = "numerical" if recipe.kind == "regression" else "categorical"
    demo_data.fit_small(
        rows,
        folder / "predictor",
        label=label,
        problem_type=recipe.kind,
        column_types=types,
        hyperparameters=settings,
        min_spread=0.0,
        num_threads=_num_threads(),
    )
    widen(folder / "predictor", rows.drop(columns=label))
    (folder / "done").touch()
    return folder / "predictor"


def _num_threads() -> int:
    """Half of the cores that this process may use, which `taskset` limits."""
    usable = getattr(os, "sched_getaffinity", None)
    return max(1, (len(usable(0)) if usable else os.cpu_count() or 1) // 2)


def widen(predictor_path: Path, rows: pd.DataFrame) -> None:
    """Scale the saved head until its logits spread by 0.5 over rows: among equal scores any two engines agree."""
    import torch

    from scoring.predictor import load_predictor

    learner = load_predictor(predictor_path)._learner
    model = learner._model
    logits = []
    keep = model.register_forward_hook(lambda _module, _inputs, output: logits.append(_find_logits(model, output)))
    learner.predict(rows.head(64), realtime=True)
    keep.remove()
    found = torch.cat(logits).cpu()
    factor = 0.5 / float(found.std(dim=0).max())
    path = predictor_path / "model.ckpt"
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    state = checkpoint["state_dict"]
    heads = ("model.head.linear", "model.head")
    head = next(name for name in heads if f"{name}.weight" in state)
    state[f"{head}.weight"] *= factor
    state[f"{head}.bias"] = (state[f"{head}.bias"] - found.mean(dim=0)) * factor
    torch.save(checkpoint, path)
    print(f"{predictor_path.parent.name}: head scaled by {factor:.1f}", flush=True)


def _find_logits(model: Any, output: Any) -> Any:
    output = output if isinstance(output, dict) else model.get_output_dict(*output)
    return output[model.prefix]["logits"].detach()


def _label(rows: pd.DataFrame, kind: str) -> tuple[str, Any]:
    score = rows[demo_data.LABEL] + 0.05 * rows["Quantity"] - 0.02 * rows["Age"].fillna(12).astype(float)
    if kind == "regression":
        return "Days", 30 + 10 * score.astype(float)
    if kind == "multiclass":
        cuts = score.rank(method="first")
        return "Speed", pd.qcut(cuts, 3, labels=["fast", "medium", "slow"]).astype(str)
    return demo_data.LABEL, rows[demo_data.LABEL]


def save_text_backbone(folder: Path, family: str, size: Size, texts: list[str]) -> None:
    """Save a transformer of that family with random weights, and a WordPiece tokenizer trained on `texts`."""
    import torch
    import transformers
    from tokenizers import BertWordPieceTokenizer
    from transformers import ElectraTokenizer

    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=_VOCABULARY["small"], min_frequency=1, show_progress=False)
    hidden, layers, heads, feed_forward = _WIDTHS[size]
    common: dict[str, Any] = {
        "vocab_size": _VOCABULARY[size],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": feed_forward,
        "max_position_embeddings": 514 if family == "roberta" else 512,
    }
    torch.manual_seed(0)
    if family == "electra":
        config = transformers.ElectraConfig(**common, embedding_size=hidden // 2)
        model = transformers.ElectraModel(config)
    elif family == "bert":
        model = transformers.BertModel(transformers.BertConfig(**common))
    elif family == "roberta":
        model = transformers.RobertaModel(transformers.RobertaConfig(**common, type_vocab_size=1, pad_token_id=0))
    elif family == "deberta_v3":
        config = transformers.DebertaV2Config(
            **common,
            relative_attention=True,
            position_buckets=256,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        )
        model = transformers.DebertaV2Model(config)
    else:
        raise ValueError(f"no text family {family!r}")
    model.save_pretrained(folder)
    ElectraTokenizer(vocab=pieces.get_vocab(), model_max_length=512).save_pretrained(folder)


def main(arguments: list[str]) -> None:
    folder, *rest = arguments
    size: Size = "usual" if "usual" in rest else "small"
    names = [name for name in rest if name in RECIPES] or list(RECIPES)
    for name in names:
        build_predictor(name, Path(folder).absolute() / name, size)
        print(f"{name}: ready", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
