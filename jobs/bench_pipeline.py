"""`python -m jobs.benchmark pipeline`: the parts of the comparison, in order, each kept as soon as it is measured.

Owns which parts and levers there are. How a peer, ours or a limit is measured is `bench_peers`',
`bench_score`'s and `bench_limits`'; the rows are `bench_data`'s, ratios `bench_document`'s, tables `bench_chart`'s.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jobs import bench_data
from jobs.bench_data import Recipe
from jobs.bench_document import open_document, ours, ratios
from jobs.bench_score import Entry, ScoreJob, measure_score
from jobs.bench_setup import Bench, Request, cpu_model, read_frame
from scoring.errors import ConfigError

logger = logging.getLogger(__name__)

# bench_models' recipe for the cut without images.
TEXT_MODEL = "text_tabular"
# Tokens: median about 200; `text` has the recipe's own, about 60.
_LONG_WORDS = 110
_PEER_ROWS = 8192
_SIZED_ROWS = 65_536
# 25 s of pixels that the cores prepare on 16 of them, and of the GPU's: of fewer rows its workers are done before it begins.
_PREPARED_ROWS, _GPU_PREPARED_ROWS = 131_072, 1_048_576
_DECODES = ("exact", "fast", "gpu")


@dataclass(frozen=True)
class Lever:
    """One thing that ours does, switched off: by settings, or by what `bench_flow` takes."""

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    flow: Mapping[str, int] = field(default_factory=dict)


# Each against the first one, which is ours as it comes.
LEVERS: tuple[Lever, ...] = (
    Lever("as it comes"),
    Lever("split: one core prepares", {"resources.cpus": 2}),
    Lever("reads and features apart", flow={"workers_may_read": 0}),
    Lever("decode: fast", {"images.decode": "fast"}),
    Lever("decode: fast, pixels shipped as fp32", {"images.decode": "fast"}, flow={"float32_pixels": 1}),
    Lever("bucketing: 512 rows sorted at a time", flow={"window_rows": 512}),
    Lever("engine: not compiled", {"engine.compile": "never"}),
    Lever("overlap: one window at a time", flow={"calls": 1}),
    Lever("engine: eager torch", {"engine.provider": "torch", "engine.compile": "never"}),
    Lever("decode: exact", {"images.decode": "exact"}),
    Lever("batches of 64 rows", {"batch.rows": 64}),
    Lever("engine: fp32", {"engine.precision": "fp32"}),
)
_FEW_CORES = 4


def _measure_a(bench: Bench) -> Entry:
    from jobs.bench_peers import as_shipped, load, measure_predict_proba

    predictor = as_shipped(load(bench.seed_predictor))
    return measure_predict_proba(predictor, bench.frame(_PEER_ROWS), bench.repeats)


def _measure_a_plus(bench: Bench) -> Entry:
    from jobs.bench_peers import load, measure_predict_proba, tuned

    predictor = tuned(load(bench.seed_predictor))
    return measure_predict_proba(predictor, bench.frame(_PEER_ROWS), bench.repeats)


def _measure_c(bench: Bench) -> Entry:
    from jobs.bench_peers import measure_ray_script

    inputs, _ = bench_data.repeat_cut(bench.seed_cut, min(bench.rows, _PEER_ROWS), bench.work / "data" / "input-c")
    return measure_ray_script(inputs, bench.seed_predictor, bench.work)


def _measure_ours(decode: str) -> Callable[[Bench], Entry]:
    def measure(bench: Bench) -> Entry:
        job = bench.job({"images.decode": decode})
        if bench.request.quick:
            _fill_cache(job)
        return measure_score(job, bench.repeats, warm_up=not bench.request.quick)

    return measure


def _fill_cache(job: ScoreJob) -> None:
    """Do here, where AutoGluon is imported, what `jobs.score` would import it again for: 17 s instead of 50 on two cores."""
    from scoring.parts import reserved_names
    from scoring.predictor import hash_predictor, store_spec
    from scoring.preparer import Preparer
    from scoring.sample import draw_sample
    from scoring.shards import inspect_files, list_inputs, plan_inputs
    from scoring.spec import FeatureSpec

    config, predictor_hash = job.config(job.work), hash_predictor(job.predictor)
    preparer = Preparer(config, predictor_hash)
    text = preparer.spec()
    spec = FeatureSpec.from_json(text)
    store_spec(spec, predictor_hash, str(job.cache))
    preparer.build(text, for_gpu=False)
    inputs = plan_inputs(
        inspect_files(list_inputs(config.input), config.input), spec, config.input, reserved_names(spec)
    )
    preparer.reference(text, draw_sample(inputs, config, spec))


def _measure_l(bench: Bench) -> Entry:
    from jobs.bench_limits import measure_forward_limit
    from jobs.bench_peers import load

    used = [name for entry in ours(bench.parts).values() for name in entry["engine"]]
    predictor = load(bench.seed_predictor)
    return measure_forward_limit(
        predictor, bench.frame(_PEER_ROWS), bench.work / "cache", used, quick=bench.request.quick
    )


def _measure_p(bench: Bench) -> Entry:
    """The features of every decode that ours ran with; the last one, the fastest, is the part's rate."""
    from jobs.bench_limits import measure_feature_limit

    modes = [name.removeprefix("D-") for name in ours(bench.parts)] or ["exact"]
    by_decode = {}
    for mode in modes:
        most = _GPU_PREPARED_ROWS if mode == "gpu" else _PREPARED_ROWS
        inputs, rows = bench_data.repeat_cut(
            bench.seed_cut, min(bench.rows, most), bench.work / "data" / f"input-p-{mode}"
        )
        job = ScoreJob((inputs,), rows, bench.seed_predictor, bench.work, {"images.decode": mode})
        by_decode[mode] = measure_feature_limit(job)
    measured = {mode: entry for mode, entry in by_decode.items() if "rows_per_s" in entry}
    best = max(measured.values(), key=lambda entry: float(entry["rows_per_s"]), default=by_decode[modes[0]])
    return {**best, "by_decode": by_decode}


