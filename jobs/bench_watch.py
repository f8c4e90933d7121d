"""Watches a command from outside while it runs: parts as they land, GPU busy share, memory and CPU by kind of process, spilling.

Owns the sampling and the arithmetic on its series. The command gets a Ray of its own (a temporary folder for its sockets and
logs, no RAY_ADDRESS), so that its processes are its children and its logs are read afterwards. Knows nothing of peers.
"""

import json
import logging
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from jobs.bench_series import Series

logger = logging.getLogger(__name__)

_TICK_S = 0.1
# Walking the process tree costs some ms: five ticks apart.
_TREE_TICKS = 5
_MIB = 2**20
# nvml.h: nvmlClocksEventReasonSwThermalSlowdown and nvmlClocksThrottleReasonHwThermalSlowdown.
_HEAT = 0x20 | 0x40
# Parts of command lines, titles that Ray gives its workers among them -> what the tables call them; the first match counts.
_KINDS = (
    ("FeatureWorker", "feature workers"),
    ("ScoringActor", "scoring actors"),
    ("PredictProba", "predict_proba actors"),
    ("ray::", "other ray workers"),
    ("/ray/", "ray system"),
)
_ACTOR_STARTS = re.compile(r"^(\S+ \S+) \w+ score actor=(\w+) starts$", re.MULTILINE)
_ACTOR_WAITED = re.compile(r"^(\S+ \S+) \w+ score actor=(\w+) (waited_s=.*)$", re.MULTILINE)
_ACTOR_LOADED = re.compile(r"^(\S+ \S+) \w+ score actor=(\w+) (load_s=.*)$", re.MULTILINE)
_DRIVER_LINE = re.compile(r"^(\d{4}-\S+ \S+) [A-Z]+ (.*)$", re.MULTILINE)
_PHASE = re.compile(r"(\w+_s)=([\d.]+)")
_ACTOR_LINE = re.compile(
    r"^(\S+ \S+) \w+ score actor=(\w+) provider=(\S+) rows=(\d+) rows_per_s=(\d+) window=(\d+) wait_pct=(\d+) "
    r"stage_pct=(\d+) batch=\d+( final=true)?$",
    re.MULTILINE,
)
_SPILLED = re.compile(r"Spilled (\d+) MiB")


@dataclass
class Watched:
    """A command as it ended and what was seen of it. `summary` is its last line on standard output, a JSON document."""

    code: int
    wall_s: float
    summary: Mapping[str, Any]
    tail: str
    landed: Series = field(default_factory=list)
    gpu_busy: Series = field(default_factory=list)
    jpeg_busy: Series = field(default_factory=list)
    gpu_clock: Series = field(default_factory=list)
    gpu_hot: Series = field(default_factory=list)
    gpu_memory_mib: float = 0.0
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    cpu: dict[str, dict[str, float]] = field(default_factory=dict)
    """By kind of process: seconds of a core, and how many there ever were, less some that lived for less than a second."""
    spilled_mib: float = 0.0
    driver: dict[str, float] = field(default_factory=dict)
    """Seconds since its start until the driver said its first line, and until its plan was made and Ray was there."""
    loaded: list[dict[str, Any]] = field(default_factory=list)
    actors: list[dict[str, Any]] = field(default_factory=list)
    """What each scoring actor says of itself, every ten seconds and at its end: see `meter.py`."""


