"""What a run published, read back as a user would: from `latest.json` on, by the files alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Published:
    """What a run published, read back from the files alone."""

    folder: Path
    manifest: Mapping[str, Any]
    scores: pa.Table
    quarantine: pa.Table

    def identities(self) -> list[tuple[str, int]]:
        """Every (source_file, source_row) of scores and quarantine, sorted, repeats kept."""
        pairs: list[tuple[str, int]] = []
        for table in (self.scores, self.quarantine):
            if table.num_rows:
                pairs += zip(table["source_file"].to_pylist(), table["source_row"].to_pylist(), strict=True)
        return sorted(pairs)


def read_published(output: Path) -> Published:
    latest = json.loads((output / "latest.json").read_text())
    manifest = json.loads((output / latest["manifest"]).read_text())
    folder = output / "runs" / latest["run_id"]
    assert (folder / "_SUCCESS").exists()
    assert not (folder / "_work").exists()
    tables = {
        kind: [file for file in manifest["files"] if file["path"].startswith(kind)] for kind in ("scores", "quarantine")
    }
    on_disk = {str(path.relative_to(folder)) for kind in tables for path in (folder / kind).glob("*")}
    assert on_disk == {file["path"] for file in manifest["files"]}
    scores, quarantine = (
        pa.concat_tables([pq.read_table(folder / file["path"], partitioning=None) for file in files])
        if files
        else pa.table({})
        for files in tables.values()
    )
    return Published(folder, manifest, scores, quarantine)
