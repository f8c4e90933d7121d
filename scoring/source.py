"""The Ray `Datasource` over shards.

Owns how shards become read tasks, and the note each task leaves of the rows it read. Rows are `reading.py`'s.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import DataContext
from ray.data.block import Block, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from scoring.accounts import Range, ReadNote, is_done
from scoring.columns import SHARD, SOURCE_ROW, ReadSchema
from scoring.config import CsvConfig
from scoring.errors import Reason
from scoring.ledger import AttemptFolder
from scoring.reading import UnreadableFileError, read_shard
from scoring.shards import InputPlan, Shard

logger = logging.getLogger(__name__)

_ROW_OVERHEAD_BYTES = 64


class ShardSource(Datasource):  # type: ignore[misc]
    """Reads shards in blocks of at most `block_rows`, tasks of `task_rows` or a shard, and notes each shard's rows in the
    attempt's folder.

    `done` are the rows, by shard, that earlier attempts have accounted for: they are left out.
    """

    def __init__(
        self,
        plan: InputPlan,
        csv_config: CsvConfig,
        attempt: AttemptFolder,
        block_rows: int,
        task_rows: int,
        done: Mapping[int, Sequence[Range]] | None = None,
    ) -> None:
        super().__init__()
        self._plan = plan
        self._done = done or {}
        self._csv_config = csv_config
        self._attempt = attempt
        self._block_rows = block_rows
        self._tasks = group_shards(plan.shards, task_rows)

    @property
    def num_tasks(self) -> int:
        """Read tasks: give it to `override_num_blocks`, or Ray splits every read into tiny blocks."""
        return max(1, len(self._tasks))

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of all files, a lower bound of what they hold decoded."""
        return sum(file.size_bytes for file in self._plan.files)

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """One task a group of shards, with its row count, so that progress has a total."""
        return [self._read_task(shards, per_task_row_limit) for shards in self._tasks]

    def _read_task(self, shards: tuple[Shard, ...], row_limit: int | None) -> ReadTask:
        num_rows = sum(shard.estimated_rows for shard in shards)
        metadata = BlockMetadata(
            num_rows=num_rows,
            size_bytes=sum(_estimated_bytes(shard) for shard in shards),
            exec_stats=None,
            input_files=tuple(dict.fromkeys(shard.file.source_file for shard in shards)),
        )
        schema, csv_config, attempt, block_rows = self._plan.schema, self._csv_config, self._attempt, self._block_rows
        done = {shard.index: self._done[shard.index] for shard in shards if shard.index in self._done}

        def read() -> Iterator[Block]:
            yield from read_shards(shards, schema, csv_config, attempt, block_rows, done)

        return ReadTask(read, metadata, schema=schema.arrow, per_task_row_limit=row_limit)


def _estimated_bytes(shard: Shard) -> int:
    share = shard.estimated_rows / max(1, shard.file.num_rows)
    return round(shard.file.size_bytes * share) + shard.estimated_rows * _ROW_OVERHEAD_BYTES


def group_shards(shards: Sequence[Shard], task_rows: int) -> tuple[tuple[Shard, ...], ...]:
    """Consecutive shards of fewer rows together, so that a task is worth its start."""
    tasks: list[tuple[Shard, ...]] = []
    group: list[Shard] = []
    for shard in shards:
        group.append(shard)
        if sum(item.estimated_rows for item in group) >= task_rows:
            tasks.append(tuple(group))
            group = []
    return (*tasks, tuple(group)) if group else tuple(tasks)


def read_shards(
    shards: Sequence[Shard],
    schema: ReadSchema,
    csv_config: CsvConfig,
    attempt: AttemptFolder,
    block_rows: int,
    done: Mapping[int, Sequence[Range]],
) -> Iterator[pa.Table]:
    """One read task: the blocks of its shards less the rows that are done, then the notes of what each held."""
    notes: dict[int, ReadNote] = {}
    for shard in shards:
        note = ReadNote(0)
        try:
            for block in read_shard(shard, schema, csv_config, block_rows):
                assert block.num_rows == 0 or block[SHARD][0].as_py() == shard.index
                note = _noted(note, block)
                is_left = ~is_done(block[SOURCE_ROW].to_numpy(), done.get(shard.index, ()))
                yield block if is_left.all() else block.filter(pa.array(is_left))
        except UnreadableFileError as error:
            note = ReadNote(error.rows_read, lost=None, error=error.reason)
        if note.error:
            logger.warning("%s: %s", shard.file.source_file, note.error)
        notes[shard.index] = note
    attempt.write_reads(shards[0].index, notes)


def _noted(note: ReadNote, block: pa.Table) -> ReadNote:
    """The note with a block's rows added, and those of them that a broken file took with it."""
    lost = block.filter(pc.equal(block["reason"], Reason.FILE_UNREADABLE.value))
    error = note.error or (lost["message"][0].as_py() if lost.num_rows else "")
    return ReadNote(note.rows + block.num_rows, (note.lost or 0) + lost.num_rows, error)
