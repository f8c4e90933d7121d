"""`jobs.score` with other sizes between its stages than it would choose: for the levers that no setting turns.

    python -m jobs.bench_flow calls=1 window_rows=512 -- --input ... --predictor ... --output ...

Owns nothing but that change; what comes after `--` is jobs.score's own command line.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch


def main(arguments: Sequence[str]) -> None:
    """Start `jobs.score` with some of `sizing.Flow`'s numbers given."""
    end = arguments.index("--")
    changes = {name: int(value) for name, _, value in (item.partition("=") for item in arguments[:end])}

    from jobs import score
    from scoring.sizing import size_flow

    def changed(*given: Any) -> Any:
        return replace(size_flow(*given), **changes)

    with patch("scoring.pipeline.size_flow", changed):
        score.app(args=list(arguments[end + 1 :]))


if __name__ == "__main__":
    main(sys.argv[1:])
