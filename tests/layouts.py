"""300 tabular rows laid out as users have them, one run over them, and what its scoring actors said in their logs."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# The zoo has a category that is called NA: in CSV it is a missing value unless told otherwise.
LAYOUT_SETTINGS = ("--set", "batch.rows=32", "--set", 'input.csv.null_values=[""]')


def write_layout(rows: pa.Table, folder: Path) -> dict[str, int]:
    """300 rows as two parquet files in Hive partitions (several row groups each) and one CSV: rows by file."""
    hive = [folder / "region=north" / "a.parquet", folder / "region=s%2Fouth" / "b.pq"]
    for path, part, group in zip(hive, (rows.slice(0, 130), rows.slice(130, 90)), (40, 90), strict=True):
        path.parent.mkdir(parents=True)
        pq.write_table(part, path, row_group_size=group)
    csv = folder / "c.csv"
    rest = rows.slice(220, 80).to_pandas().astype(object)
    rest.where(rest.notna(), "").to_csv(csv, index=False)
    return {str(hive[0]): 130, str(hive[1]): 90, str(csv): 80}


@dataclass(frozen=True)
class ActorLines:
    """What a run's scoring actors said, from the workers' own logs: the driver's copy may be cut off at its end."""

    loaded: frozenset[str]
    final_rows: Mapping[str, int]

    @staticmethod
    def read(logs: Path) -> "ActorLines":
        text = "".join(path.read_text(errors="replace") for path in logs.glob("worker-*.err"))
        final = re.findall(r"score actor=(\w+) provider=\S+ rows=(\d+) .*final=true", text)
        assert len({actor for actor, _ in final}) == len(final), "an actor says goodbye once"
        return ActorLines(
            frozenset(re.findall(r"score actor=(\w+) load_s=", text)), {actor: int(rows) for actor, rows in final}
        )

    def since(self, earlier: "ActorLines") -> "ActorLines":
        final = {actor: rows for actor, rows in self.final_rows.items() if actor not in earlier.final_rows}
        return ActorLines(self.loaded - earlier.loaded, final)


def wait_for_goodbyes(logs: Path, earlier: ActorLines, rows: int) -> ActorLines:
    """The actors' lines once they stand still: actors end after the driver has published."""
    deadline = time.monotonic() + 120
    while True:
        lines = ActorLines.read(logs).since(earlier)
        time.sleep(5)
        if ActorLines.read(logs).since(earlier) == lines and sum(lines.final_rows.values()) == rows:
            return lines
        if time.monotonic() > deadline:
            return lines


@dataclass(frozen=True)
class ScoredLayout:
    """A run of the real job with one scoring actor and an empty cache."""

    files: Mapping[str, int]
    data: Path
    cache: Path
    output: Path
    arguments: tuple[Any, ...]
    log: str
    lines: ActorLines
