"""Arithmetic on what `bench_watch` samples: steady rates, means of a stretch, and series thinned out for a document."""

import statistics
from collections.abc import Sequence

Series = list[tuple[float, float]]
"""Seconds since a command's start, and a value."""

MAX_POINTS = 300


def steady_rate(landed: Sequence[tuple[float, float]], since: float = 0.1) -> float | None:
    """Rows/s between the points where a tenth (or `since`) and nine tenths of all rows had landed; None with too few points.

    Only points that were seen count: rows land in parts, and what lies between two of them is not known.
    """
    span = steady_span(landed, since)
    if span is None:
        return None
    (t0, rows0), (t1, rows1) = span
    return (rows1 - rows0) / (t1 - t0)


def steady_span(
    landed: Sequence[tuple[float, float]], since: float = 0.1
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """The first point at or past a tenth (or `since`) of the rows and the last one at or before nine tenths."""
    if not landed:
        return None
    total = landed[-1][1]
    inner = [point for point in landed if since * total <= point[1] <= 0.9 * total]
    if len(inner) < 2 or inner[-1][0] <= inner[0][0] or inner[-1][1] - inner[0][1] < (0.9 - since) / 2 * total:
        return None
    return inner[0], inner[-1]


def mean_between(series: Sequence[tuple[float, float]], start: float, end: float) -> float | None:
    """The mean value of a series within two moments; None without a point there."""
    values = [value for at, value in series if start <= at <= end]
    return round(statistics.mean(values), 1) if values else None


def thin_out(series: Sequence[tuple[float, float]], points: int = MAX_POINTS) -> list[list[float]]:
    """At most `points` of a series, evenly spread, the first and the last among them."""
    if len(series) <= points:
        return [list(point) for point in series]
    step = (len(series) - 1) / (points - 1)
    return [list(series[round(i * step)]) for i in range(points)]


def thin_mean(series: Sequence[tuple[float, float]], points: int = MAX_POINTS) -> list[list[float]]:
    """A series as the means of at most `points` equal groups: a thinned share would be one of chance samples."""
    size = -(-len(series) // points) or 1
    groups = [series[start : start + size] for start in range(0, len(series), size)]
    return [
        [round(statistics.mean(at for at, _ in group), 2), round(statistics.mean(v for _, v in group), 1)]
        for group in groups
    ]
