"""The films: 17,453 real rows with gaps, a small predictor fitted on them, and their held-out part as shards.

    python -m tests.films ROOT

Run as a subprocess of `build`. The data lies beside the project (`../shared/data/films`), never in it.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from jobs.demo_data import fit_small, model_settings

REPOSITORY = Path(__file__).resolve().parents[1]
FILMS = REPOSITORY.parent / "shared" / "data" / "films"
NUM_TRAIN_ROWS = 1_000
NUM_SHARDS = 4


@dataclass(frozen=True)
class Films:
    """Where everything is: image paths in the shards are relative to FILMS."""

    root: Path

    @property
    def predictor(self) -> Path:
        return self.root / "predictor"

    @property
    def parquet(self) -> Path:
        return self.root / "parquet"

    @property
    def csv(self) -> Path:
        return self.root / "csv"


def build(root: Path) -> Films:
    """Fit the predictor and write the shards, unless an earlier call finished it."""
    if not (root / "done").exists():
        # Threads that spin while they wait for each other make a busy machine ten times slower.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run([sys.executable, "-m", "tests.films", str(root)], check=True, cwd=REPOSITORY, env=environment)
    return Films(root)


def write_shards(films: Films) -> None:
    """The held-out rows in order, as four parquet files of several row groups and as four CSV files."""
    table = pq.read_table(FILMS / "heldout.parquet").drop_columns(["tomatometer"]).replace_schema_metadata(None)
    size = -(-table.num_rows // NUM_SHARDS)
    films.parquet.mkdir(parents=True)
    films.csv.mkdir()
    for index in range(NUM_SHARDS):
        part = table.slice(index * size, size)
        pq.write_table(part, films.parquet / f"films-{index}.parquet", row_group_size=1_000)
        pacsv.write_csv(without_nulls(part), films.csv / f"films-{index}.csv")


def without_nulls(table: pa.Table) -> pa.Table:
    """Nulls as empty cells, also in text columns, as a CSV export has them."""
    frame = table.to_pandas().astype(object)
    return pa.table({name: pa.array(["" if pd.isna(v) else str(v) for v in frame[name]]) for name in frame.columns})


def fit(films: Films) -> None:
    """Fit a fusion model of images, two texts, numbers and categories on the first training rows."""
    import torch

    torch.set_num_threads(1)
    schema = json.loads((FILMS / "schema.json").read_text())
    train = pd.read_parquet(FILMS / "train.parquet").head(NUM_TRAIN_ROWS)
    train["image"] = [str(FILMS / name) if isinstance(name, str) else None for name in train["image"]]
    models = ("categorical_mlp", "fusion_mlp", "hf_text", "numerical_mlp", "timm_image")
    texts = [*train["title"], *train["people"]]
    fit_small(
        train,
        films.predictor,
        label=schema["label"],
        problem_type=schema["problem_type"],
        column_types={**schema["column_types"], schema["label"]: "categorical"},
        hyperparameters={**model_settings(models, films.root / "backbones", texts), "optim.max_epochs": 1},
    )


if __name__ == "__main__":
    made = Films(Path(sys.argv[1]))
    write_shards(made)
    fit(made)
    (made.root / "done").touch()
