"""A scoring actor's threads beside each other against one alone: pixels and logits of the same window; JSON.

    python -m tests.beside FOLDER [OUT.json]

Makes the benchmark's rows and its seed predictor in FOLDER. What threads do to each other (memory let go of too soon, work on
another's stream) shows in no check of an engine alone: decoded images were overwritten on a busy H100, 34 of 24,576.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench_data import Recipe, make_cut
from jobs.bench_models import SEED_MODEL, build_predictor
from jobs.bench_peers import load
from jobs.bench_profile import ActorInProcess
from jobs.bench_score import ScoreJob

_ROWS, _SECONDS = 8_192, 10.0
# Logits in half precision, in a batch of the same rows: the same kernels add up the same values.
_SAME = 0.02


def check(folder: Path) -> dict[str, Any]:
    """What differs: pixels of a window staged beside others, and its logits, in rows; `alone` is the same thread once more."""
    import torch

    from jobs.bench_limits import build_used
    from scoring.forward import Forward

    folder = folder.absolute()
    cut = make_cut(folder / "cut", Recipe(rows=_ROWS))
    predictor = build_predictor(SEED_MODEL, folder / "models" / SEED_MODEL, "usual")
    job = ScoreJob((cut.folder / "bytes",), _ROWS, predictor, folder / "work", {"images.decode": "gpu"})
    actor = ActorInProcess(job, load(predictor))
    engine, name = build_used(actor.request, ["cuda-fp16-"])
    forward, lock = Forward(engine, actor.staging, 2), threading.Lock()

    def score() -> tuple[Any, Any]:
        staged = actor.staging.stage(actor.table)
        images = staged.batches[0].images
        assert images is not None
        pixels = images.gather(torch.arange(actor.num_images, device="cuda")[:, None])[:, 0].cpu()
        with lock:
            submitted = forward.submit(staged)
        done = submitted.wait()
        assert done is not None, "a window of good rows"
        logits = np.empty_like(done[1])
        logits[done[0]] = done[1]
        return pixels, logits

    wanted = score()
    found: dict[str, Any] = {"engine": name, "calls": actor.calls, "rows": actor.table.num_rows, "windows": 0}
    found["alone"] = _differing(score(), wanted)
    sums = {"pixels": 0, "logits": 0}
    end = time.monotonic() + _SECONDS

    def repeat() -> None:
        while time.monotonic() < end:
            differing = _differing(score(), wanted)
            with lock:
                found["windows"] += 1
                for key, rows in differing.items():
                    sums[key] += rows

    threads = [threading.Thread(target=repeat) for _ in range(actor.calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    return {**found, "beside": sums}


def _differing(found: tuple[Any, Any], wanted: tuple[Any, Any]) -> dict[str, int]:
    """Rows that differ in any pixel, or in a logit by more than half precision's last bits."""
    pixels = (found[0] != wanted[0]).flatten(1).any(dim=1)
    return {"pixels": int(pixels.sum()), "logits": int((np.abs(found[1] - wanted[1]).max(axis=1) > _SAME).sum())}


if __name__ == "__main__":
    document = check(Path(sys.argv[1]))
    print(json.dumps(document, indent=1))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(document, indent=1) + "\n")