def watch(command: Sequence[str], output: Path, *, timeout_s: float, environment: Mapping[str, str]) -> Watched:
    """Run the command to its end, sampling; `output` is where parts land. Kills it and its children after `timeout_s`."""
    # Not below `output`: a Unix socket's path has 107 characters at most.
    ray_folder = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    own |= {"RAY_TMPDIR": str(ray_folder), **environment}
    started_at, start = time.time(), time.perf_counter()
    with (ray_folder / "stdout").open("w") as stdout, (ray_folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=own)
        samples = _Samples(psutil.Process(process.pid), output, ray_folder, start)
        try:
            while process.poll() is None and time.perf_counter() - start < timeout_s:
                samples.take()
                time.sleep(_TICK_S)
        finally:
            if process.poll() is None:
                logger.warning(
                    "stopping process %d (%s) after %.0f s", process.pid, command[0], time.perf_counter() - start
                )
                _kill(process)
    wall_s = time.perf_counter() - start
    samples.take_parts()
    lines = (ray_folder / "stdout").read_text(errors="replace").strip().splitlines()
    summary = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    told = (ray_folder / "stderr").read_text(errors="replace")
    watched = Watched(process.returncode, wall_s, summary, told[-4000:])
    samples.fill(watched)
    watched.driver = _driver_marks(told, started_at)
    logs = ray_folder / "ray" / "session_latest" / "logs"
    _read_logs(logs, started_at, watched)
    _keep_logs([ray_folder / "stderr", *logs.glob("worker-*.err")], output.parent / "logs")
    shutil.rmtree(ray_folder, ignore_errors=True)
    return watched


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """The process and its children, the raylet's workers among them: these alone."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    for child in psutil.wait_procs(children, timeout=10)[1]:
        child.kill()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Samples:
    """What is sampled while the command runs."""

    def __init__(self, root: psutil.Process, output: Path, ray_folder: Path, start: float) -> None:
        self._root, self._output, self._ray_folder, self._start = root, output, ray_folder, start
        self._probe = GpuProbe()
        self._ticks = 0
        self._seen: set[Path] = set()
        self._rows = 0
        self._landed: Series = []
        self._memory: dict[str, dict[str, float]] = {}
        self._cpu: dict[int, tuple[str, float]] = {}
        self._spilled = 0.0

    def take(self) -> None:
        self._probe.take(time.perf_counter() - self._start)
        self.take_parts()
        if self._ticks % _TREE_TICKS == 0:
            self._take_processes()
            self._spilled = max(self._spilled, _folder_mib(self._ray_folder / "ray" / "session_latest"))
        self._ticks += 1

    def take_parts(self) -> None:
        """Count the rows of parts that are new, scored and quarantined ones."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        new = 0
        for path in self._output.glob("runs/*/[sq]*/part-*.parquet"):
            if path in self._seen:
                continue
            try:
                new += pq.read_metadata(path).num_rows
            except (OSError, pa.ArrowInvalid):
                continue  # still being written: the next tick sees it whole
            self._seen.add(path)
        if new:
            self._rows += new
            self._landed.append((round(time.perf_counter() - self._start, 3), self._rows))

    def _take_processes(self) -> None:
        sums: dict[str, list[float]] = {}
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                title = " ".join(process.cmdline())
                memory, times = process.memory_info(), process.cpu_times()
            except psutil.Error:
                continue
            if not title:
                continue  # it has ended, and its parent has not looked yet
            kind = "driver" if process.pid == self._root.pid else process_kind(title)
            self._cpu[process.pid] = kind, times.user + times.system
            # Shared pages are mostly the object store's, counted in every process that read from it.
            private = memory.rss - getattr(memory, "shared", 0)
            sums.setdefault(kind, []).append(private / _MIB)
            self._keep(kind, "peak_mib", memory.rss / _MIB)
            self._keep(kind, "peak_private_mib", private / _MIB)
        for kind, values in sums.items():
            self._keep(kind, "num", len(values))
            self._keep(kind, "peak_private_all_mib", sum(values))

    def _keep(self, kind: str, name: str, value: float) -> None:
        peaks = self._memory.setdefault(kind, {})
        peaks[name] = max(peaks.get(name, 0.0), round(value, 1))

    def fill(self, watched: Watched) -> None:
        watched.landed = self._landed
        watched.gpu_busy, watched.jpeg_busy = self._probe.busy, self._probe.jpeg
        watched.gpu_clock, watched.gpu_hot = self._probe.clock, self._probe.hot
        watched.gpu_memory_mib = round(self._probe.peak_mib, 1)
        watched.memory = self._memory
        kinds = dict.fromkeys(kind for kind, _ in self._cpu.values())
        spent = {kind: [seconds for mine, seconds in self._cpu.values() if mine == kind] for kind in kinds}
        watched.cpu = {kind: {"cpu_s": round(sum(all_s), 1), "num": len(all_s)} for kind, all_s in spent.items()}
        watched.spilled_mib = self._spilled


def process_kind(title: str) -> str:
    """What the tables call a process with that command line."""
    return next((kind for part, kind in _KINDS if part in title), "other")


