"""Kills of real processes in real Ray runs, and what is left after one rerun; figures as JSON.

    python -m tests.chaos FOLDER PREDICTOR CACHE OUT.json [--seed N] [--rows N] [--real] PART=COUNT [...]

The parts: `driver` (a driver is killed at a random moment, then run once more), `owned` (the same, each with a Ray of its own),
`turns` (drivers of one run are killed one after another), `actors` and `workers` (scoring actors and feature workers are killed
during one run), `nodes` (one of three nodes is removed), `stalls` (one that cannot be done without), `contenders` (two drivers
in the same second), `zombies` (a driver is stopped, followed by another one, and wakes up), `hopeless` (all rows are bad). Ray
is the one of RAY_ADDRESS, but for `owned`, `nodes` and `stalls`. Positions are drawn from the seed, which is printed. With
`--real` the predictor scores, else the formula of `tests/formula.py`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
_SCORES = ("proba_0", "proba_1", "prediction")


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
    files: Mapping[str, int]
    is_real: bool = False
    settings: Sequence[str] = ()
    address: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.1
    """How long a window takes the formula, but in a rerun."""
    workers_read: bool = False
    """Whether feature workers read their rows themselves, as those before a GPU that decodes."""
    quiet: pa.Table | None = None
    """What a run scored that nothing happened to, in order."""
    number: int = field(default=0)

    @property
    def num_rows(self) -> int:
        return sum(self.files.values())

    def start(self, output: Path, *, delay_s: float | None = None) -> "subprocess.Popen[str]":
        """A driver, its log beside the output."""
        delay = self.delay_s if delay_s is None else delay_s
        own = ["--workers-read"] if self.workers_read else []
        module = ["jobs.score"] if self.is_real else ["tests.formula", f"--delay={delay}", *own, "--"]
        command = [sys.executable, "-m", *module, "--input", str(self.folder / "data")]
        command += ["--predictor", str(self.predictor), "--output", str(output)]
        for setting in (f"engine.cache={self.cache}", *self.settings):
            command += ["--set", setting]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": "PASSIVE"}
        environment |= self.environment
        if self.address:
            environment["RAY_ADDRESS"] = self.address
        with log_of(output).open("a") as log:
            return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, text=True)

    def output(self) -> Path:
        self.number += 1
        return self.folder / f"out-{self.number}"

    def finish(self, output: Path, *, delay_s: float = 0.0) -> Published:
        """One run, or rerun, to its end, and what it published."""
        code = self.start(output, delay_s=delay_s).wait(_TIMEOUT_S)
        assert code == 0, log_of(output).read_text()[-4000:]
        return self.check(read_published(output))

    def run_quietly(self) -> float:
        """Score once undisturbed, to compare with; returns seconds."""
        start = time.monotonic()
        self.quiet = _in_order(self.finish(self.output(), delay_s=self.delay_s).scores)
        return time.monotonic() - start

    def check(self, published: Published) -> Published:
        """Every row once, the formula's score, and a quiet run's to the last bit."""
        expected = sorted((path, row) for path, count in self.files.items() for row in range(count))
        assert published.identities() == expected
        for shard in published.manifest["shards"]:
            assert shard["state"] == "complete"
        if not self.is_real:
            rows = published.scores["source_row"].to_numpy()
            assert (published.scores["proba_1"].to_numpy() == score_of(rows)).all()
        if self.quiet is not None:
            ours = _in_order(published.scores)
            for name in _SCORES:
                assert ours[name].equals(self.quiet[name]), f"{name} is not what a quiet run gives"
        return published

    def check_not_early(self, output: Path) -> None:
        """`latest.json` leads to a whole run or is not there."""
        if (output / "latest.json").exists():
            self.check(read_published_any(output))

    def rows_scored(self, output: Path) -> int:
        """Rows that were ever scored, with the formula, also those that were scored twice."""
        diary = diary_of(output)
        return sum(map(int, diary.read_text().split())) if diary.exists() else 0

    def rows_done(self, output: Path) -> int:
        """Rows with a receipt so far: the last attempt's, and those of earlier ones that it goes on from."""
        attempts = sorted(output.glob("runs/*/_work/*/taken.json"))
        if not attempts:
            return 0
        taken = json.loads(attempts[-1].read_text())["receipts"]
        own = [json.loads(path.read_text()) for path in attempts[-1].parent.glob("receipts/*.json")]
        return sum(file["rows"] for receipt in (*taken, *own) for file in receipt["files"])

    def settle(self, output: Path) -> tuple[int, int]:
        """Rows scored and rows done once both stand still: Ray's workers go on for a moment when their driver is gone."""
        before = (-1, -1)
        while before != (now := (self.rows_scored(output), self.rows_done(output))):
            before = now
            time.sleep(2)
        return now

    def wait_for_rows(self, output: Path, driver: "subprocess.Popen[str]", rows: float) -> None:
        """Return when so many rows have their receipts."""
        deadline = time.monotonic() + _TIMEOUT_S
        while self.rows_done(output) < rows:
            assert driver.poll() is None, log_of(output).read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _in_order(scores: pa.Table) -> pa.Table:
    order = scores.select(["source_file", "source_row"]).to_pandas().sort_values(["source_file", "source_row"])
    return scores.select(list(_SCORES)).take(pa.array(order.index)).combine_chunks()


