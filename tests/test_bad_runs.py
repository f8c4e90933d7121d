"""Runs over broken files, from the plan to the manifest: what is named, what is scored, and what the policy decides.

On the ledger alone (`tests/ledger_run.py`). How each kind of damage is read is `tests/test_bad_files.py`'s.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.ledger_run import drive, rows_scored, write_inputs
from tests.published import read_published

pytestmark = pytest.mark.timeout(300)

SKIP = ("input.on_bad_file=skip",)


def damage_group(path: Path, group: int) -> None:
    """Overwrite the pages of one row group; the footer stays."""
    column = pq.read_metadata(path).row_group(group).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The usual inputs, a row group of `b.parquet` broken and `d.csv.gz` cut off in the middle; and files that are none."""
    data = tmp_path / "data"
    write_inputs(data)
    damage_group(data / "b.parquet", 1)
    # Hardly compressible, and longer than what the header is looked for in.
    text = "x\n" + "".join(f"{number * 7919 % 10_000_019}\n" for number in range(60_000))
    whole = gzip.compress(text.encode())
    (data / "d.csv.gz").write_bytes(whole[: len(whole) - len(whole) // 4])
    return tmp_path


def manifest_of(work: Path) -> dict[str, Any]:
    return dict(read_published(work / "out").manifest)


def test_broken_files_end_the_run_by_name_and_a_rerun_that_skips_them_scores_nothing_again(work: Path) -> None:
    assert drive(work) == 3
    error = (work / "error.txt").read_text().splitlines()
    assert error[0].startswith("input.on_bad_file=fail: 2 input files could not be read; nothing is published.")
    assert error[1].startswith(f"{work / 'data' / 'b.parquet'}: 60 rows lost: ")
    assert error[2].startswith(f"{work / 'data' / 'd.csv.gz'}: an unknown number of rows lost: ")
    assert not (work / "out" / "latest.json").exists()
    scored = rows_scored(work)
    assert drive(work, settings=SKIP) == 0
    assert rows_scored(work) == scored
    manifest = manifest_of(work)
    assert [(Path(file["source_file"]).name, file["num_rows"]) for file in manifest["bad_files"]] == [
        ("b.parquet", 60),
        ("d.csv.gz", None),
    ]
    states = {Path(shard["source_file"]).name: shard["state"] for shard in manifest["shards"]}
    assert states == {"a.parquet": "complete", "b.parquet": "complete", "c.csv": "complete", "d.csv.gz": "unreadable"}
    assert manifest["totals"]["reasons"]["file_unreadable"] == 60
    published = read_published(work / "out")
    lost = published.quarantine.to_pylist()
    lost = [row for row in lost if row["reason"] == "file_unreadable"]
    assert sorted(row["source_row"] for row in lost) == list(range(60, 120))
    assert {(row["source_file"], row["stage"]) for row in lost} == {(str(work / "data" / "b.parquet"), "read")}
    for shard in manifest["shards"]:
        assert shard["rows_read"] == shard["rows_scored"] + shard["rows_quarantined"]
    assert len(set(published.identities())) == len(published.identities()) == manifest["totals"]["rows_read"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all, but long enough to have a footer"])
def test_files_that_cannot_be_inspected_are_named_and_left_out(tmp_path: Path, content: bytes) -> None:
    write_inputs(tmp_path / "data")
    (tmp_path / "data" / "z.parquet").write_bytes(content)
    assert drive(tmp_path, settings=SKIP) == 0
    (bad,) = manifest_of(tmp_path)["bad_files"]
    assert bad["source_file"] == str(tmp_path / "data" / "z.parquet")
    assert bad["reason"]
    assert bad["num_rows"] is None
    assert manifest_of(tmp_path)["totals"]["rows_read"] == 500


def test_a_run_of_bad_rows_is_refused_with_its_reasons(tmp_path: Path) -> None:
    write_inputs(tmp_path / "data")
    assert drive(tmp_path, settings=("quarantine.max_fraction=0.01",)) == 3
    assert "11 of 500 rows (2.20 %) are in quarantine" in (tmp_path / "error.txt").read_text()
    assert "number_invalid 11" in (tmp_path / "error.txt").read_text()
    scored = rows_scored(tmp_path)
    assert drive(tmp_path, settings=("quarantine.max_fraction=0.03",)) == 0
    assert rows_scored(tmp_path) == scored
    assert json.loads((tmp_path / "outcome.json").read_text())["totals"]["rows_quarantined"] == 11
