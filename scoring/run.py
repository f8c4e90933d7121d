"""A run from its first attempt to its publication: what is left to score, whether all rows are accounted for, the manifest.

Owns the order of those things. Scoring itself is `pipeline.py`'s, the files are `ledger.py`'s, who may act `lock.py`'s.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from scoring.accounts import Accounts, ShardRows, add_up, check_complete, check_quarantine, done_ranges
from scoring.config import resolved_yaml
from scoring.decoding import DecodePlan
from scoring.errors import DecoderError, InputError, ParityError, StalledError
from scoring.ledger import MANIFEST_VERSION, AttemptFolder, Taken
from scoring.lock import Hold
from scoring.parts import PartSchemas, write_part
from scoring.pipeline import IMAGES, Plan, Timings, check_output, resize, score
from scoring.retry import take_scores
from scoring.shards import BadFile, Shard
from scoring.sizing import size_flow
from scoring.storage import redact

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """A run as it ended: published now, or before (`was_published`)."""

    run_id: str
    totals: Mapping[str, int]
    timings: Mapping[str, Any]
    was_published: bool


def run(plan: Plan, timings: Timings) -> Outcome:
    """Score the plan's rows and publish them, go on where an earlier driver stopped, or find that all is done.

    Raises FingerprintError, OutputError, LockError, IncompleteError, InputError, QuarantineLimitError.
    """
    check_output(plan.config)
    mark = plan.fingerprint
    plan.run.check_fingerprint(mark.digest, mark.differences)
    hold = None if plan.run.is_published else plan.run.hold()
    if hold is None:
        plan.run.finish()
        manifest = plan.run.read_manifest()
        logger.info("run %s is published already; nothing to do", plan.run.run_id)
        return Outcome(plan.run.run_id, manifest["totals"], manifest["timings"], was_published=True)
    try:
        plan.run.claim(mark.digest, mark.parts, mark.differences)
        with timings.phase("score_s"):
            attempt, stages = _score_all(plan, hold)
        timings.seconds |= stages
        with timings.phase("publish_s"):
            accounts = _accounts(plan, attempt)
            check_complete(accounts)
            bad_files = _bad_files(plan, attempt)
            check_files(bad_files, plan.config.input.on_bad_file)
            check_quarantine(accounts.reasons, accounts.totals["rows_read"], plan.config.quarantine.max_fraction)
            accounts = _with_scores_part(plan, attempt, accounts)
        manifest = _manifest(plan, accounts, bad_files, timings, attempt.decisions())
        plan.run.commit(hold, attempt, manifest, resolved_yaml(plan.config))
    except Exception:
        # A driver that was taken over fails in many ways; that it was is what matters.
        hold.check()
        raise
    finally:
        hold.release()
    return Outcome(plan.run.run_id, accounts.totals, timings.seconds, was_published=False)


def _score_all(plan: Plan, hold: Hold, *, decides_anew: bool = False) -> tuple[AttemptFolder, dict[str, float]]:
    """Score what is left in a new attempt.

    In one more where `images.decode=auto` took a way that parity refuses: with exact images. And where the run stalls on a
    cluster that is not what it was, as when a GPU's node is gone: with what the cluster has now.
    """
    old = plan.retry_of
    first = partial(take_scores, old, plan.run, plan.inputs.shards) if old else Taken
    attempt = plan.run.begin(hold, decides_anew=decides_anew, first=first)
    left = _left(plan, attempt)
    if not left.inputs.shards:
        return attempt, {}
    try:
        return attempt, score(left, attempt)
    except StalledError as error:
        resized = resize(plan)
        if resized.pools == plan.pools:
            raise
        logger.warning("%s. The cluster has changed: going on with %s", error, resized.pools)
        return _score_all(resized, hold)
    except (ParityError, DecoderError) as error:
        if plan.config.images.decode != "auto" or left.decode.mode == "exact":
            raise
        logger.warning("images.decode=auto: refused with %s images, trying exact ones: %s", left.decode.mode, error)
    return _score_all(_with_exact_images(plan), hold, decides_anew=True)


def _left(plan: Plan, attempt: AttemptFolder) -> Plan:
    """The plan for the rows that earlier attempts have not accounted for; their way with images goes on."""
    notes, done = attempt.taken.notes, done_ranges(attempt.taken.receipts)

    def is_left(shard: Shard) -> bool:
        note = notes.get(shard.index)
        if shard.num_rows is None and (note is None or note.lost is None):
            return True  # what could not be read may be there now
        rows = note.rows if shard.num_rows is None and note is not None else shard.num_rows
        return sum(end - start for start, end in done.get(shard.index, ())) < (rows or 0)

    shards = tuple(shard for shard in plan.inputs.shards if is_left(shard))
    if len(shards) == len(plan.inputs.shards) and not done:
        return plan
    logger.info(
        "run %s: %d of %d shards are complete and not read again",
        plan.run.run_id,
        len(plan.inputs.shards) - len(shards),
        len(plan.inputs.shards),
    )
    left = replace(plan, inputs=replace(plan.inputs, shards=shards), done=done)
    before = attempt.decisions().get(IMAGES)
    return _with_exact_images(left) if before is not None and before["mode"] == "exact" else left


def _with_exact_images(plan: Plan) -> Plan:
    exact = DecodePlan("exact", resizes_on_gpu=plan.decode.resizes_on_gpu)
    flow = size_flow(plan.config, plan.spec, plan.pools, exact, plan.inputs.estimated_rows)
    return replace(plan, decode=exact, flow=flow)


def _accounts(plan: Plan, attempt: AttemptFolder) -> Accounts:
    shards = [
        ShardRows(shard.index, shard.file.source_file, shard.first_row, shard.num_rows) for shard in plan.inputs.shards
    ]
    return add_up(shards, attempt.read_notes(), attempt.receipts())


def _bad_files(plan: Plan, attempt: AttemptFolder) -> tuple[BadFile, ...]:
    """Files that could not be read, or not to their end, each once, with the rows lost to it where that is known."""
    notes = attempt.read_notes()
    found: dict[str, BadFile] = {file.source_file: file for file in plan.bad_files}
    for shard in plan.inputs.shards:
        note = notes.get(shard.index)
        if note is None or not note.error:
            continue
        name = shard.file.source_file
        before = found.get(name, BadFile(name, note.error, 0))
        is_known = before.num_rows is not None and note.lost is not None
        found[name] = replace(before, num_rows=(before.num_rows or 0) + (note.lost or 0) if is_known else None)
    return tuple(found[name] for name in sorted(found))


def check_files(bad_files: Sequence[BadFile], policy: str) -> None:
    """Raise InputError naming every file that could not be read, where the policy is to fail."""
    if not bad_files or policy == "skip":
        return
    lines = [
        f"{file.source_file}: {'an unknown number of' if file.num_rows is None else file.num_rows} rows lost: {file.reason}"
        for file in bad_files
    ]
    raise InputError(
        "\n".join(
            [
                f"input.on_bad_file=fail: {len(bad_files)} input files could not be read; nothing is published. Restore them "
                "and score anew, or run this again with input.on_bad_file=skip, which publishes the rest without scoring it "
                "again (--retry-quarantine then tries the lost rows once more):",
                *lines,
            ]
        )
    )


def _with_scores_part(plan: Plan, attempt: AttemptFolder, accounts: Accounts) -> Accounts:
    """A run without a scored row still publishes one part, empty, so that readers find the full schema."""
    if any(file.path.startswith("scores/") for file in accounts.files):
        return accounts
    schema = PartSchemas(plan.inputs.schema, plan.spec).scores
    empty = write_part(schema.empty_table(), "scores", 0, attempt, engine="")
    return Accounts(accounts.shards, (empty, *accounts.files), accounts.reasons)


def _manifest(
    plan: Plan,
    accounts: Accounts,
    bad_files: Sequence[BadFile],
    timings: Timings,
    decisions: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    engines = sorted({file.engine for file in accounts.files if file.engine})
    decode = decisions.get(IMAGES, asdict(plan.decode))
    return {
        "version": MANIFEST_VERSION,
        "run_id": plan.run.run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": {"digest": plan.fingerprint.digest, "parts": plan.fingerprint.parts},
        "predictor": {"path": redact(plan.config.predictor.path), "sha256": plan.predictor_hash},
        "files": [vars(file) for file in accounts.files],
        "shards": [vars(shard) for shard in accounts.shards],
        "bad_files": [vars(file) for file in bad_files],
        "totals": {**accounts.totals, "reasons": dict(accounts.reasons)},
        "engine": {
            "used": engines,
            "provider": plan.config.engine.provider,
            "precision": plan.config.engine.precision,
            "decisions": {name: decision for name, decision in decisions.items() if name != IMAGES},
        },
        "images": {"decode": plan.config.images.decode, **decode},
        "timings": timings.seconds,
    }
