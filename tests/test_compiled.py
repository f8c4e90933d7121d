"""The network compiled ahead of time: what its process leaves in the cache computes what the network does.

Compiled for the CPU here, by the same code; on a GPU `tests/engines.py` compares it (`-m gpu`).
"""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scoring.engines import compiled
from scoring.engines.ahead import load_ahead
from scoring.engines.base import EngineUnavailable, Shapes
from scoring.engines.build import EngineRequest
from scoring.engines.cache import EngineCache
from scoring.engines.compiled import (
    CompilerKilledError,
    build_compiled,
    compile_elsewhere,
    compiled_package,
    is_compiled,
)
from scoring.flat import describe_inputs, synthetic_arrays
from scoring.predictor import LazyPredictor, hash_predictor, load_spec
from scoring.spec import FeatureSpec
from tests.conftest import REPOSITORY
from tests.predictors import CACHE, Predictor


def spec_of(predictor: Predictor, zoo_root: Path) -> FeatureSpec:
    spec = load_spec(hash_predictor(predictor.path), str(zoo_root / CACHE))
    assert spec is not None
    return spec


def request_for(predictor: Predictor, spec: FeatureSpec, cache: Path, **changes: Any) -> EngineRequest:
    settings: dict[str, Any] = {"batch_rows": 16, "folder": predictor.path, **changes}
    return EngineRequest(LazyPredictor(lambda: predictor.path), spec, EngineCache(str(cache)), **settings)


# In a process of its own: other tests of this one hold that nothing has imported AutoGluon.
REFERENCE = """
import sys
from pathlib import Path
import numpy as np
from scoring.engines.torch_engine import TorchEngine
from scoring.flat import synthetic_arrays
from scoring.predictor import extract_spec, load_predictor

predictor = load_predictor(Path(sys.argv[1]))
spec = extract_spec(predictor)
engine = TorchEngine(predictor, spec, "fp32", use_gpu=False, num_threads=1)
logits = {rows: engine.forward(synthetic_arrays(spec, rows=int(rows), tokens=0, seed=int(rows))) for rows in sys.argv[3:]}
np.savez(sys.argv[2], **logits)
"""


def nobody() -> Any:
    pytest.fail("the predictor is not asked for")


def test_what_another_process_compiled_computes_what_the_network_does(
    zoo: Mapping[str, Predictor], zoo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from torch._inductor import cpu_vec_isa

    predictor = zoo["ft_transformer"]
    spec = spec_of(predictor, zoo_root)
    request = request_for(predictor, spec, tmp_path)
    assert request.shapes == Shapes((1, 2, 4, 8, 16), ())
    assert not is_compiled(request, "fp32")
    logits = tmp_path / "logits.npz"
    sizes = (2, 8, 16)
    arguments = [sys.executable, "-c", REFERENCE, str(predictor.path), str(logits), *map(str, sizes)]
    with subprocess.Popen(arguments, cwd=REPOSITORY) as reference:
        compile_elsewhere(request, "fp32")
    assert reference.returncode == 0
    assert is_compiled(request, "fp32")
    assert not is_compiled(request, "fp16")
    assert not is_compiled(request_for(predictor, spec, tmp_path, batch_rows=32), "fp32")

    found = EngineRequest(nobody, spec, EngineCache(str(tmp_path)), batch_rows=16)
    # torch's probes of the CPU, a program for each set of vector instructions, took a minute of a job's start on an H100's host.
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda *_: pytest.fail("the CPU is probed"))
    run = load_ahead(compiled_package(found, "fp32"))
    names = [item.name for item in describe_inputs(spec)]
    wanted = np.load(logits)
    for rows in sizes:
        arrays = synthetic_arrays(spec, rows=rows, tokens=0, seed=rows)
        tensors = [torch.from_numpy(arrays[name]) for name in names]
        np.testing.assert_allclose(run(tensors).numpy(), wanted[str(rows)], atol=1e-5)
    # More rows than it was compiled for, and other columns: refused, not read past their end.
    for wrong in (
        [torch.from_numpy(synthetic_arrays(spec, rows=17, tokens=0)[name]) for name in names],
        [tensor[:, 1:].contiguous() for tensor in tensors],
    ):
        with pytest.raises(RuntimeError):
            run(wrong)


