"""Scored rows to parquet parts: which rows go where, how a part is written, and the receipt that makes it count.

Owns the output's columns. When tasks run is Ray's business (`sink.py`), what receipts add up to `accounts.py`'s.
"""

import hashlib
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scoring.accounts import PartFile, Receipt, ShardReceipt, identity_checksum, to_ranges
from scoring.columns import ENGINE_COLUMN, KEEP_PREFIX, MARK_FIELDS, SHARD, SOURCE_FILE, SOURCE_ROW, ReadSchema
from scoring.errors import LockError
from scoring.ledger import AttemptFolder
from scoring.outputs import score_fields
from scoring.spec import FeatureSpec


class PartSchemas:
    """The two kinds of parts a run writes, as arrow schemas."""

    def __init__(self, schema: ReadSchema, spec: FeatureSpec) -> None:
        kept = [pa.field(column.name, column.type) for column in schema.kept]
        identity = [pa.field(SOURCE_FILE, pa.string()), pa.field(SOURCE_ROW, pa.int64())]
        self.scores = pa.schema([*kept, *identity, *score_fields(spec)])
        self.quarantine = pa.schema([*kept, *identity, *MARK_FIELDS])
        self._kept = frozenset(field.name for field in kept)

    def select(self, table: pa.Table, schema: pa.Schema) -> pa.Table:
        """The block's columns under their output names, in the part's order and types."""
        names = [KEEP_PREFIX + field.name if field.name in self._kept else field.name for field in schema]
        return table.select(names).rename_columns(schema.names).cast(schema)


def reserved_names(spec: FeatureSpec) -> tuple[str, ...]:
    """Output column names that a kept column may not have."""
    marks = [field.name for field in MARK_FIELDS]
    return (SOURCE_FILE, SOURCE_ROW, *marks, *(field.name for field in score_fields(spec)))


def write_task(table: pa.Table, task: int, attempt: AttemptFolder, schemas: PartSchemas) -> Receipt:
    """Put the parts of one task's rows and then their receipt; returns the receipt.

    Raises LockError for a task that outlived its attempt: what it wrote would count for nobody, and lie there for good.
    """
    if not attempt.is_open:
        raise LockError(
            f"attempt {attempt.attempt} at {attempt.run_uri} is over: another driver has taken over, or published"
        )
    start = time.perf_counter()
    is_bad = pc.is_valid(table["reason"])
    scored, bad = table.filter(pc.invert(is_bad)), table.filter(is_bad)
    engine = ", ".join(pc.unique(table[ENGINE_COLUMN]).to_pylist())
    kinds = (("scores", scored, schemas.scores), ("quarantine", bad, schemas.quarantine))
    files = [
        write_part(schemas.select(rows, schema), kind, task, attempt, engine)
        for kind, rows, schema in kinds
        if rows.num_rows
    ]
    receipt = Receipt(
        attempt=attempt.attempt,
        task=task,
        files=tuple(files),
        shards=_shard_receipts(scored, bad),
        reasons=dict(Counter(bad["reason"].to_pylist())),
        write_s=time.perf_counter() - start,
    )
    attempt.write_receipt(receipt)
    return receipt


def write_part(table: pa.Table, kind: str, task: int, attempt: AttemptFolder, engine: str) -> PartFile:
    """Put one parquet part, in one go: an object store has no half-written objects then."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue().to_pybytes()
    path = attempt.write_part(kind, task, data)
    digest = hashlib.sha256(data).hexdigest()
    return PartFile(path, table.num_rows, len(data), digest, attempt.attempt, engine)


def _shard_receipts(scored: pa.Table, bad: pa.Table) -> dict[int, ShardReceipt]:
    receipts = {}
    for index in sorted({*pc.unique(scored[SHARD]).to_pylist(), *pc.unique(bad[SHARD]).to_pylist()}):
        good_rows, bad_rows = (table.filter(pc.equal(table[SHARD], index)) for table in (scored, bad))
        source_file = (good_rows if good_rows.num_rows else bad_rows)[SOURCE_FILE][0].as_py()
        good, quarantined = good_rows[SOURCE_ROW].to_numpy(), bad_rows[SOURCE_ROW].to_numpy()
        checksum = identity_checksum(source_file, np.concatenate([good, quarantined]))
        receipts[index] = ShardReceipt(to_ranges(good), to_ranges(quarantined), checksum)
    return receipts
