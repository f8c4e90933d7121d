"""The guard: tables for code that may raise, run out of memory, never return or end the process.

Owns which rows such code gets again and with whom, and the end of a process whose GPU is lost. The splitting is `poison.py`'s,
the files that tell of deaths are `journal.py`'s.

Rows that kill: every flight of the dead process is suspect. A suspect runs with nothing beside it, in groups of the square
root of their number, each a flight of its own; the group that dies is known, and then its row. So a row is found in three
deaths, from a window of any size: the window, a group, the row.
"""

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import pyarrow as pa

from scoring.columns import MODEL_PREFIX, mark_rows
from scoring.errors import Reason, Stage
from scoring.identities import Identities
from scoring.journal import Journal, Suspicion
from scoring.poison import MAX_HALVINGS, Rows, Verdict, describe, fault_of, is_sticky, split

logger = logging.getLogger(__name__)


class Guard:
    """Gives tables to `work`, which returns one row for each, in their order; a row that it fails on costs only itself.

    `work` leaves rows alone that carry a reason. What it fails on is marked with `stage`, and score_error where the closed
    set has nothing closer: image_* and number_invalid say what is wrong with a cell, and an unforeseen error does not.
    Without a journal a row that ends the process ends the run. May be called from several threads.
    """

    def __init__(self, work: Callable[[pa.Table], pa.Table], stage: Stage, journal: Journal | None) -> None:
        self._work = work
        self._stage = stage
        self._journal = journal
        self._turns = _Turns()
        self._max_rows: int | None = None
        self._most_rows = 0
        self._has_failed = False

    def __call__(self, table: pa.Table) -> pa.Table:
        """`work(table)`, with the rows marked that it cannot do."""
        if self._journal is None or not table.num_rows:
            return self._survive(table)
        rows = Identities.of(table)
        suspicion = self._journal.suspicion(rows)
        if suspicion is not None:
            return self._isolate(table, suspicion, self._journal)
        with self._turns.shared(), self._journal.flight(rows):
            return self._survive(table)

    def paused(self) -> AbstractContextManager[None]:
        """See `Journal.paused`."""
        return self._journal.paused() if self._journal is not None else nullcontext()

    def close(self) -> None:
        """Stop the journal's watchdog."""
        if self._journal is not None:
            self._journal.close()

    def _survive(self, table: pa.Table) -> pa.Table:
        try:
            return self._work_or_split(table)
        except Exception as error:
            if self._journal is not None and is_sticky(error):
                self._journal.note(Reason.PROCESS_KILLED, describe(error))
                logger.critical("%s: the GPU is lost to this process, which ends", self._stage, exc_info=True)
                # Not an exception: Ray would go on giving rows to a process whose GPU answers no more.
                os._exit(1)
            raise

    def _work_or_split(self, table: pa.Table) -> pa.Table:
        fault = None
        max_rows = self._max_rows or table.num_rows
        if table.num_rows <= max_rows:
            try:
                return self._work(table)
            except Exception as error:
                fault = fault_of(error)
                logger.warning(
                    "%s: %d rows failed, splitting them: %s",
                    *(self._stage, table.num_rows, fault.message),
                    exc_info=not self._has_failed,
                )
                self._has_failed = True
        found = split(
            np.arange(table.num_rows),
            lambda rows: self._work(table.take(pa.array(rows))),
            fault=fault,
            max_rows=max_rows,
        )
        self._most_rows = max(self._most_rows, table.num_rows)
        if found.fits is not None:
            self._lower(min(max_rows, table.num_rows))
        return _merge([*found.parts, *self._refuse(table, found.bad)])

    def _lower(self, failed_rows: int) -> None:
        """One step, not to what just fitted: that may have been one large row's doing, and holds for the rest of the run."""
        limit = max(1, self._most_rows >> MAX_HALVINGS, failed_rows // 2)
        # Several threads may have failed with as many.
        self._max_rows = min(self._max_rows or limit, limit)
        logger.warning(
            "%s: out of memory with %d rows; at most %d from here on", self._stage, failed_rows, self._max_rows
        )

    def _isolate(self, table: pa.Table, suspicion: Suspicion, journal: Journal) -> pa.Table:
        """The rows that deaths name, apart from the others and from each other."""
        parts = self._refuse(table, suspicion.condemned)
        groups = _groups(suspicion)
        logger.warning(
            "%s: a process died over %d of these %d rows; trying them in %d groups, %d rows given up",
            *(self._stage, np.count_nonzero(suspicion.deaths), table.num_rows, len(groups), len(suspicion.condemned)),
        )
        with self._turns.exclusive():
            parts += [self._do(table, rows, journal) for rows in groups]
        innocent = np.flatnonzero(suspicion.deaths == 0)
        if len(innocent):
            with self._turns.shared():
                parts.append(self._do(table, innocent, journal))
        return _merge(parts)

    def _do(self, table: pa.Table, rows: Rows, journal: Journal) -> tuple[Rows, pa.Table]:
        part = table.take(pa.array(rows))
        with journal.flight(Identities.of(part)):
            return rows, self._survive(part)

    def _refuse(self, table: pa.Table, bad: dict[int, Verdict]) -> list[tuple[Rows, pa.Table]]:
        """Rows given up: marked, without the cells that may have done it, and through `work` for the columns it adds."""
        if not bad:
            return []
        rows = np.array(list(bad), dtype=np.intp)
        row, (reason, message) = next(iter(bad.items()))
        logger.warning("%s: %d rows given up, one of them row %d: %s: %s", self._stage, len(bad), row, reason, message)
        refused = table.take(pa.array(rows))
        for index, column in enumerate(refused.schema):
            if column.name.startswith(MODEL_PREFIX):
                refused = refused.set_column(index, column, pa.nulls(len(rows), column.type))
        return [(rows, self._work(mark_rows(refused, self._stage, dict(enumerate(bad.values())))))]


def _groups(suspicion: Suspicion) -> list[Rows]:
    """Suspects as they are tried: groups as many as they are large, and at the end the rows of a group that died, each alone.

    At the end, because a process that is killed from outside should find them in flight as seldom as can be.
    """
    open_case = np.ones(len(suspicion.deaths), dtype=np.bool_)
    open_case[list(suspicion.condemned)] = False
    close, distant = (np.flatnonzero(open_case & named) for named in (suspicion.deaths > 1, suspicion.deaths == 1))
    size = max(1, math.ceil(math.sqrt(len(distant))))
    groups = [distant[start : start + size] for start in range(0, len(distant), size)]
    return groups + [close[[row]] for row in range(len(close))]


def _merge(parts: Sequence[tuple[Rows, pa.Table]]) -> pa.Table:
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    return pa.concat_tables([table for _, table in parts]).take(pa.array(order))


class _Turns:
    """Many at once, or one alone; who wants to be alone comes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_shared = 0
        self._num_exclusive = 0
        self._is_alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._num_exclusive)
            self._num_shared += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_shared -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._changed:
            self._num_exclusive += 1
            self._changed.wait_for(lambda: not self._num_shared and not self._is_alone)
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_alone = False
                self._num_exclusive -= 1
                self._changed.notify_all()
