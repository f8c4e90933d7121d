"""Entry points: parse, start Ray, call `scoring`, turn errors into exit codes."""

import os

# Ray under `uv run` re-packages the working folder for its workers: slow uploads, and a second environment to build.
# Set before Ray is imported anywhere, unless the user decided otherwise.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
