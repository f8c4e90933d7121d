"""Tables and charts of `jobs.benchmark pipeline`, from its document alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_PEERS = ("A", "A+", "C")
_LIMITS = ("L", "P")
_LABELS = {
    "A": "A: predict_proba as shipped",
    "A+": "A+: predict_proba, tuned",
    "C": "C: Ray script with predict_proba",
    "D-exact": "D: ours, exact pixels",
    "D-fast": "D: ours, fast pixels",
    "D-gpu": "D: ours, pixels on the GPU",
    "L": "L: forward alone",
    "P": "P: preprocessing alone",
    "text": "ours, no images",
    "long-text": "ours, long texts, no images",
}
_GREY, _BLUE, _PALE = "#8a8f98", "#2f6fde", "#b9c9ea"


def print_results(document: Mapping[str, Any], console: Console) -> None:
    """The parts, ours in detail, and the levers, as far as they are there."""
    parts = document["parts"]
    title = f"Pipeline on {document['device']}, {document['cores']} cores: rows/s"
    table = _table(title, ("what", "rows", "rows/s", "spread", "steady", "note"))
    for name, label in _LABELS.items():
        if name in parts:
            table.add_row(*_part_row(label, parts[name]))
    console.print(table)
    own = {name: parts[name] for name in _LABELS if name.startswith("D-") and "rows_per_s" in parts.get(name, {})}
    if own:
        _print_own(own, document["ratios"], console)
    cuts = {f"four size classes, {mode}": entry for mode, entry in parts.get("sizes", {}).get("by_decode", {}).items()}
    cuts |= {f"bad images, as {layout}": entry for layout, entry in parts.get("bad", {}).get("by_layout", {}).items()}
    if cuts:
        _print_cuts(cuts, console)
    if "levers" in parts.get("levers", {}):
        _print_levers(parts["levers"]["levers"], console)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("what", "note", "engine", columns[0]) else "right")
    return table


def _part_row(label: str, entry: Mapping[str, Any]) -> list[str]:
    if "rows_per_s" not in entry:
        return [label, "", "", "", "", f"not run: {escape(entry.get('unavailable', '?'))[:90]}"]
    spread = f"{entry['min']:,.0f}-{entry['max']:,.0f}" if "min" in entry else ""
    note = entry.get("engine") or entry.get("measured_by") or ""
    if entry.get("padding_pct") is not None:
        note = f"{note}, {entry['padding_pct']:.0f} % of the tokens padding"
    return [
        label,
        f"{entry['rows']:,}",
        f"{entry['rows_per_s']:,.0f}",
        spread,
        _number(entry.get("steady_rows_per_s")),
        escape(note if isinstance(note, str) else ", ".join(note)),
    ]


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _print_own(own: Mapping[str, Any], shares: Mapping[str, Any], console: Console) -> None:
    names = list(own)
    table = _table("Ours", ("figure", *names))
    rows = {
        "rows/s with start-up": [_number(own[name]["rows_per_s"]) for name in names],
        "rows/s steady (middle 80 %)": [_number(own[name]["steady_rows_per_s"]) for name in names],
        "rows/s a core": [_number(own[name]["rows_per_s_per_core"], 1) for name in names],
        "first actor ready, s": [_number(own[name]["ready_s"], 1) for name in names],
        "first scores written, s": [_number(own[name]["first_score_s"], 1) for name in names],
        "GPU busy %": [_number(own[name]["gpu_busy_pct"], 1) for name in names],
        "GPU clock, MHz": [_number(own[name].get("gpu_clock_mhz")) for name in names],
        "actors without a window in the forward, %": [_waited(own[name].get("actors", ())) for name in names],
        "spilled MiB": [_number(own[name]["spilled_mib"]) for name in names],
        "quarantined of injected": [
            f"{own[name]['rows_quarantined']} of {own[name]['rows_bad_injected']}" for name in names
        ],
        "largest difference": [_scientific(own[name].get("max_abs_diff")) for name in names],
    }
    kinds = dict.fromkeys(kind for name in names for kind in own[name]["memory"])
    for kind in kinds:
        peaks = [own[name]["memory"].get(kind, {}).get("peak_mib") for name in names]
        rows[f"peak MiB, {kind}"] = [_number(peak) for peak in peaks]
    for key in dict.fromkeys(key for name in names for key in shares.get(name, {})):
        rows[key] = [_number(shares[name].get(key), 2) for name in names]
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)


def _waited(actors: Sequence[Mapping[str, Any]]) -> str:
    """Over their lives, each actor's: high means starved, not slow."""
    return ", ".join(f"{actor['wait_pct']}" for actor in actors if "wait_pct" in actor)


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _print_cuts(cuts: Mapping[str, Any], console: Console) -> None:
    table = _table("Other rows", ("what", "rows", "rows/s", "steady", "quarantined of injected", "note"))
    for label, entry in cuts.items():
        name, rows, rate, _, steady, note = _part_row(label, entry)
        bad = f"{entry['rows_quarantined']} of {entry['rows_bad_injected']}" if rows else ""
        table.add_row(name, rows, rate, steady, bad, note)
    console.print(table)


def _print_levers(levers: Mapping[str, Any], console: Console) -> None:
    table = _table("Levers: ours with one change", ("what", "rows/s", "steady", "of the first", "note"))
    first = next(iter(levers.values())).get("steady_rows_per_s")
    for name, entry in levers.items():
        label, _, rate, _, steady, note = _part_row(name, entry)
        own = entry.get("steady_rows_per_s")
        table.add_row(label, rate, steady, f"{own / first:.2f}" if own and first else "", note)
    console.print(table)


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """`pipeline.png`: a bar a part; `pipeline-gpu.png`: GPU busy share over time, where it was sampled."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_draw_rates(document, folder / "pipeline.png"), _draw_gpu(document, folder / "pipeline-gpu.png")]
    return [path for path in drawn if path is not None]


def _draw_rates(document: Mapping[str, Any], path: Path) -> Path | None:
    from matplotlib import pyplot as plt

    parts = document["parts"]
    names = [name for name in _LABELS if "rows_per_s" in parts.get(name, {}) and name not in ("text", "long-text")]
    if not names:
        return None
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(names) + 1.5))
    rates = [parts[name].get("steady_rows_per_s") or parts[name]["rows_per_s"] for name in names]
    colors = [_GREY if name in _PEERS else _PALE if name in _LIMITS else _BLUE for name in names]
    bars = axis.barh([_LABELS[name] for name in names], rates, color=colors)
    axis.bar_label(bars, labels=[f"{rate:,.0f}" for rate in rates], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("rows/s, steady where it is known")
    axis.set_title(f"{document['device']}, {document['cores']} cores")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _draw_gpu(document: Mapping[str, Any], path: Path) -> Path | None:
    from matplotlib import pyplot as plt

    series = {
        name: entry["series"]["gpu_busy"]
        for name, entry in document["parts"].items()
        if name in _LABELS and entry.get("series", {}).get("gpu_busy")
    }
    if not series:
        return None
    figure, axis = plt.subplots(figsize=(9, 3.5))
    for name, points in series.items():
        axis.plot([at for at, _ in points], [share for _, share in points], label=_LABELS[name], linewidth=1)
    axis.set_ylim(0, 105)
    axis.set_xlabel("seconds from the command")
    axis.set_ylabel("GPU busy, %")
    axis.set_title(f"{document['device']}, {document['cores']} cores")
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
