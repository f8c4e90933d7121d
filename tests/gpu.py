"""The main job on a GPU: its scores against the CPU's fp32 reference, and what the actors logged, as one JSON document.

    python -m tests.gpu FOLDER ROWS [OUT.json]

Makes the demo's data and predictor in FOLDER, scores them through `jobs.score` on the GPU and compares row by row.
"""

import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tests import predictors
from tests.published import read_published

REPOSITORY = Path(__file__).resolve().parents[1]
COMPARED_ROWS = 400


def run_demo(folder: Path, rows: int) -> str:
    """Make and score the demo; returns its log. Raises CalledProcessError, with the log printed, when it fails."""
    command = [sys.executable, "-m", "jobs.demo", "--output", str(folder), "--rows", str(rows)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    if done.returncode:
        print(log)
        done.check_returncode()
    return log


def compare(folder: Path) -> dict[str, float]:
    """Scores of the first shard's good rows against `predict_proba(realtime=True)` on the CPU."""
    published = read_published(folder / "scores")
    shard = folder / "data" / "pets-0.parquet"
    scores = published.scores.to_pandas()
    scores = scores[scores["source_file"] == str(shard.absolute())].sort_values("source_row").head(COMPARED_ROWS)
    rows = pd.read_parquet(shard).iloc[scores["source_row"]]
    sample = folder / "sample.parquet"
    pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), sample)
    reference = predictors.reference(folder / "predictor", sample).to_pandas()
    names = [name for name in reference.columns if name.startswith("proba_")]
    difference = np.abs(scores[names].to_numpy() - reference[names].to_numpy())
    flips = int((scores["prediction"].to_numpy() != reference["prediction"].to_numpy()).sum())
    return {
        "rows": len(rows),
        "max_abs_diff": float(difference.max()),
        "label_flips": flips,
        "spread": float(scores[names[0]].std()),
    }


def check(folder: Path, rows: int) -> dict[str, Any]:
    """Run and compare; the document that is kept in tests/data/bench."""
    log = run_demo(folder, rows)
    manifest = read_published(folder / "scores").manifest
    throughput = [line.split("score actor=", 1)[1] for line in log.splitlines() if "final=true" in line]
    started = re.findall(r"load_s=([\d.]+)", log)
    packages = ("autogluon.multimodal", "ray", "torch", "transformers", "timm", "pyarrow")
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "engine": manifest["engine"],
        "totals": manifest["totals"],
        "timings": manifest["timings"],
        "actor_load_s": [float(seconds) for seconds in started],
        "throughput": throughput,
        "against_cpu_fp32": compare(folder),
    }


if __name__ == "__main__":
    document = check(Path(sys.argv[1]), int(sys.argv[2]))
    text = json.dumps(document, indent=1)
    print(text)
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(text + "\n")