class GpuProbe:
    """The driver's own figures, where its library is installed and there is a GPU: of all GPUs the share of the time that
    they are busy, their clock (MHz), the share (%) of them that heat holds back, and their memory."""

    def __init__(self) -> None:
        self.busy: Series = []
        self.jpeg: Series = []
        self.clock: Series = []
        self.hot: Series = []
        self.peak_mib = 0.0
        self._handles: list[Any] = []
        try:
            import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except Exception as error:  # a missing package, library or driver: the figures are absent then
            logger.info("GPU busy share is not measured: %s", error)

    def take(self, seconds: float) -> None:
        if not self._handles:
            return
        import pynvml

        at = round(seconds, 2)
        rates = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in self._handles]
        self.busy.append((at, statistics.mean(rates)))
        used = sum(pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self._handles)
        self.peak_mib = max(self.peak_mib, used / _MIB)
        with suppress(AttributeError, pynvml.NVMLError):  # an older driver
            clocks = [pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) for handle in self._handles]
            self.clock.append((at, statistics.mean(clocks)))
            reasons = [pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) for handle in self._handles]
            self.hot.append((at, statistics.mean(100.0 * bool(reason & _HEAT) for reason in reasons)))
        try:
            jpeg = [pynvml.nvmlDeviceGetJpgUtilization(handle)[0] for handle in self._handles]
        except (AttributeError, pynvml.NVMLError):
            return  # an older driver, or a GPU without JPEG engines
        self.jpeg.append((at, statistics.mean(jpeg)))


@contextmanager
def probed_gpu() -> Iterator[GpuProbe]:
    """A probe that is taken every tick for as long as the block runs, in this process; its seconds count from there."""
    probe, ended, start = GpuProbe(), threading.Event(), time.perf_counter()

    def sample() -> None:
        while not ended.wait(_TICK_S):
            probe.take(time.perf_counter() - start)

    thread = threading.Thread(target=sample, name="gpu-probe", daemon=True)
    thread.start()
    try:
        yield probe
    finally:
        ended.set()
        thread.join()


def _folder_mib(session: Path) -> float:
    """What lies in the session's spill folders now."""
    total = 0
    for path in session.glob("ray_spilled_objects*/*"):
        with suppress(OSError):  # Ray removes them as it reads them back
            total += path.stat().st_size
    return round(total / _MIB, 1)


def _keep_logs(files: Sequence[Path], folder: Path) -> None:
    """What the last command and its workers said, for whoever asks where the time went."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        if file.stat().st_size:
            shutil.copy(file, folder / file.name)


def _since(stamp: str, started_at: float) -> float:
    return round(datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp() - started_at, 1)


def _driver_marks(told: str, started_at: float) -> dict[str, float]:
    lines = _DRIVER_LINE.findall(told)
    marks = {"speaks_s": _since(lines[0][0], started_at)} if lines else {}
    planned = [stamp for stamp, line in lines if ": attempt " in line]
    return marks | ({"planned_s": _since(planned[0], started_at)} if planned else {})


def _read_logs(logs: Path, started_at: float, watched: Watched) -> None:
    """The scoring actors' own lines (the driver's copy may be cut off), and the raylet's count of what it spilled."""
    text = "\n".join(path.read_text(errors="replace") for path in logs.glob("worker-*.err"))
    starts = {actor: _since(stamp, started_at) for stamp, actor in _ACTOR_STARTS.findall(text)}
    waited = {actor: phases for _, actor, phases in _ACTOR_WAITED.findall(text)}
    for stamp, actor, phases in _ACTOR_LOADED.findall(text):
        seconds = {name: float(value) for name, value in _PHASE.findall(waited.get(actor, "") + " " + phases)}
        watched.loaded.append(
            {"actor": actor, "starts_s": starts.get(actor), "ready_s": _since(stamp, started_at), **seconds}
        )
    lines: dict[str, list[dict[str, Any]]] = {}
    for stamp, actor, provider, *numbers, is_final in _ACTOR_LINE.findall(text):
        told = dict(zip(("rows", "rows_per_s", "window", "wait_pct", "stage_pct"), map(int, numbers), strict=True))
        line = {"at_s": _since(stamp, started_at), **told}
        if is_final:
            watched.actors.append({"actor": actor, "provider": provider, **told, "lines": lines.pop(actor, [])})
        else:
            lines.setdefault(actor, []).append(line)
    for path in logs.glob("raylet*"):
        spilled = [float(mib) for mib in _SPILLED.findall(path.read_text(errors="replace"))]
        watched.spilled_mib = max([watched.spilled_mib, *spilled])