def log_of(output: Path) -> Path:
    return output.parent / f"{output.name}.log"


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
    """Drivers killed at moments spread over a whole run; each is run once more, and must have lost and doubled nothing.

    Scored twice, by the rerun, is what was in flight and no more: rows that had been scored and had no receipt.

    A driver that was done before its moment is checked too, and not counted.
    """
    end_s = quiet_s = chaos.run_quietly()
    kills: list[dict[str, Any]] = []
    too_late = 0
    while len(kills) < count:
        output = chaos.output()
        moment = float(rng.uniform(0.02, 0.95)) * end_s
        driver = chaos.start(output)
        try:
            driver.wait(moment)
        except subprocess.TimeoutExpired:
            driver.kill()
        was_killed = driver.wait() == -signal.SIGKILL
        scored, done = chaos.settle(output)
        chaos.check_not_early(output)
        is_published = (output / "latest.json").exists()
        start = time.monotonic()
        chaos.finish(output)
        kill = {"at_s": round(moment, 2), "rows_done": done, "rerun_s": round(time.monotonic() - start, 1)}
        if not chaos.is_real:
            kill |= {"rows_scored": scored, "rows_scored_twice": chaos.rows_scored(output) - chaos.num_rows}
            assert kill["rows_scored_twice"] == (0 if is_published else scored - done), kill
        print("driver killed" if was_killed else "driver was done", kill, flush=True)
        if was_killed:
            kills.append(kill)
        else:
            too_late += 1
            end_s = min(end_s, moment)  # the machine is less busy than it was
    return {"quiet_s": round(quiet_s, 1), "rows": chaos.num_rows, "too_late": too_late, "kills": kills}


