"""The rescoring phase of verification: published rows read back from the inputs and scored by AutoGluon itself.

Owns what must be as it was before that is worth anything: configuration, inputs and predictor. The files are `recount.py`'s.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from scoring.columns import SOURCE_FILE, SOURCE_ROW, ReadSchema
from scoring.config import SCORES_VERSION, ScoreConfig, fingerprint, load_config
from scoring.errors import ConfigError, InputError, PredictorError, VerificationError
from scoring.parity import Scores, compare
from scoring.predictor import check_hash, extract_spec, fetch_predictor, load_predictor
from scoring.published_part import Int64, columns_of, rows_by_file
from scoring.reading import UnreadableFileError, read_shard
from scoring.recount import PART
from scoring.shards import Shard, SourceFile, inspect_files, list_inputs, plan_inputs
from scoring.spec import FeatureSpec
from scoring.storage import ListedFile, join, redact
from scoring.verify import SHOWN_PROBLEMS, Manifest, PublishedRun, Recount, Rescored

if TYPE_CHECKING:
    from autogluon.multimodal import MultiModalPredictor

logger = logging.getLogger(__name__)

# Rows that are read back and rescored together: their images are all in memory.
_CHUNK_ROWS = 512
_BLOCK_ROWS = 1024
_WITHOUT_RESCORING = "--sample 0 verifies the files alone"


def rescore(run: PublishedRun, files: Recount) -> Rescored:
    """Score the sampled rows with AutoGluon's `predict_proba(realtime=True)` and hold the published scores against it.

    Raises ConfigError, PredictorError or InputError where the run's configuration, predictor or inputs are not what they
    were; the predictor's hash is checked before anything is unpickled. Imports AutoGluon (about 30 s, 1 GB).
    """
    config = _stored_config(run)
    limit = config.parity.max_abs_diff
    sampled = files.sampled
    if sampled is None:
        return Rescored(0, None, limit, ())
    names = sampled.column_names[2:-1]
    listing = _unchanged_inputs(config, files.manifest)
    wanted = set(sampled[SOURCE_FILE].to_pylist())
    sources = inspect_files([file for name, file in listing.items() if name in wanted], config.input)
    folder = _pinned_predictor(config, files.manifest)
    logger.info("run %s: rescoring %d rows (imports AutoGluon, about 30 s)", run.run_id, sampled.num_rows)
    predictor = load_predictor(folder)
    spec = extract_spec(predictor)
    expected = [*(f"proba_{label}" for label in spec.class_labels), "prediction"]
    if names != expected:
        problem = f"the parts have the score columns {names}, the predictor that the manifest names gives {expected}"
        return Rescored(0, None, limit, (problem,))
    rescorer = _Rescorer(predictor, spec, config, sources)
    for start in range(0, sampled.num_rows, _CHUNK_ROWS):
        rescorer.compare(sampled.slice(start, _CHUNK_ROWS))
    return Rescored(rescorer.num_rows, rescorer.max_abs_diff, limit, tuple(rescorer.problems))


def _stored_config(run: PublishedRun) -> ScoreConfig:
    """The configuration that the run was scored with. Raises VerificationError."""
    uri = join(run.uri, "config.yaml")
    try:
        return load_config(file=uri, flags={}, overrides=[], cwd=Path.cwd())
    except ConfigError as error:
        raise VerificationError(
            f"{redact(uri)}: is not a configuration that this code reads: {error}; verify with the version that wrote it "
            f"({_WITHOUT_RESCORING})"
        ) from error


def _unchanged_inputs(config: ScoreConfig, manifest: Manifest) -> dict[str, ListedFile]:
    """The run's input files by source_file. Raises InputError for one that is gone or not what the run read.

    Files that came since are none of the run's business.
    """
    try:
        listing = list_inputs(config.input)
    except InputError as error:
        raise InputError(f"{error}\nrows are rescored from the run's inputs; {_WITHOUT_RESCORING}") from error
    now = fingerprint(
        config, predictor_hash=manifest.predictor.sha256, listing=listing, scores_version=SCORES_VERSION
    ).parts
    then = manifest.fingerprint.parts
    changed = [
        f"{name}: was {version}, now {now.get(name, 'gone')}"
        for name, version in then.items()
        if name.startswith("input file ") and now.get(name) != version
    ]
    if changed:
        rest = [f"... and {len(changed) - SHOWN_PROBLEMS} more"] if len(changed) > SHOWN_PROBLEMS else []
        raise InputError(
            "\n".join(
                [
                    f"{len(changed)} input files changed since run {manifest.run_id} read them, so no row can be rescored; "
                    f"restore them, or score again; {_WITHOUT_RESCORING}",
                    *changed[:SHOWN_PROBLEMS],
                    *rest,
                ]
            )
        )
    return {redact(file.uri): file for file in listing}


def _pinned_predictor(config: ScoreConfig, manifest: Manifest) -> Path:
    """The predictor's folder, once its hash is the manifest's; nothing is unpickled. Raises PredictorError."""
    pinned = manifest.predictor.sha256
    try:
        folder = fetch_predictor(config.predictor.path, config.engine.cache, pinned)
        check_hash(folder, config.predictor.path, pinned)
    except PredictorError as error:
        raise PredictorError(
            f"run {manifest.run_id} was scored by the predictor {pinned}, which its rows are rescored with: {error}; "
            f"{_WITHOUT_RESCORING}"
        ) from error
    return folder


class _Rescorer:
    """Reads rows back from the inputs and compares AutoGluon's scores of them with published ones."""

    def __init__(
        self, predictor: "MultiModalPredictor", spec: FeatureSpec, config: ScoreConfig, sources: Sequence[SourceFile]
    ) -> None:
        self._predictor = predictor
        self._spec = spec
        self._config = config
        self._sources = {file.source_file: file for file in sources}
        # Kept columns may be in none of the sampled files, and are not scored.
        bare = config.input.model_copy(update={"keep": ()})
        self._schema: ReadSchema = plan_inputs(tuple(sources), spec, bare, reserved=()).schema
        self.num_rows = 0
        self.max_abs_diff: float | None = None
        self.problems: list[str] = []

    def compare(self, published: pa.Table) -> None:
        """Rescore some published rows and note each that differs."""
        from scoring.sample import split_sample

        sample, bad = split_sample(self._read_back(published), self._config, self._spec)
        reference, refusals = self._reference(sample.raw)
        places = {identity: place for place, identity in enumerate(_identities(sample.features))}
        faults = zip(bad["reason"].to_pylist(), bad["message"].to_pylist(), strict=True)
        unusable = dict(
            zip(_identities(bad), (f"it reads as {name} now: {text}" for name, text in faults), strict=True)
        )
        unusable |= {identity: refusals[place] for identity, place in places.items() if place in refusals}
        found = self._comparable(published)
        for row, (identity, part) in enumerate(zip(_identities(published), published[PART].to_pylist(), strict=True)):
            if identity in places and identity not in unusable:
                difference = self._difference(reference[places[identity]], found[row])
            else:
                difference = f"has scores, but {unusable.get(identity, 'its input has no such row')}"
            if difference:
                self.problems.append(f"{part}: row {identity[1]} of {identity[0]} {difference}")

    def _read_back(self, published: pa.Table) -> pa.Table:
        blocks = [self._schema.arrow.empty_table()]
        for name, rows in rows_by_file(published):
            if name in self._sources:
                for shard in _shards_with(self._sources[name], rows):
                    blocks += self._read_shard(shard, rows)
        return pa.concat_tables(blocks)

    def _read_shard(self, shard: Shard, rows: Int64) -> Iterator[pa.Table]:
        last = int(rows.max())
        try:
            for block in read_shard(shard, self._schema, self._config.input.csv, _BLOCK_ROWS):
                numbers = block[SOURCE_ROW].to_numpy()
                yield block.filter(pa.array(np.isin(numbers, rows)))
                if len(numbers) and numbers[-1] >= last:
                    return  # a CSV has no other way to its rows than from the start, but need not be read to its end
        except UnreadableFileError as error:
            # Its rows from there on are named one by one, as rows that the input does not have.
            logger.warning("%s", error)

    def _reference(self, raw: pa.Table) -> tuple[Scores, dict[int, str]]:
        """AutoGluon's scores, and why there are none of a row that it refuses."""
        from scoring.reference import upstream_scores

        refusals: dict[int, str] = {}
        scores = np.full((raw.num_rows, max(1, len(self._spec.class_labels))), np.nan, dtype=np.float32)
        if not raw.num_rows:
            return scores, refusals
        try:
            return upstream_scores(self._predictor, self._spec, raw), refusals
        except Exception as error:
            # Upstream may raise anything, and one row that it refuses fails the whole call.
            reason = f"{type(error).__name__}: {error}"
            logger.warning("predict_proba(realtime=True) failed, rows are rescored one by one: %s", reason)
        for row in range(raw.num_rows):
            try:
                scores[row] = upstream_scores(self._predictor, self._spec, raw.slice(row, 1))[0]
            except Exception as error:
                # The row was published, so this is a difference, and no reason to stop.
                refusals[row] = f"AutoGluon's own call refuses it: {type(error).__name__}: {error}"
        return scores, refusals

    def _comparable(self, published: pa.Table) -> Scores:
        """Published scores in the reference's unit: probabilities, or standard deviations of the label."""
        if self._spec.label_scaler is not None:
            return columns_of(published, ["prediction"]) / np.float32(self._spec.label_scaler.unit)
        return columns_of(published, [f"proba_{label}" for label in self._spec.class_labels])

    def _difference(self, reference: Scores, found: Scores) -> str | None:
        """What is wrong with one row's scores, (classes,) each, or None."""
        parity = compare(reference[None, :], found[None, :])
        if not parity.rows:
            return "has scores, but AutoGluon's are not finite"
        self.num_rows += 1
        self.max_abs_diff = max(self.max_abs_diff or 0.0, parity.max_abs_diff)
        limit = self._config.parity.max_abs_diff
        if parity.failure(limit) is None:
            return None
        worst = int(np.abs(reference - found).argmax())
        name = "prediction" if self._spec.is_regression else f"proba_{self._spec.class_labels[worst]}"
        unit = " in standard deviations of the label" if self._spec.is_regression else ""
        flip = "; the label is another one" if parity.label_flips else ""
        return (
            f"has {name} {found[worst]:.6g}, AutoGluon gives {reference[worst]:.6g}{unit} (difference "
            f"{parity.max_abs_diff:.2g}, limit {limit:g}){flip}"
        )


def _shards_with(file: SourceFile, rows: Int64) -> Iterator[Shard]:
    """The row groups that hold any of the rows, each a shard of its own; a CSV whole."""
    if file.format == "csv":
        yield Shard(0, file, first_row=0, num_rows=None)
        return
    first = 0
    for group, (num_rows, _) in enumerate(file.row_groups):
        if ((rows >= first) & (rows < first + num_rows)).any():
            yield Shard(0, file, first, num_rows, (group,))
        first += num_rows


def _identities(table: pa.Table) -> list[tuple[Any, Any]]:
    return list(zip(table[SOURCE_FILE].to_pylist(), table[SOURCE_ROW].to_pylist(), strict=True))
