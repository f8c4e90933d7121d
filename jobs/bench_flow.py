"""`jobs.score` with other sizes between its stages than it would choose: for the levers that no setting turns.

    python -m jobs.bench_flow calls=1 window_rows=512 float32_pixels=1 -- --input ... --predictor ... --output ...

Owns nothing but that change; what comes after `--` is jobs.score's own command line. `float32_pixels` is `bench_wire`'s.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch


def main(arguments: Sequence[str]) -> None:
    """Start `jobs.score` with some of `sizing.Flow`'s numbers given."""
    end = arguments.index("--")
    changes: dict[str, Any] = {name: int(value) for name, _, value in (item.partition("=") for item in arguments[:end])}

    from jobs import score
    from scoring.sizing import size_flow

    with ExitStack() as patches:
        if changes.pop("float32_pixels", 0):
            from jobs.bench_wire import NarrowingScoringActor, WideFeatureWorker

            patches.enter_context(patch("scoring.pipeline.FeatureWorker", WideFeatureWorker))
            patches.enter_context(patch("scoring.pipeline.ScoringActor", NarrowingScoringActor))

        def changed(*given: Any) -> Any:
            return replace(size_flow(*given), **changes)

        patches.enter_context(patch("scoring.pipeline.size_flow", changed))
        score.app(args=list(arguments[end + 1 :]))


if __name__ == "__main__":
    main(sys.argv[1:])
