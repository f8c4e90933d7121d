"""`python -m jobs.demo`: make data and a small predictor on the spot, score them with `jobs.score`, show the result.

Owns the folder it makes and what it prints. The ingredients are `jobs/demo_data.py`; the scoring is the real command,
run as a subprocess.
"""

import json
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from jobs import demo_data

EXIT_USAGE = 2
NUM_TRAIN_ROWS = 600
NUM_IMAGES = 300
MAX_FILES_SHOWN = 6
MODELS = ("categorical_mlp", "fusion_mlp", "hf_text", "numerical_mlp", "timm_image")
CORRUPT = "corrupt.jpg"
MISSING = "does-not-exist.jpg"

console = Console(highlight=False)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the demo: new, empty, or an earlier demo's.")],
    # Two rows are bad on purpose, and the job refuses more than 1 % of bad rows.
    rows: Annotated[int, typer.Option(min=200, help="Rows to score.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the data and the backbones.")] = 0,
) -> None:
    """Make pets, photographs and a predictor, then score the pets."""
    folder = output.absolute()
    recipe = {"rows": rows, "seed": seed}
    if is_complete(folder, recipe):
        console.print(f"[bold]{folder}[/] has this demo's data and predictor already: using them")
    else:
        make(folder, recipe)
    command = score_command(folder)
    console.print(f"\n[bold]$ {show(command)}[/]", soft_wrap=True)
    exit_code = subprocess.run(command, check=False).returncode
    if exit_code == 0:
        print_results(folder)
        print_next(folder)
    raise typer.Exit(exit_code)


def score_command(folder: Path, *more: str) -> list[str]:
    paths = ["--input", str(folder / "data"), "--predictor", str(folder / "predictor")]
    return [sys.executable, "-m", "jobs.score", *paths, "--output", str(folder / "scores"), *more]


def show(command: list[str]) -> str:
    return " ".join(["python", *command[1:]])


def is_complete(folder: Path, recipe: dict[str, int]) -> bool:
    """Tell whether `folder` holds this demo, finished. Exits with 2 when it holds anything else."""
    marker = folder / "demo.json"
    if not marker.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            refuse(f"{folder} is not empty and not a demo's folder; name another one in --output")
        return False
    found = json.loads(marker.read_text())
    differing = [f"{key} {found[key]}, asked for {recipe[key]}" for key in recipe if found[key] != recipe[key]]
    if differing:
        refuse(f"{folder} holds another demo ({'; '.join(differing)}); name another folder in --output or remove it")
    return bool(found["complete"])


def refuse(message: str) -> None:
    console.print(f"[red]{message}[/]", soft_wrap=True)
    raise typer.Exit(EXIT_USAGE)