def _measure_text(bench: Bench) -> Entry:
    """No images: ours and both limits."""
    return _without_images(bench, "text")


def _measure_long_text(bench: Bench) -> Entry:
    """The same with long texts."""
    return _without_images(bench, "long-text", median_words=_LONG_WORDS)


def _without_images(bench: Bench, name: str, **changes: Any) -> Entry:
    from jobs.bench_limits import measure_feature_limit, measure_forward_limit
    from jobs.bench_models import RECIPES
    from jobs.bench_peers import load

    if TEXT_MODEL not in RECIPES:
        return {"unavailable": f"jobs.bench_models.RECIPES has no {TEXT_MODEL!r}; add it"}
    cut = bench_data.make_cut(bench.work / "data" / name, bench.recipe(images="none", **changes))
    inputs, rows = bench_data.repeat_cut(cut, bench.rows, bench.work / "data" / f"input-{name}")
    job = ScoreJob((inputs,), rows, bench.predictor_path(TEXT_MODEL), bench.work)
    entry = measure_score(job, bench.repeats, warm_up=False)
    if "unavailable" in entry:
        return entry
    predictor = load(job.predictor)
    rows_seen = read_frame(cut, _PEER_ROWS)
    forward = measure_forward_limit(predictor, rows_seen, job.cache, entry["engine"], quick=bench.request.quick)
    return {**entry, "L": forward, "P": measure_feature_limit(job)}


def _measure_bad(bench: Bench) -> Entry:
    """Each layout with bad images: what is quarantined against what was put in."""
    cut = bench_data.make_cut(bench.work / "data" / "bad", bench.recipe(bad=True))
    settings = {"images.decode": "exact", "quarantine.max_fraction": 0.05}
    entries = {}
    for layout in ("bytes", "paths"):
        inputs = (cut.folder / layout,)
        job = ScoreJob(inputs, cut.rows, bench.seed_predictor, bench.work, settings, num_bad=cut.num_bad)
        entries[layout] = measure_score(job, 1, warm_up=False)
    return {"rows": cut.rows, "rows_unusual_injected": cut.num_unusual, "by_layout": entries}


