"""Kills of real processes in real Ray runs, and what is left after one rerun; figures as JSON.

    python -m tests.chaos FOLDER PREDICTOR CACHE OUT.json [--seed N] [PART=COUNT ...]

The parts: `driver` (a driver is killed at a random moment, then run once more), `actors` and `workers` (scoring actors and
feature workers are killed during one run). Ray is the one of RAY_ADDRESS. Positions are drawn from the seed, which is printed.
With `--real` the predictor scores, else the formula of `tests/formula.py`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.formula import diary_of, score_of
from tests.published import Published, read_published

REPOSITORY = Path(__file__).resolve().parents[1]
ACTORS, WORKERS = "ScoringActor|FormulaActor", "FeatureWorker"
_TIMEOUT_S = 900.0


def write_rows(rows: pa.Table, folder: Path, num_rows: int, num_files: int) -> dict[str, int]:
    """Files that hold a predictor's rows again and again; returns rows by file."""
    folder.mkdir(parents=True)
    per_file = num_rows // num_files
    repeated = pa.concat_tables([rows] * (per_file // rows.num_rows + 1)).slice(0, per_file).combine_chunks()
    files = [folder / f"{number:04d}.parquet" for number in range(num_files)]
    for file in files:
        pq.write_table(repeated, file, row_group_size=max(1, per_file // 4))
    return {str(file): per_file for file in files}


@dataclass
class Chaos:
    """One set of files to score, over and over, on one Ray."""

    folder: Path
    predictor: Path
    cache: Path
    files: dict[str, int]
    is_real: bool = False
    settings: Sequence[str] = ()
    number: int = field(default=0)

    def start(self, output: Path, *, slow: bool = True) -> "subprocess.Popen[str]":
        """A driver, its log beside the output."""
        module = ["jobs.score"] if self.is_real else ["tests.formula", *(["--slow"] if slow else []), "--"]
        command = [sys.executable, "-m", *module, "--input", str(self.folder / "data")]
        command += ["--predictor", str(self.predictor), "--output", str(output)]
        for setting in (f"engine.cache={self.cache}", *self.settings):
            command += ["--set", setting]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": "PASSIVE"}
        with (output.parent / f"{output.name}.log").open("a") as log:
            return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, text=True)

    def output(self) -> Path:
        self.number += 1
        return self.folder / f"out-{self.number}"

    def finish(self, output: Path) -> Published:
        """One rerun, to its end."""
        code = self.start(output, slow=False).wait(_TIMEOUT_S)
        assert code == 0, (output.parent / f"{output.name}.log").read_text()[-4000:]
        return read_published(output)

    def check(self, published: Published) -> None:
        """Every row once, and the formula's score."""
        expected = sorted((path, row) for path, count in self.files.items() for row in range(count))
        assert published.identities() == expected
        for shard in published.manifest["shards"]:
            assert shard["state"] == "complete"
        if not self.is_real:
            rows = published.scores["source_row"].to_numpy()
            assert (published.scores["proba_1"].to_numpy() == score_of(rows)).all()

    def check_not_early(self, output: Path) -> None:
        """`latest.json` leads to a whole run or is not there."""
        if (output / "latest.json").exists():
            self.check(read_published_any(output))

    def rows_scored(self, output: Path) -> int:
        """Rows that were ever scored, with the formula, also those that were scored twice."""
        return sum(map(int, diary_of(output).read_text().split()))

    def rows_done(self, output: Path) -> int:
        """Rows with a receipt so far."""
        receipts = output.glob("runs/*/_work/*/receipts/*.json")
        return sum(file["rows"] for path in receipts for file in json.loads(path.read_text())["files"])


def read_published_any(output: Path) -> Published:
    """`read_published`, also where the driver died before it dropped `_work`."""
    latest = json.loads((output / "latest.json").read_text())
    folder = output / "runs" / latest["run_id"]
    assert (folder / "_SUCCESS").exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    tables = [pq.read_table(folder / file["path"], partitioning=None) for file in manifest["files"]]
    kinds = [file["path"].partition("/")[0] for file in manifest["files"]]
    found = {
        kind: pa.concat_tables(
            [table for table, name in zip(tables, kinds, strict=True) if name == kind] or [pa.table({})]
        )
        for kind in ("scores", "quarantine")
    }
    return Published(folder, manifest, found["scores"], found["quarantine"])


def kill_drivers(chaos: Chaos, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Drivers killed at moments spread over a whole run; each is run once more, and must have lost and doubled nothing."""
    output = chaos.output()
    start = time.monotonic()
    assert chaos.start(output).wait(_TIMEOUT_S) == 0
    quiet_s = time.monotonic() - start
    chaos.check(read_published(output))
    kills = []
    for _ in range(count):
        output = chaos.output()
        moment = float(rng.uniform(0.05, 1.0)) * quiet_s
        driver = chaos.start(output)
        try:
            driver.wait(moment)
        except subprocess.TimeoutExpired:
            kill_tree(driver.pid)
        code = driver.wait()
        done = chaos.rows_done(output)
        chaos.check_not_early(output)
        start = time.monotonic()
        published = chaos.finish(output)
        chaos.check(published)
        total = sum(chaos.files.values())
        kills.append(
            {"at_s": round(moment, 2), "code": code, "rows_done": done, "rerun_s": round(time.monotonic() - start, 1)}
        )
        if not chaos.is_real:
            kills[-1]["rows_scored_twice"] = chaos.rows_scored(output) - total
        print("driver killed", kills[-1], flush=True)
    return {"quiet_s": round(quiet_s, 1), "rows": sum(chaos.files.values()), "kills": kills}


def kill_tree(pid: int) -> None:
    """SIGKILL for a driver; what Ray started for it on a shared head are not its children."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def ray_workers(pattern: str) -> list[psutil.Process]:
    """Ray's workers whose title names one of the classes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::") and any(name in title for name in pattern.split("|")):
            found.append(process)
    return found


def kill_workers(chaos: Chaos, pattern: str, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Workers of one kind killed one after another during one run."""
    output = chaos.output()
    start = time.monotonic()
    assert chaos.start(output).wait(_TIMEOUT_S) == 0
    quiet_s = time.monotonic() - start
    output = chaos.output()
    start = time.monotonic()
    driver = chaos.start(output)
    kills: list[float] = []
    while driver.poll() is None and time.monotonic() - start < _TIMEOUT_S:
        time.sleep(float(rng.uniform(0.2, 0.4)))
        workers = ray_workers(pattern)
        if workers and len(kills) < count:
            try:
                workers[int(rng.integers(len(workers)))].kill()
            except psutil.NoSuchProcess:
                continue
            kills.append(round(time.monotonic() - start, 2))
    wall_s = time.monotonic() - start
    assert driver.wait() == 0, (output.parent / f"{output.name}.log").read_text()[-4000:]
    chaos.check(read_published(output))
    found = {
        "rows": sum(chaos.files.values()),
        "kills": len(kills),
        "at_s": kills,
        "quiet_s": round(quiet_s, 1),
        "wall_s": round(wall_s, 1),
        "cost_s_per_kill": round((wall_s - quiet_s) / max(1, len(kills)), 2),
    }
    print(pattern, found, flush=True)
    return found


def main(arguments: Sequence[str]) -> None:
    flags = [argument for argument in arguments if argument.startswith("--")]
    values = [argument for argument in arguments if not argument.startswith("--")]
    folder, predictor, cache, out = (Path(value) for value in values[:4])
    seed = next((int(flag.partition("=")[2]) for flag in flags if flag.startswith("--seed=")), 0)
    num_rows = next((int(flag.partition("=")[2]) for flag in flags if flag.startswith("--rows=")), 20_000)
    print("seed", seed)
    rows = pq.read_table(predictor.parent / "rows.parquet").replace_schema_metadata(None)
    files = write_rows(rows, folder / "data", num_rows, 8)
    chaos = Chaos(folder, predictor, cache, files, is_real="--real" in flags, settings=("quarantine.max_fraction=1",))
    document: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {name: version(name) for name in ("ray", "pyarrow")},
        "seed": seed,
        "scorer": "real predictor" if chaos.is_real else "formula",
    }
    for value in values[4:]:
        part, _, count = value.partition("=")
        rng = np.random.default_rng(seed)
        if part == "driver":
            document[part] = kill_drivers(chaos, int(count), rng)
        else:
            pattern = {"actors": ACTORS, "workers": WORKERS}[part]
            document[part] = kill_workers(chaos, pattern, int(count), rng)
        out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
