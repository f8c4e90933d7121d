"""The document of `jobs.benchmark pipeline`: what it is merged with, its ratios, and what makes a run fail."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.bench_score import Entry
from scoring.errors import ConfigError

# fp32 on exact pixels; half precision and other pixels may differ as far as AutoGluon's own deployment test allows.
QUICK_LIMIT, _LIMIT = 1e-4, 0.01
_SAME = ("device", "cores", "quick", "seed")


def open_document(path: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """A new document, or the one at `path` to go on with. Raises ConfigError where it is of another machine or kind."""
    if not path.exists():
        return {**head, "parts": {}, "ratios": {}}
    found = json.loads(path.read_text())
    differing = [f"{key} {found.get(key)!r}, now {head[key]!r}" for key in _SAME if found.get(key) != head[key]]
    if differing:
        raise ConfigError(f"--output: {path} has figures of another run ({'; '.join(differing)}); name another folder")
    return {**found, **head}


def ours(parts: Mapping[str, Entry]) -> dict[str, Entry]:
    """The runs of ours that have figures, by part."""
    return {name: entry for name, entry in parts.items() if name.startswith("D-") and "rows_per_s" in entry}


def ratios(parts: Mapping[str, Entry]) -> dict[str, dict[str, float]]:
    """Ours over each peer and over the lower limit: D with its start-up counted (theirs is not), steady without.

    The limit is that of the same decoder: without P of it there is no such ratio.
    """
    found: dict[str, dict[str, float]] = {}
    for name, entry in ours(parts).items():
        others = {peer: parts[peer]["rows_per_s"] for peer in ("A", "A+", "C") if _has_rate(parts, peer)}
        features = parts.get("P", {}).get("by_decode", {})
        if _has_rate(parts, "L") and _has_rate(features, mode := name.removeprefix("D-")):
            others["min(L,P)"] = min(parts["L"]["rows_per_s"], features[mode]["rows_per_s"])
        rates = {"D": entry["rows_per_s"], "steady": entry["steady_rows_per_s"]}
        found[name] = {
            f"{kind}/{other}": round(rate / value, 3)
            for kind, rate in rates.items()
            if rate is not None
            for other, value in others.items()
        }
    return found


def _has_rate(parts: Mapping[str, Entry], name: str) -> bool:
    return "rows_per_s" in parts.get(name, {})


def failures(document: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What makes a run of those parts fail: rows of ours that are not accounted for, and scores that are not upstream's.

    A quick run also fails on a part without figures, and its limit is narrower.
    """
    parts = {name: document["parts"][name] for name in names}
    runs = [*ours(parts).items(), *parts.get("bad", {}).get("by_layout", {}).items()]
    found = [_accounts(name, entry) for name, entry in runs if not entry.get("is_accounted", True)]
    if document["quick"]:
        found += [
            f"{name}: {entry['unavailable']}" for name, entry in [*parts.items(), *runs] if "unavailable" in entry
        ]
    limit = QUICK_LIMIT if document["quick"] else _LIMIT
    compared = [(name, entry) for name, entry in ours(parts).items() if document["quick"] or "max_abs_diff" in entry]
    return found + [text for name, entry in compared if (text := _difference(name, entry, limit))]


def _accounts(name: str, entry: Entry) -> str:
    return (
        f"{name}: {entry['rows']} rows read, {entry['rows_scored']} scored and {entry['rows_quarantined']} quarantined, of "
        f"which {entry['rows_bad_injected']} are bad; look at what it quarantined and why: {entry['reasons']}"
    )


def _difference(name: str, entry: Entry, limit: float) -> str | None:
    difference = entry.get("max_abs_diff")
    if difference is not None and difference <= limit:
        return None
    return (
        f"{name}: its scores differ from predict_proba(realtime=True) by {difference} over {entry.get('rows_compared')} "
        f"rows, the limit is {limit}; compare them by source_row"
    )