def make(folder: Path, recipe: dict[str, int]) -> None:
    """Make the data and the predictor. The marker goes first, so that an interrupted demo can be made anew."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "demo.json"
    marker.write_text(json.dumps({**recipe, "complete": False}))
    for name in ("data", "images", "backbones", "predictor"):
        shutil.rmtree(folder / name, ignore_errors=True)
    with console.status("cutting photographs and making up pets"):
        make_data(folder, recipe["rows"], np.random.default_rng(recipe["seed"]))
    console.print(f"data: {recipe['rows']} rows in 4 parquet files and 1 CSV, {NUM_IMAGES} photographs")
    with console.status(f"training a small predictor on {NUM_TRAIN_ROWS} rows (about a minute)"):
        fit(folder, recipe["seed"])
    console.print(f"predictor: {', '.join(MODELS)}, trained on {NUM_TRAIN_ROWS} rows", soft_wrap=True)
    marker.write_text(json.dumps({**recipe, "complete": True}))


def make_data(folder: Path, num_rows: int, rng: np.random.Generator) -> None:
    images = demo_data.cut_photographs(folder / "images", NUM_IMAGES, rng)
    pets = demo_data.make_pets(NUM_TRAIN_ROWS + num_rows, images, rng)
    pets = demo_data.blank(pets, demo_data.WITH_NULLS, rng)
    pets[:NUM_TRAIN_ROWS].to_parquet(folder / "train.parquet", index=False)
    to_score = pets[NUM_TRAIN_ROWS:].drop(columns=demo_data.LABEL).reset_index(drop=True)
    demo_data.write_shards(with_bad_images(to_score, folder / "images"), folder / "data")


def with_bad_images(table: pd.DataFrame, images: Path) -> pd.DataFrame:
    """Give one row near the start a file that is no image and one at the end a file that is not there."""
    # Not a truncated JPEG: AutoGluon makes Pillow open those, with the missing part grey.
    (images / CORRUPT).write_bytes(b"This file is named like a JPEG and is none.\n" * 200)
    table.loc[7, "Images"] = str(images / CORRUPT)
    table.loc[len(table) - 5, "Images"] = str(images / MISSING)
    return table


def fit(folder: Path, seed: int) -> None:
    train = pd.read_parquet(folder / "train.parquet")
    texts = [*train["Description"].dropna(), *train["Name"].dropna()]
    with quiet():
        settings = demo_data.model_settings(MODELS, folder / "backbones", texts, seed=seed)
        # 96 pixels instead of 224: the demo stays under two minutes on two cores.
        settings |= {"model.timm_image.image_size": 96, "optim.max_epochs": 4, "optim.lr": 5e-3}
        demo_data.fit_small(
            train,
            folder / "predictor",
            label=demo_data.LABEL,
            problem_type="binary",
            column_types=demo_data.COLUMN_TYPES,
            hyperparameters=settings,
        )
    shutil.rmtree(folder / "backbones")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the training's log, warnings and progress bars; errors still raise."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def print_results(folder: Path) -> None:
    scores = folder / "scores"
    latest = json.loads((scores / "latest.json").read_text())
    run = scores / "runs" / latest["run_id"]
    totals = json.loads((run / "manifest.json").read_text())["totals"]
    console.print(make_tree(folder, Tree(f"[bold]{folder}[/]")))
    read, scored, quarantined = (totals[name] for name in ("rows_read", "rows_scored", "rows_quarantined"))
    sign = "=" if read == scored + quarantined else "[red]is not[/]"
    console.print(f"\nrows read [bold]{read}[/] {sign} scored [bold]{scored}[/] + quarantined [bold]{quarantined}[/]\n")
    console.print(quarantine_table(run / "quarantine"))


def make_tree(folder: Path, tree: Tree) -> Tree:
    """Add what `folder` holds to `tree`; of many files, the first ones."""
    entries = sorted(path for path in folder.iterdir() if path.name != "demo.json")
    for path in entries[:MAX_FILES_SHOWN]:
        if path.is_dir():
            branch = tree.add(f"{path.name}/")
            if path.name != "predictor":
                make_tree(path, branch)
        else:
            tree.add(f"{path.name} [dim]{path.stat().st_size:,} bytes[/]")
    if len(entries) > MAX_FILES_SHOWN:
        tree.add(f"[dim]... {len(entries) - MAX_FILES_SHOWN} more[/]")
    return tree


def quarantine_table(folder: Path) -> Table:
    columns = ["source_file", "source_row", "stage", "reason", "message"]
    table = Table(title="quarantined rows", title_justify="left")
    for name in columns:
        table.add_column(name, no_wrap=name != "message", overflow="fold")
    for part in sorted(folder.glob("part-*.parquet")):
        for row in pq.read_table(part, columns=columns).to_pylist():
            file = Path(row["source_file"]).name
            table.add_row(file, str(row["source_row"]), row["stage"], row["reason"], escape(row["message"]))
    return table


def print_next(folder: Path) -> None:
    blank = ("--set", "images.on_error=blank")
    for reason, command in (
        ("see what a run would do, without scoring", show(score_command(folder, "--dry-run"))),
        ("the same command again: this run is published, so it does nothing", show(score_command(folder))),
        ("score bad images as blank ones, as AutoGluon does", show(score_command(folder, *blank))),
    ):
        console.print(f"\n[dim]# {reason}[/]\n{command}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
