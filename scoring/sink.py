"""The Ray `Datasink`: blocks of scored rows to parquet parts.

Owns how many rows a write task gets. What it does with them is `parts.py`'s.
"""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink

from scoring.accounts import check_quarantine, sum_reasons
from scoring.ledger import AttemptFolder
from scoring.parts import PartSchemas, write_task


class PartSink(Datasink[None]):  # type: ignore[misc]
    """Writes each task's rows as one part of scores and, where there are bad rows, one of quarantine, then the receipt.

    `limit`: the run's rows and the share of them that may be bad; a run that is past it already is stopped at once.
    """

    def __init__(
        self, attempt: AttemptFolder, schemas: PartSchemas, part_rows: int, limit: tuple[int, float] | None = None
    ) -> None:
        super().__init__()
        self._limit = limit
        self._attempt = attempt
        self._schemas = schemas
        self._part_rows = part_rows

    @property
    def min_rows_per_write(self) -> int:
        """Ray bundles blocks up to this many rows a write task."""
        return self._part_rows

    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        """Write one task's blocks. A retried task writes the same names again: no row is there twice.

        Raises QuarantineLimitError where the bad rows so far are too many, whatever the rest is like.
        """
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if table.num_rows]
        if tables:
            task: int = ctx.task_idx
            table = pa.concat_tables(tables)
            receipt = write_task(table, task, self._attempt, self._schemas)
            # A hopeless run has tasks over the limit, and only these read the others' receipts: with each that has a bad row,
            # reading would grow with the square of the tasks. What creeps over the limit is found at the end.
            if self._limit is not None and sum(receipt.reasons.values()) / table.num_rows > self._limit[1]:
                check_quarantine(sum_reasons(self._attempt.receipts()), *self._limit)