def kill_in_turn(chaos: Chaos, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """One run whose drivers are killed one after another: the first on its way to its first rows, the others ever further."""
    if chaos.is_real:
        chaos.run_quietly()
    output = chaos.output()
    parts, in_flight = [], 0
    for number in range(count):
        driver = chaos.start(output)
        if number:
            parts.append(round((number - 1 + float(rng.uniform(0.1, 0.9))) / (count - 1), 2))
            chaos.wait_for_rows(output, driver, parts[-1] * chaos.num_rows)
        else:
            time.sleep(float(rng.uniform(1, 15)))
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
        scored, done = chaos.settle(output)
        in_flight = scored - done  # those of earlier drivers among them
        assert not (output / "latest.json").exists()
    chaos.finish(output)
    found: dict[str, Any] = {"rows": chaos.num_rows, "killed_at": parts}
    if not chaos.is_real:
        # A driver finds what all before it have done; what they had in flight was scored anew.
        found["rows_scored_twice"] = chaos.rows_scored(output) - chaos.num_rows
        assert found["rows_scored_twice"] == in_flight, (in_flight, found)
    return found


def kill_owners(chaos: Chaos, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """`kill_drivers`, where each driver has started Ray itself."""
    return kill_drivers(replace(chaos, address="local"), count, rng)


def ray_workers(pattern: str) -> list[psutil.Process]:
    """Ray's workers whose title names one of the classes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::") and any(name in title for name in pattern.split("|")):
            found.append(process)
    return found


def kill_workers(pattern: str) -> "Part":
    """Workers of one kind killed one after another during one run."""

    def kill(chaos: Chaos, count: int, rng: np.random.Generator) -> dict[str, Any]:
        quiet_s = chaos.run_quietly()
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
        assert driver.wait() == 0, log_of(output).read_text()[-4000:]
        chaos.check(read_published(output))
        return {
            "rows": chaos.num_rows,
            "kills": len(kills),
            "at_s": kills,
            "quiet_s": round(quiet_s, 1),
            "wall_s": round(wall_s, 1),
            "cost_s_per_kill": round((wall_s - quiet_s) / max(1, len(kills)), 2),
        }

    return kill


@contextmanager
def nodes_with(head_cpus: int, *worker_cpus: int) -> Iterator[Any]:
    """A Ray of several nodes on this machine; the drivers connect to its head."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "include_dashboard": False})
    try:
        for cpus in worker_cpus:
            cluster.add_node(num_cpus=cpus)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def remove_nodes(chaos: Chaos, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """One of three nodes removed when a part of the rows is done: a quarter, half, three quarters, by turns. None comes back."""
    with nodes_with(2, 2, 2) as cluster:
        chaos = replace(chaos, address=cluster.address)
        quiet_s = chaos.run_quietly()
    removals = []
    for number in range(count):
        with nodes_with(2, 2, 2) as cluster:
            chaos.address = cluster.address
            part = (number % 3 + 1) / 4
            output = chaos.output()
            start = time.monotonic()
            driver = chaos.start(output)
            chaos.wait_for_rows(output, driver, part * chaos.num_rows)
            node = sorted(cluster.worker_nodes, key=lambda node: str(node.node_id))[int(rng.integers(2))]
            at_s = time.monotonic() - start
            cluster.remove_node(node, allow_graceful=False)
            code = driver.wait(_TIMEOUT_S)
            assert code == 0, log_of(output).read_text()[-4000:]
            chaos.check(read_published(output))
        removals.append({"part_done": part, "at_s": round(at_s, 1), "wall_s": round(time.monotonic() - start, 1)})
        if not chaos.is_real:
            removals[-1]["rows_scored_twice"] = chaos.rows_scored(output) - chaos.num_rows
        print("node removed", removals[-1], flush=True)
    return {"rows": chaos.num_rows, "quiet_s": round(quiet_s, 1), "removals": removals}


def stall(chaos: Chaos, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """The node with nearly all CPUs removed for good: what is left cannot hold the actors, until they are made fewer."""
    # Not less: the lost node is noticed after 20 s, and new actors take as long on one core.
    chaos = replace(chaos, environment={"RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "100"})
    removals = []
    for _ in range(count):
        with nodes_with(1, 3) as cluster:
            chaos.address = cluster.address
            output = chaos.output()
            start = time.monotonic()
            driver = chaos.start(output)
            chaos.wait_for_rows(output, driver, float(rng.uniform(0.1, 0.6)) * chaos.num_rows)
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            code = driver.wait(_TIMEOUT_S)
            log = log_of(output).read_text()
            # What Ray had running can keep the rest of the cluster from the second try (seen once); a new driver is free of it.
            assert code in (0, 6), log[-4000:]
            if code == 6:
                chaos.finish(output)
            chaos.check(read_published(output))
        found = {"wall_s": round(time.monotonic() - start, 1), "exit_code": code}
        removals.append(found | {"stalls": log.count("The cluster has changed")})
        print("node removed for good", removals[-1], flush=True)
    return {"rows": chaos.num_rows, "removals": removals}


def contend(chaos: Chaos, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Two drivers of one run at once: one scores, the other is told to wait."""
    codes = []
    for _ in range(count):
        output = chaos.output()
        drivers = [chaos.start(output), chaos.start(output)]
        codes.append(sorted(driver.wait(_TIMEOUT_S) for driver in drivers))
        assert codes[-1] == [0, 5], log_of(output).read_text()[-4000:]
        chaos.check(read_published(output))
        assert chaos.is_real or chaos.rows_scored(output) == chaos.num_rows, "the other one scored nothing"
        print("two drivers ended with", codes[-1], flush=True)
    return {"rows": chaos.num_rows, "exit_codes": codes}


def wake(chaos: Chaos, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """A driver is stopped somewhere in its run; another one takes over and publishes; the first wakes up."""
    found = []
    # Both have their actors at once.
    chaos = replace(chaos, settings=(*chaos.settings, "resources.cpus=2"))
    for _ in range(count):
        output = chaos.output()
        zombie = chaos.start(output)
        part = float(rng.uniform(0.05, 0.8))
        chaos.wait_for_rows(output, zombie, part * chaos.num_rows)
        zombie.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        published = chaos.finish(output)
        taken_s = time.monotonic() - start
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        zombie.send_signal(signal.SIGCONT)
        code = zombie.wait(_TIMEOUT_S)
        after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        found.append({"stopped_at": round(part, 2), "takeover_s": round(taken_s, 1), "zombie_exit_code": code})
        print("zombie", found[-1], flush=True)
        assert code == 5, log_of(output).read_text()[-4000:]
        assert after == before, sorted(str(path) for path in after.keys() ^ before.keys())
        assert published.manifest == chaos.check(read_published(output)).manifest
    return {"rows": chaos.num_rows, "zombies": found}


def give_up(chaos: Chaos, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """All rows are bad, as no age is a number: the run stops at its limit, with the reason."""
    for file in chaos.files:
        table = pq.read_table(file)
        ages = pa.array(["unknown"] * table.num_rows)
        pq.write_table(table.set_column(table.column_names.index("age"), "age", ages), file, row_group_size=1024)
    output = chaos.output()
    start = time.monotonic()
    code = replace(chaos, settings=()).start(output).wait(_TIMEOUT_S)
    log = log_of(output).read_text()
    assert code == 3, log[-4000:]
    assert "quarantine.max_fraction: " in log.splitlines()[-1]
    assert "number_invalid" in log.splitlines()[-1]
    assert not (output / "latest.json").exists()
    done = chaos.rows_done(output)
    return {"rows": chaos.num_rows, "rows_done": done, "wall_s": round(time.monotonic() - start, 1)}


Part = Callable[[Chaos, int, np.random.Generator], dict[str, Any]]
PARTS: Mapping[str, Part] = {
    "driver": kill_drivers,
    "turns": kill_in_turn,
    "owned": kill_owners,
    "actors": kill_workers(ACTORS),
    "workers": kill_workers(WORKERS),
    "nodes": remove_nodes,
    "stalls": stall,
    "contenders": contend,
    "zombies": wake,
    "hopeless": give_up,
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("folder", "predictor", "cache", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("parts", nargs="+", metavar="PART=COUNT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--delay", type=float, default=0.1)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--workers-read", action="store_true")
    options = parser.parse_args(arguments)
    print("seed", options.seed)
    rows = pq.read_table(options.predictor.parent / "rows.parquet").replace_schema_metadata(None)
    document: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {name: version(name) for name in ("ray", "pyarrow")},
        "seed": options.seed,
        "scorer": "real predictor" if options.real else "formula",
    }
    for value in options.parts:
        part, _, count = value.partition("=")
        folder = options.folder / part
        files = write_rows(rows, folder / "data", options.rows, 8)
        chaos = Chaos(
            *(folder, options.predictor, options.cache, files, options.real),
            settings=("quarantine.max_fraction=1",),
            delay_s=options.delay,
            workers_read=options.workers_read,
        )
        document[part] = PARTS[part](chaos, int(count), np.random.default_rng(options.seed))
        print(part, document[part], flush=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