# As AOTInductor reads the name of a device.
EXPRESSION = """
#include <regex>
extern "C" int matches(const char* name) { return std::regex_match(name, std::regex("(cpu|cuda)(:([0-9]+))?")); }
"""
CALL = """
import ctypes, sys
import torch
from scoring.engines.ahead import share_cxx_library

if sys.argv[2] == "shared":
    share_cxx_library()
assert ctypes.CDLL(sys.argv[1]).matches(b"cuda:0") == 1
"""


def test_a_network_with_a_cxx_library_of_its_own_uses_torchs(tmp_path: Path) -> None:
    source, library = tmp_path / "expression.cc", tmp_path / "expression.so"
    source.write_text(EXPRESSION)
    compiler = ["g++", "-shared", "-fPIC", "-static-libstdc++", "-static-libgcc", str(source), "-o", str(library)]
    subprocess.run(compiler, check=True)
    codes = {
        how: subprocess.run([sys.executable, "-c", CALL, str(library), how], cwd=REPOSITORY, check=False).returncode
        for how in ("apart", "shared")
    }
    # A signal: torch does not survive the other library's locales.
    assert codes["apart"] < 0
    assert codes["shared"] == 0


def test_a_process_that_cannot_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: Any = SimpleNamespace(to_json=lambda: "{}")
    request = EngineRequest(nobody, spec, EngineCache(str(tmp_path)), folder=tmp_path)
    with pytest.raises(EngineUnavailable, match="feature spec version None"):
        compile_elsewhere(request, "fp32")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineUnavailable, match="the process that compiles ended with 1"):
        compile_elsewhere(request, "fp32")


def test_what_cannot_be_compiled_ahead_is_compiled_here_and_that_is_said(
    zoo: Mapping[str, Predictor],
    zoo_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    predictor = zoo["ft_transformer"]
    asked = []

    def fail(request: EngineRequest, precision: str) -> None:
        asked.append(precision)
        raise EngineUnavailable("no g++")

    monkeypatch.setattr(compiled, "compile_elsewhere", fail)
    monkeypatch.setattr(compiled, "_compile_here", lambda request, precision: f"torch.compile, {precision}")
    request = request_for(predictor, spec_of(predictor, zoo_root), tmp_path)
    with caplog.at_level(logging.WARNING):
        built: Any = build_compiled(request, "fp16")
        assert built == "torch.compile, fp16"
    assert asked == ["fp16"]
    assert "no g++" in caplog.text


def test_where_the_compiler_was_killed_nothing_is_compiled_here(
    zoo: Mapping[str, Predictor], zoo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    monkeypatch.setattr(compiled, "_compile_here", lambda *_: pytest.fail("compiled here"))
    predictor = zoo["ft_transformer"]
    request = request_for(predictor, spec_of(predictor, zoo_root), tmp_path / "cache")
    with pytest.raises(CompilerKilledError, match="killed by signal 9"):
        build_compiled(request, "fp16")


def test_the_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    order = {"folder": str(tmp_path), "spec": "{}", "cache": str(tmp_path), "batch_rows": 16, "precision": "fp32"}
    script = """
import time
from scoring.engines import compiled

def compiles(text):
    print("compiles", flush=True)
    time.sleep(600)

compiled.FeatureSpec.from_json = compiles
compiled.main()
"""
    told = tmp_path / "order.json"
    told.write_text(json.dumps(order))
    with subprocess.Popen(
        [sys.executable, "-c", script, str(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "compiles\n"
        process.stdin.close()
        assert process.wait(timeout=30) == 1