def _measure_sizes(bench: Bench) -> Entry:
    """The protocol's four size classes, by decoder: reported, compared with nothing."""
    cut = bench_data.make_cut(bench.work / "data" / "sizes", bench.recipe(images="sizes"))
    inputs, rows = bench_data.repeat_cut(cut, min(bench.rows, _SIZED_ROWS), bench.work / "data" / "input-sizes")
    modes = [name.removeprefix("D-") for name in ours(bench.parts)] or ["exact"]
    jobs = {
        mode: ScoreJob((inputs,), rows, bench.seed_predictor, bench.work, {"images.decode": mode}) for mode in modes
    }
    return {"rows": rows, "by_decode": {mode: measure_score(job, 1, warm_up=False) for mode, job in jobs.items()}}


def _measure_levers(bench: Bench) -> Entry:
    """Ours with one change at a time. Goes on where a run was cut off; with all there, measures all anew."""
    known = bench.parts.get("levers", {}).get("levers", {})
    entries = {} if all(lever.name in known for lever in LEVERS) else dict(known)
    for lever in LEVERS:
        if lever.name not in entries:
            logger.info("lever: %s", lever.name)
            job = replace(bench.job(lever.settings), flow=lever.flow)
            entries[lever.name] = measure_score(job, 1, warm_up=False)
            bench.keep("levers", {"levers": entries})
    return {"levers": {lever.name: entries[lever.name] for lever in LEVERS}}


def _measure_few_cores(bench: Bench) -> Entry:
    """Ours with the GPU's decoder and few cores for everything else."""
    job = replace(bench.job({"images.decode": "gpu"}), cores=_FEW_CORES)
    return measure_score(job, 1, warm_up=False)


def _measure_profile(bench: Bench) -> Entry:
    """The scoring actor's halves, and what they ask of the GPU."""
    from jobs.bench_peers import load
    from jobs.bench_profile import measure_profile

    used = [name for entry in ours(bench.parts).values() for name in entry["engine"]]
    return measure_profile(bench.job({"images.decode": "gpu"}), load(bench.seed_predictor), used)


PARTS: Mapping[str, Callable[[Bench], Entry]] = {
    "A": _measure_a,
    "A+": _measure_a_plus,
    "C": _measure_c,
    **{f"D-{decode}": _measure_ours(decode) for decode in _DECODES},
    "L": _measure_l,
    "P": _measure_p,
    "profile": _measure_profile,
    "few-cores": _measure_few_cores,
    "text": _measure_text,
    "long-text": _measure_long_text,
    "bad": _measure_bad,
    "sizes": _measure_sizes,
    "levers": _measure_levers,
}
_DEFAULT = ("A", "A+", "C", "D-exact", "D-fast", "D-gpu", "L", "P", "text", "bad")
# Under three minutes on two cores; P is a Ray of its own, 40 s there.
_QUICK = ("A", "D-exact", "L")


def chosen_parts(request: Request) -> tuple[str, ...]:
    """The parts to run, in their order. Raises ConfigError for a name that is none."""
    unknown = [name for name in request.only if name not in PARTS]
    if unknown:
        raise ConfigError(f"--only: no part {', '.join(map(repr, unknown))}; the parts are {', '.join(PARTS)}")
    wanted = request.only or (_QUICK if request.quick else _DEFAULT)
    return tuple(name for name in PARTS if name in wanted)


def run_parts(request: Request, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the chosen parts, keeping each in `pipeline.json` at once; returns the whole document.

    A part that fails is an entry that says why. Raises ConfigError where the folder's figures are another machine's.
    """
    head = {**machine, "cpu": cpu_model(), "command": "pipeline", "quick": request.quick, "seed": Recipe().seed}
    path = request.folder / "pipeline.json"
    document = open_document(path, head)

    def keep(name: str, entry: Entry) -> None:
        document["parts"][name] = {**entry, "measured": machine["date"]}
        document["ratios"] = ratios(document["parts"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    bench = Bench(request, machine, document["parts"], keep)
    for name in chosen_parts(request):
        logger.info("part %s", name)
        keep(name, _measure(bench, name))
    return document


def _measure(bench: Bench, name: str) -> Entry:
    try:
        return PARTS[name](bench)
    except Exception as error:
        logger.exception("part %s failed", name)
        return {"unavailable": f"{type(error).__name__}: {error}"[:1000]}
