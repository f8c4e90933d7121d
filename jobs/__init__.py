"""Entry points: parse, start Ray, call `scoring`, turn errors into exit codes."""

import os

# Ray under `uv run` re-packages the working folder for its workers: slow uploads, and a second environment to build.
# Set before Ray is imported anywhere, unless the user decided otherwise.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Twelve lines of progress every 10 s drown our own; a log (no terminal) gets them once a minute.
os.environ.setdefault("RAY_DATA_NON_TTY_PROGRESS_LOG_INTERVAL", "60")
# Ray folds lines that differ in digits alone into one ("repeated 2x across cluster"): every actor's throughput but one.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Workers of a Ray that is started here import what all of ours need while the driver still waits for Ray: of 22 of them that
# start together on 16 cores each takes 6 s for it.
os.environ.setdefault("RAY_preload_python_modules", "ray.data")
# Ray ends a worker that has had nothing to do for a second where more of them are idle than there are CPUs, and starts another
# for the next read or write: 3 s of a core each. On 2 cores, reading and features alone: 5,800 rows/s, and 10,100 without that.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
