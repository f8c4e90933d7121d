"""The compiled torch engine: compiled once a machine, beside the run and in a process of its own, found by whoever comes later.

Owns its place in the cache and the process that fills it. In the process that scores, compiling holds Python's one interpreter:
4,700 rows/s instead of 23,600 for a minute, on an H100 (`tests/data/bench/h100-takeover.json`).
"""

import hashlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

from filelock import FileLock

from scoring.decision import describe_error
from scoring.engines.ahead import AHEAD_VERSION, AheadEngine, ahead_shapes, compile_ahead
from scoring.engines.base import Engine, EngineUnavailable
from scoring.engines.build import EngineRequest, gpu_name, has_gpu, library_versions, package_version
from scoring.engines.cache import EngineCache, Key
from scoring.engines.torch_engine import CUDA, CompiledEngine
from scoring.flat import Precision
from scoring.predictor import LazyPredictor
from scoring.spec import FeatureSpec

logger = logging.getLogger(__name__)

_FILE = "model.pt2"
_WHEELS = "cu13"  # below `nvidia`, of this major version
# The run's own work comes first.
_NICE = 10
_ANSWER = "compiled ahead: "


class CompilerKilledError(EngineUnavailable):
    """The process that compiles was killed, by whoever ends this one or for want of memory."""


def build_compiled(request: EngineRequest, precision: Precision) -> Engine:
    """The compiled torch engine: compiled ahead, in a process of its own where it can load the predictor; one a machine.

    What cannot be compiled ahead is compiled in this process, which is said. Raises CompilerKilledError.
    """
    lock = request.cache.local / f"{_ahead_key(request, precision).digest}-compile.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock):
            if request.folder is not None and not is_compiled(request, precision):
                compile_elsewhere(request, precision)
            package = compiled_package(request, precision)
        return AheadEngine(package, request.spec, precision, request.shapes)
    except CompilerKilledError:
        raise  # at the run's end, or for want of memory, which compiling here would want too
    except Exception as error:
        # g++ or CUDA's headers are missing, torch cannot trace the network whole, or the file does not load.
        logger.warning(
            "engine: nothing that is compiled ahead can be had (%s); torch.compile does it in this process, which slows the "
            "run meanwhile; see engine.compile",
            describe_error(error),
            exc_info=True,
        )
        return _compile_here(request, precision)


def _compile_here(request: EngineRequest, precision: Precision) -> Engine:
    """By torch.compile; one process a machine compiles, the others find its kernels in inductor's cache."""
    folder = request.cache.local / "inductor"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    with FileLock(folder / f"{request.spec.weights[:16]}-{precision}.lock"):
        return CompiledEngine(request.predictor, request.spec, precision, request.shapes)


def is_compiled(request: EngineRequest, precision: Precision) -> bool:
    """Whether the network compiled ahead is in the cache: then building its engine takes a second."""
    return request.cache.find(_ahead_key(request, precision)) is not None


def compiled_package(request: EngineRequest, precision: Precision) -> Path:
    """The network compiled ahead for this machine's GPU (without one: for its CPU), from the cache or made now."""

    def build(folder: Path) -> None:
        device = CUDA if has_gpu() else "cpu"
        shapes = ahead_shapes(request.shapes)
        compile_ahead(request.predictor, request.spec, precision, shapes, folder / _FILE, device)

    return request.cache.get(_ahead_key(request, precision), build) / _FILE


def _ahead_key(request: EngineRequest, precision: Precision) -> Key:
    return Key(
        "ahead",
        {
            "weights": request.spec.weights,
            "ahead": str(AHEAD_VERSION),
            "precision": precision,
            "device": gpu_name() if has_gpu() else "cpu",
            # Its C++ is for the very processor that compiled it.
            "processor": _processor(),
            "triton": package_version("triton"),
            "shapes": json.dumps([request.shapes.rows, request.shapes.tokens]),
            **library_versions(),
        },
    )


@cache
def _processor() -> str:
    """What this machine's processor can do, as a digest."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def compile_elsewhere(request: EngineRequest, precision: Precision) -> None:
    """`compiled_package` in a process of its own, which ends with this one. Raises EngineUnavailable with its reason."""
    order = {
        "folder": str(request.folder),
        "spec": request.spec.to_json(),
        "cache": request.cache.uri,
        "batch_rows": request.batch_rows,
        "precision": precision,
    }
    # Ray gives its workers the driver's search path in the process alone.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    with tempfile.TemporaryDirectory(prefix="compile-") as folder:
        told = Path(folder) / "order.json"
        told.write_text(json.dumps(order))
        command = [sys.executable, "-m", "scoring.engines.compiled", str(told)]
        # Nothing is written to its standard input: that it is closed says that this process has ended.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            # AutoGluon prints before it.
            answer = next((line for line in process.stdout if line.startswith(_ANSWER)), None)
    if answer is None and process.returncode < 0:
        raise CompilerKilledError(
            f"the process that compiles was killed by signal {-process.returncode}; at a run's end it is, else look for want of "
            "memory; nothing is compiled in this run"
        )
    if answer is None:
        raise EngineUnavailable(
            f"the process that compiles ended with {process.returncode}; what it said is in this log"
        )
    error = json.loads(answer.removeprefix(_ANSWER))
    if error is not None:
        raise EngineUnavailable(error)


def _find_headers() -> None:
    """Let torch compile with CUDA's headers from wheels (the extra `compile`) where the machine has no toolkit."""
    if "CUDA_HOME" in os.environ or shutil.which("nvcc") or Path("/usr/local/cuda").exists():
        return
    nvidia = importlib.util.find_spec("nvidia")
    for place in nvidia.submodule_search_locations or () if nvidia else ():
        if (Path(place) / _WHEELS / "include" / "crt").exists():
            os.environ["CUDA_HOME"] = str(Path(place) / _WHEELS)


def _end_with_parent() -> None:
    """Ends this process when the one that started it closes its side, as its end does, however it comes."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Started by `compile_elsewhere`: a file of JSON in, a line out."""
    order = json.loads(Path(sys.argv[1]).read_text())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(_NICE)
    _find_headers()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    error = None
    try:
        request = EngineRequest(
            LazyPredictor(lambda: Path(order["folder"])),
            FeatureSpec.from_json(order["spec"]),
            EngineCache(order["cache"]),
            batch_rows=order["batch_rows"],
        )
        compiled_package(request, order["precision"])
    except Exception as raised:
        logger.warning("engine: compiling ahead failed", exc_info=True)
        error = describe_error(raised)
    sys.stdout.write(f"{_ANSWER}{json.dumps(error)}\n")
    sys.stdout.flush()
    os._exit(0)  # inductor's own processes are not waited for


if __name__ == "__main__":
    main()
