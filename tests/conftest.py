"""Shared by all tests: one Ray for the session, one zoo of predictors, and the job as a user starts it.

The zoo is kept in pytest's cache, named after the code that makes it: the first session of a checkout fits it (a few
minutes), later ones do not.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import predictors
from tests.layouts import LAYOUT_SETTINGS, ActorLines, ScoredLayout, wait_for_goodbyes, write_layout
from tests.predictors import Predictor

REPOSITORY = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Run:
    """One `jobs.score` process as it ended: its exit code, the closing JSON document and the whole log."""

    code: int
    summary: Mapping[str, Any]
    log: str

    @property
    def error(self) -> str:
        return str(self.summary.get("error", ""))


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With pytest-xdist (`--dist loadgroup`): one worker has every test that runs Ray, as two Rays on one machine disturb
    each other; the modules are dealt out among the others. The long ones come first, and those that the zoo is fitted for.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if _uses_ray(item) else item.path.stem))
    items.sort(key=lambda item: (not _uses_ray(item), item.path.stem != "test_upstream"))


def _uses_ray(item: pytest.Item) -> bool:
    return "ray_head" in getattr(item, "fixturenames", ()) or item.get_closest_marker("ray") is not None


def source_hash(*names: str) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update((REPOSITORY / name).read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def zoo_root(pytestconfig: pytest.Config) -> Path:
    """Where the zoo's predictors are and the feature specs extracted from them."""
    cache = pytestconfig.cache
    assert cache is not None
    return cache.mkdir(f"zoo-{source_hash('tests/predictors.py', 'jobs/demo_data.py', 'scoring/spec.py')}")


@pytest.fixture(scope="session")
def zoo(zoo_root: Path) -> Mapping[str, Predictor]:
    """Every predictor of the zoo, fitted in one process."""
    return predictors.build_all(predictors.NAMES, zoo_root)


@dataclass(frozen=True)
class RayHead:
    """The session's Ray: its address and where its workers' logs are."""

    address: str
    logs: Path


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """One Ray head for the session, with four CPUs whatever the machine has: room for three scoring actors.

    It says that it has an L4, so that a run builds TensorRT for RTX's engine ahead; there is no GPU to use it.
    """
    # Not under pytest's folder: a Unix socket's path has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--head", "--block", "--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats"]
    options += [f"--port={port}", f"--temp-dir={folder}", '--resources={"accelerator_type:L4": 1}']
    head = subprocess.Popen(
        [str(Path(sys.executable).parent / "ray"), "start", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "OMP_WAIT_POLICY": "PASSIVE",
            # As `jobs` has it of a Ray of its own.
            "RAY_idle_worker_killing_time_threshold_ms": "600000",
        },
        cwd=REPOSITORY,
    )
    _wait_for_port(port, head)
    yield RayHead(f"127.0.0.1:{port}", folder / "session_latest" / "logs")
    # Not terminate(): a head that says goodbye takes 30 s.
    for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)
    # A head that is terminated leaves its address here, and the next ray.init() of anybody waits for it in vain.
    note = Path("/tmp/ray/ray_current_cluster")
    if note.is_file() and note.read_text().strip().endswith(f":{port}"):
        note.unlink()


def _wait_for_port(port: int, head: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, "ray start ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError("ray start did not open its port in 120 s")


class ScoreCommand:
    """Runs `python -m jobs.score`, with this session's Ray and its cache of feature specs."""

    def __init__(self, address: str | None, cache: Path, module: Sequence[str] = ("jobs.score",)) -> None:
        self._address = address
        self._cache = cache
        self._module = module

    def __call__(self, *arguments: object, cwd: Path = REPOSITORY, timeout_s: float = 400) -> Run:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": "PASSIVE"}
        if self._address:
            environment["RAY_ADDRESS"] = self._address
        command = [sys.executable, "-m", *self._module, *map(str, arguments)]
        if not any(str(argument).startswith("engine.cache") for argument in arguments):
            command += ["--set", f"engine.cache={self._cache}"]
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        lines = done.stdout.strip().splitlines()
        summary = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        return Run(done.returncode, summary, done.stdout + done.stderr)


@pytest.fixture(scope="session")
def score(ray_head: RayHead, zoo_root: Path) -> ScoreCommand:
    """The main job on this session's Ray."""
    return ScoreCommand(ray_head.address, zoo_root / predictors.CACHE)


@pytest.fixture(scope="session")
def formula(ray_head: RayHead, zoo_root: Path) -> ScoreCommand:
    """The main job with a formula in the model's place: 40 s less a run, as nothing imports AutoGluon."""
    return ScoreCommand(ray_head.address, zoo_root / predictors.CACHE, ("tests.formula", "--"))


@pytest.fixture(scope="session")
def tabular_rows(zoo: Mapping[str, Predictor]) -> pa.Table:
    """300 rows of the tabular predictor, with ids."""
    table = pq.read_table(zoo["ft_transformer"].rows).replace_schema_metadata(None).slice(0, 300)
    return table.append_column("row_id", pa.array([f"id-{i:03d}" for i in range(table.num_rows)]))


@pytest.fixture(scope="session")
def scored_layout(
    ray_head: RayHead,
    score: ScoreCommand,
    zoo: Mapping[str, Predictor],
    tabular_rows: pa.Table,
    tmp_path_factory: pytest.TempPathFactory,
) -> ScoredLayout:
    """The real job over parquet, CSV and Hive partitions. Tests that change its output work on a copy."""
    folder = tmp_path_factory.mktemp("scored")
    data, cache, output = folder / "data", folder / "cache", folder / "out"
    files = write_layout(tabular_rows, data)
    before = ActorLines.read(ray_head.logs)
    # The cache is empty: the run extracts the feature spec itself.
    settings = ("--set", "resources.actors=1", "--set", f"engine.cache={cache}", *LAYOUT_SETTINGS)
    arguments = ("--input", data, "--predictor", zoo["ft_transformer"].path, "--output", output, *settings)
    run = score(*arguments)
    assert run.code == 0, run.log
    lines = wait_for_goodbyes(ray_head.logs, before, rows=300)
    return ScoredLayout(files, data, cache, output, arguments, run.log, lines)


@pytest.fixture(scope="session")
def score_without_ray(zoo_root: Path) -> ScoreCommand:
    """The main job for commands that end before Ray starts."""
    return ScoreCommand(None, zoo_root / predictors.CACHE)
