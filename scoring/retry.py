"""Trying a published run's quarantined rows again: the new run starts from the old one's scores, as if it had them written.

Owns that start. What is left, the quarantined rows, is read and scored like any other run's rest (`run.py`).
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from scoring.accounts import PartFile, ReadNote, Receipt, ShardReceipt, identity_checksum, to_ranges
from scoring.columns import SOURCE_FILE, SOURCE_ROW
from scoring.config import Fingerprint
from scoring.errors import ConfigError, FingerprintError
from scoring.ledger import RunFolder, Taken
from scoring.shards import Shard
from scoring.storage import join, open_input, read_bytes, write_bytes

logger = logging.getLogger(__name__)

RETRY_OF = "retry of run"


def retry_fingerprint(mark: Fingerprint, old: RunFolder) -> Fingerprint:
    """The new run's fingerprint: the old one's, and that it tries that run's rows again.

    Raises ConfigError where no such run was published or nothing is in quarantine, FingerprintError where model, settings or
    inputs are no longer the old run's: its scores could not stand beside new ones.
    """
    if not old.is_published:
        raise ConfigError(
            f"--retry-quarantine: no run {old.run_id} is published below {old.output}; look at latest.json"
        )
    manifest = old.read_manifest()
    before = {name: value for name, value in manifest["fingerprint"]["parts"].items() if name != RETRY_OF}
    if before != mark.parts:
        raise FingerprintError(
            "\n".join(
                [
                    f"--retry-quarantine: run {old.run_id} was scored from something else; score all rows in a new run",
                    *mark.differences(before),
                ]
            )
        )
    if not manifest["totals"]["rows_quarantined"]:
        raise ConfigError(
            f"--retry-quarantine: run {old.run_id} has no row in quarantine; there is nothing to try again"
        )
    return mark.with_part(RETRY_OF, f"{old.run_id}, {manifest['created']}")


def take_scores(old: RunFolder, new: RunFolder, shards: Sequence[Shard]) -> Taken:
    """Copy the old run's parts of scores to the new one, and account for them there."""
    manifest = old.read_manifest()
    files = [file for file in manifest["files"] if file["path"].startswith("scores/")]
    receipts = [_take_part(old, new, PartFile(**file), task, shards) for task, file in enumerate(files)]
    # Rows that a broken file lost are tried again as well, by reading it again.
    notes = {
        shard["index"]: ReadNote(shard["rows_read"]) for shard in manifest["shards"] if shard["state"] == "complete"
    }
    bad = manifest["totals"]["rows_quarantined"]
    logger.info("run %s: tries %d rows of run %s again and keeps its scores", new.run_id, bad, old.run_id)
    return Taken(tuple(receipts), notes)


def _take_part(old: RunFolder, new: RunFolder, file: PartFile, task: int, shards: Sequence[Shard]) -> Receipt:
    write_bytes(join(new.uri, file.path), read_bytes(join(old.uri, file.path)))
    with open_input(join(old.uri, file.path)) as stream:
        table = pq.read_table(stream, columns=[SOURCE_FILE, SOURCE_ROW])
    names = table[SOURCE_FILE].to_numpy(zero_copy_only=False)
    rows = table[SOURCE_ROW].to_numpy()
    accounts: dict[int, ShardReceipt] = {}
    for name in np.unique(names):
        of_file = rows[names == name]
        for index, own in _by_shard(of_file, [shard for shard in shards if shard.file.source_file == name]).items():
            accounts[index] = ShardReceipt(to_ranges(own), (), identity_checksum(str(name), own))
    return Receipt(file.attempt, task, (file,), accounts, {}, 0.0)


def _by_shard(rows: Any, shards: Sequence[Shard]) -> Mapping[int, Any]:
    """One file's rows by the shard that holds them."""
    ordered = sorted(shards, key=lambda shard: shard.first_row)
    place = np.searchsorted([shard.first_row for shard in ordered], rows, side="right") - 1
    return {ordered[number].index: rows[place == number] for number in np.unique(place).tolist()}
