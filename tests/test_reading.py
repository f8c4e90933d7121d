"""Rows and their identities: parquet row groups, CSV records, malformed and undecodable ones among them."""

import csv
import dataclasses
import gzip
import io
import itertools
import os
import re
import uuid
import zlib
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import scoring.csv_records
from scoring.config import CsvConfig
from scoring.errors import InputError
from scoring.reading import UnreadableFileError, read_shard
from scoring.shards import InputPlan
from scoring.spec import FeatureSpec
from scoring.storage import write_bytes
from tests.test_shards import X, plan_of, put_csv, put_parquet, spec_of

XT = spec_of(numbers=("x",), texts=("t",))


def blocks_of(plan: InputPlan, csv_config: CsvConfig | None = None, block_rows: int = 256) -> list[pa.Table]:
    blocks = [
        block
        for shard in plan.shards
        for block in read_shard(shard, plan.schema, csv_config or CsvConfig(), block_rows)
    ]
    for block in blocks:
        block.validate(full=True)
        assert block.schema == plan.schema.arrow
        assert block.num_rows <= block_rows or set(block["reason"].to_pylist()) == {"row_malformed"}
    return blocks


def rows_of(
    *paths: str | Path, spec: FeatureSpec = XT, block_rows: int = 256, csv: CsvConfig | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Every row, ordered by file and row, under the names of the file's columns."""
    plan = plan_of(*paths, spec=spec, csv=csv, **settings)
    rows = [row for block in blocks_of(plan, csv, block_rows) for row in block.to_pylist()]
    named = [{re.sub("^(model|keep):", "", name): value for name, value in row.items()} for row in rows]
    return sorted(named, key=lambda row: (row["source_file"], row["source_row"]))


def outcome(rows: Sequence[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    """(source_row, the named values, or the reason where there is one) for each row."""
    return [
        (row["source_row"], row["reason"]) if row["reason"] else (row["source_row"], *(row[name] for name in names))
        for row in rows
    ]


@pytest.fixture(params=[16, 64, 2**20])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of the CSV reader from a line or two to the whole file."""
    monkeypatch.setattr(scoring.csv_records, "_BLOCK_BYTES", request.param)
    return int(request.param)


# --- parquet


@pytest.mark.parametrize("block_rows", [1, 3, 256])
def test_row_groups_and_csv_give_the_same_rows(tmp_path: Path, block_rows: int) -> None:
    texts = ["a", "b,c", 'say "hi"', "two\nlines", "\u00e4\U0001f600", "NA", ""]
    numbers = [1.0, None, 2.5, None, -3e-7, 0.1, 12345678.0]
    table = pa.table({"t": texts, "id": [f"r{i}" for i in range(7)], "x": numbers})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with (tmp_path / "b.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table.column_names)
        writer.writerows([t, i, "" if x is None else x] for t, i, x in zip(*table.to_pydict().values(), strict=True))
    rows = rows_of(tmp_path, block_rows=block_rows)
    for shard, path in enumerate([tmp_path / "a.parquet", tmp_path / "b.csv"]):
        assert [row for row in rows if row["source_file"] == str(path)] == [
            {
                "source_file": str(path),
                "source_row": i,
                "shard": shard,
                "id": f"r{i}",
                "t": texts[i],
                "x": numbers[i],
                "stage": None,
                "reason": None,
                "message": None,
            }
            for i in range(7)
        ]


def test_each_shard_reads_its_own_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoring.shards._SHARD_ROWS", 5)
    put_parquet(tmp_path / "a.parquet", {"x": [float(i) for i in range(23)]}, row_group_size=2)
    plan = plan_of(tmp_path, spec=X)
    assert [(shard.first_row, shard.num_rows) for shard in plan.shards] == [
        (i, min(4, 23 - i)) for i in range(0, 23, 4)
    ]
    for shard in plan.shards:
        (block,) = read_shard(shard, plan.schema, CsvConfig(), 256)
        expected = list(range(shard.first_row, shard.first_row + (shard.num_rows or 0)))
        assert block["source_row"].to_pylist() == expected
        assert block["model:x"].to_pylist() == [float(i) for i in expected]
        assert set(block["shard"].to_pylist()) == {shard.index}


def test_parquet_columns_with_dots_and_encodings(tmp_path: Path) -> None:
    columns = {
        "x": pa.array([Decimal("1.5"), None], pa.decimal128(4, 1)),
        "x.y": ["other", "other"],
        "t": pa.array(["u", None]).dictionary_encode(),
        "day": pa.array([0, 1], pa.date32()),
    }
    put_parquet(tmp_path / "a.parquet", columns)
    rows = rows_of(tmp_path)
    assert [(row["x"], row["x.y"], row["t"]) for row in rows] == [(1.5, "other", "u"), (None, "other", "")]
    assert [str(row["day"]) for row in rows] == ["1970-01-01", "1970-01-02"]


@pytest.mark.parametrize(
    "encode", [pa.Array.dictionary_encode, lambda cells: cells.cast(pa.large_string()), lambda c: c]
)
def test_parquet_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path, encode: Any) -> None:
    text = pa.array([b"fine", b"caf\xe9", None, "\ufffd".encode()]).view(pa.string())
    put_parquet(tmp_path / "a.parquet", {"x": [0.0, 1.0, 2.0, 3.0], "t": encode(text), "id": [5, 6, 7, 8]})
    rows = rows_of(tmp_path)
    assert outcome(rows, "x", "t", "id") == [
        (0, 0.0, "fine", 5),
        (1, "row_malformed"),
        (2, 2.0, "", 7),
        (3, 3.0, "\ufffd", 8),
    ]
    assert (rows[1]["x"], rows[1]["id"]) == (None, None)
    assert rows[1]["message"] == "column 't' holds bytes that are no utf-8 text: 'caf\ufffd'"


def test_a_footer_that_lies_costs_the_rows_in_doubt(tmp_path: Path) -> None:
    path = put_parquet(tmp_path / "a.parquet", {"x": [1.0, 2.0, 3.0]})
    plan = plan_of(path, spec=X)
    (shard,) = plan.shards
    for num_rows, good, said in [
        (2, [], "rows 0 to 1 cannot be read: holds more rows than the 2 that its footer says"),
        (4, [1.0, 2.0, 3.0], "rows 3 to 3 cannot be read: holds 3 rows where its footer says 4"),
    ]:
        blocks = read_shard(dataclasses.replace(shard, num_rows=num_rows), plan.schema, CsvConfig(), 256)
        rows = [row for block in blocks for row in block.to_pylist()]
        assert [row["source_row"] for row in rows] == list(range(num_rows))
        assert [row["model:x"] for row in rows if row["reason"] is None] == good
        assert {row["message"] for row in rows[len(good) :]} == {f"{said}; restore or rewrite the file"}


def test_object_store_files_are_read(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    write_bytes(f"{root}/day=3/a.csv", b"x,t\n1,u\n")
    write_bytes(f"{root}/day=4/b.csv.gz", gzip.compress(b"x,t\n2,v\n"))
    local = put_parquet(tmp_path / "a.parquet", {"x": [7.0], "t": ["w"]})
    write_bytes(f"{root}/day=__HIVE_DEFAULT_PARTITION__/c.parquet", local.read_bytes())
    found = [(row["source_file"].removeprefix(root), row["x"], row["t"], row["day"]) for row in rows_of(root)]
    assert found == [
        ("/day=3/a.csv", 1.0, "u", "3"),
        ("/day=4/b.csv.gz", 2.0, "v", "4"),
        ("/day=__HIVE_DEFAULT_PARTITION__/c.parquet", 7.0, "w", None),
    ]


# --- kept columns, partitions and both formats together


def test_cells_that_a_file_lacks_are_null_and_differing_types_are_text(tmp_path: Path) -> None:
    put_csv(tmp_path / "a.csv", "k,x,t\n007,1,u\n")
    put_parquet(tmp_path / "b.parquet", {"x": [2.0], "t": ["v"], "k": [7]})
    put_parquet(tmp_path / "c.parquet", {"x": [3.0], "t": ["w"], "extra": [True]})
    rows = rows_of(tmp_path)
    assert [(row["x"], row["k"], row["extra"]) for row in rows] == [
        (1.0, "007", None),
        (2.0, "7", None),
        (3.0, None, True),
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_model_columns_from_partitions(tmp_path: Path, name: str) -> None:
    for key in ("x=1.50", "x=__HIVE_DEFAULT_PARTITION__", "x=NA", "x=wide"):
        folder = tmp_path / key / "t=S%C3%A3o"
        if name.endswith("csv"):
            put_csv(folder / name, "id\n5\n")
        else:
            put_parquet(folder / name, {"id": ["5"]})
    rows = {row["source_file"].split("/")[-3]: row for row in rows_of(tmp_path)}
    assert {key: (row["x"], row["t"], row["id"], row["reason"]) for key, row in rows.items()} == {
        "x=1.50": (1.5, "S\u00e3o", "5", None),
        "x=__HIVE_DEFAULT_PARTITION__": (None, "S\u00e3o", "5", None),
        "x=NA": (None, "S\u00e3o", "5", None),
        "x=wide": (None, "S\u00e3o", "5", "number_invalid"),
    }


def test_every_column_may_come_from_partitions(tmp_path: Path) -> None:
    put_parquet(tmp_path / "x=1" / "a.parquet", {"unread": range(5)}, row_group_size=2)
    put_csv(tmp_path / "x=2" / "b.csv", "unread\n1\n2\n")
    rows = rows_of(tmp_path, spec=X, keep=())
    assert [(row["source_row"], row["x"]) for row in rows] == [*((i, 1.0) for i in range(5)), (0, 2.0), (1, 2.0)]


# --- CSV: malformed records


BAD = "only one cell"


@pytest.mark.parametrize(
    "bad",
    [[0], [9], [4], [0, 1, 2], [7, 8, 9], [0, 9], [0, 2, 4, 6, 8], list(range(10))],
    ids=lambda bad: "-".join(map(str, bad)),
)
def test_malformed_records_keep_their_row(tmp_path: Path, bad: list[int], block_bytes: int) -> None:
    lines = [BAD if i in bad else f"{i},text {i}" for i in range(10)]
    rows = rows_of(put_csv(tmp_path / "a.csv", "\n".join(["x,t", *lines]) + "\n"), block_rows=3)
    assert outcome(rows, "x", "t") == [
        (i, "row_malformed") if i in bad else (i, float(i), f"text {i}") for i in range(10)
    ]
    marks = {(row["stage"], row["message"], row["x"], row["t"]) for row in rows if row["reason"]}
    assert marks == {("read", f"1 cells where the header has 2: '{BAD}'", None, None)}


def test_many_malformed_records_between_good_ones(tmp_path: Path, block_bytes: int) -> None:
    lines = [f"{i},t" if i % 7 == 3 else "x" * (i % 5) + ",,," for i in range(400)]
    rows = rows_of(put_csv(tmp_path / "a.csv", "\n".join(["x,t", *lines])), block_rows=8)
    assert outcome(rows, "x") == [(i, float(i)) if i % 7 == 3 else (i, "row_malformed") for i in range(400)]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_blank_lines_line_ends_and_quoted_newlines(tmp_path: Path, newline: str, bom: str, block_bytes: int) -> None:
    lines = ["", "", "x,t", "", '0,"a', 'b"', "", "", BAD, '2,"c', "", 'd"', "", "3,last", "", ""]
    path = put_csv(tmp_path / "a.csv", bom + newline.join(lines))
    expected = [(0, 0.0, f"a{newline}b"), (1, "row_malformed"), (2, 2.0, f"c{newline}{newline}d"), (3, 3.0, "last")]
    assert outcome(rows_of(path), "x", "t") == expected


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n\n"])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_header_only_files_have_no_rows(tmp_path: Path, end: str, name: str) -> None:
    assert rows_of(put_csv(tmp_path / name, "x,t" + end)) == []


@pytest.mark.parametrize("end", ["", "\n"])
def test_last_record_counts_with_and_without_newline(tmp_path: Path, end: str, block_bytes: int) -> None:
    assert outcome(rows_of(put_csv(tmp_path / "a.csv", "x,t\n0,u\n1,v" + end)), "x", "t") == [
        (0, 0.0, "u"),
        (1, 1.0, "v"),
    ]
    rows = rows_of(put_csv(tmp_path / "b.csv", "x,t\n0,u\n1" + end))
    assert outcome(rows, "x", "t") == [(0, 0.0, "u"), (1, "row_malformed")]


def test_a_quote_that_is_never_closed_takes_the_rest(tmp_path: Path) -> None:
    rows = rows_of(put_csv(tmp_path / "a.csv", 'x,t\n0,u\n"1,v\n2,w\n'))
    assert outcome(rows, "x", "t") == [(0, 0.0, "u"), (1, "row_malformed")]


def test_a_single_column_counts_quoted_empty_cells_and_not_blank_lines(tmp_path: Path) -> None:
    rows = rows_of(put_csv(tmp_path / "a.csv", 'x\n""\n\n1\n" "\n\n'), spec=X)
    assert outcome(rows, "x") == [(0, None), (1, 1.0), (2, None)]


def test_numbers_that_are_none_are_marked_beside_malformed_records(tmp_path: Path) -> None:
    rows = rows_of(put_csv(tmp_path / "a.csv", "x,t,id\n1,a,i\ntwo,b,j\n3\n4,d,l\n"))
    assert outcome(rows, "x", "t", "id") == [
        (0, 1.0, "a", "i"),
        (1, "number_invalid"),
        (2, "row_malformed"),
        (3, 4.0, "d", "l"),
    ]
    assert (rows[1]["t"], rows[1]["id"]) == ("b", "j")


def test_long_malformed_records_are_cut_in_the_message(tmp_path: Path) -> None:
    (row,) = rows_of(put_csv(tmp_path / "a.csv", f"x,t\n{'y' * 5000}\n"))
    assert row["message"] == f"1 cells where the header has 2: '{'y' * 200}'"


def test_a_record_longer_than_a_block_is_whole_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_csv(tmp_path / "a.csv", f"x,t\n0,u\n1,{'v' * 300}\n2,w\n")
    monkeypatch.setattr(scoring.csv_records, "_BLOCK_BYTES", 200)
    assert outcome(rows_of(path), "x", "t") == [(0, 0.0, "u"), (1, 1.0, "v" * 300), (2, 2.0, "w")]
    monkeypatch.setattr(scoring.csv_records, "_BLOCK_BYTES", 100)
    with pytest.raises(UnreadableFileError) as caught:
        rows_of(path)
    assert str(caught.value).startswith(f"{path}: cannot be read after 1 rows: ")
    assert "a record is longer than 100 bytes, or a quote is never closed; repair the file" in str(caught.value)


# --- CSV: encodings and delimiters


def test_bytes_that_are_not_utf8_cost_their_row_alone(tmp_path: Path, block_bytes: int) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"x,t,unread\n0,ok,a\n1,caf\xe9,a\n2\xff,\xfe,a\n3,na\xc3\xafve,\xff\n\xff\n5,\xed\xa0\x80,a\n6,end,a\n"
    )
    rows = rows_of(path, keep=())
    assert outcome(rows, "x", "t") == [
        (0, 0.0, "ok"),
        (1, "row_malformed"),
        (2, "row_malformed"),
        (3, 3.0, "na\u00efve"),
        (4, "row_malformed"),
        (5, "row_malformed"),
        (6, 6.0, "end"),
    ]
    assert [row["message"] for row in rows][1:5] == [
        "column 't' holds bytes that are no utf-8 text: 'caf\ufffd'",
        "column 't' holds bytes that are no utf-8 text: '\ufffd'",
        None,
        "1 cells where the header has 3: '\ufffd'",
    ]


def test_truncated_character_at_the_end_of_the_file(tmp_path: Path, block_bytes: int) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"x,t\n0,u\n1,\xe2\x82")
    assert outcome(rows_of(path), "x", "t") == [(0, 0.0, "u"), (1, "row_malformed")]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_encodings(tmp_path: Path, encoding: str, block_bytes: int) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("x,t,\u00fc\n0,caf\u00e9,u\n\u00df\n2,\u00a7,\u00f1\n".encode(encoding))
    rows = rows_of(path, csv=CsvConfig(encoding=encoding))
    assert outcome(rows, "x", "t", "\u00fc") == [
        (0, 0.0, "caf\u00e9", "u"),
        (1, "row_malformed"),
        (2, 2.0, "\u00a7", "\u00f1"),
    ]
    assert rows[1]["message"] == "1 cells where the header has 3: '\u00df'"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "shift_jis"])
def test_bytes_that_another_encoding_lacks_cost_their_row_alone(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"x,t\n0,u\n1,\x81\n2,v\n")
    rows = rows_of(path, csv=CsvConfig(encoding=encoding))
    assert outcome(rows, "x", "t") == [(0, 0.0, "u"), (1, "row_malformed"), (2, 2.0, "v")]
    assert f"no {encoding} text" in rows[1]["message"]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_delimiters(tmp_path: Path, delimiter: str) -> None:
    lines = [["x", "t"], ["1", '"a' + delimiter + 'b"'], ["2", "c,d"], ["3"]]
    path = put_csv(tmp_path / "a.csv", "\n".join(delimiter.join(cells) for cells in lines))
    rows = rows_of(path, csv=CsvConfig(delimiter=delimiter))
    assert outcome(rows, "x", "t") == [(0, 1.0, f"a{delimiter}b"), (1, 2.0, "c,d"), (2, "row_malformed")]


def test_a_wrong_delimiter_is_a_missing_column(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"columns 't', 'x' missing.*the file has: x;t"):
        rows_of(put_csv(tmp_path / "a.csv", "x;t\n1;2\n"))


def test_columns_in_another_order_and_extra_ones(tmp_path: Path) -> None:
    put_csv(tmp_path / "a.csv", "t,x\nu,1\n")
    put_csv(tmp_path / "b.csv", "extra,x,,t\ne,2,0,v\n")
    rows = rows_of(tmp_path)
    assert [(row["x"], row["t"], row["extra"], row[""]) for row in rows] == [
        (1.0, "u", None, None),
        (2.0, "v", "e", "0"),
    ]


def test_null_values_of_the_configuration(tmp_path: Path) -> None:
    path = put_csv(tmp_path / "a.csv", "x,c,t\nNA,NA,NA\n-,-,-\n")
    spec = spec_of(numbers=("x",), categories=(("c", "string"),), texts=("t",))
    assert outcome(rows_of(path, spec=spec), "x", "c", "t") == [(0, None, None, "NA"), (1, "number_invalid")]
    named = rows_of(path, spec=spec, csv=CsvConfig(null_values=("-",)))
    assert outcome(named, "x", "c", "t") == [(0, "number_invalid"), (1, None, None, "-")]


# --- CSV: compressed files


def test_compressed_files_in_many_pieces(tmp_path: Path, block_bytes: int) -> None:
    text = "x,t\n" + "".join(f"{i},{'z' * (i % 9)}\n" for i in range(300))
    packed = b"".join(gzip.compress(text[i : i + 100].encode()) for i in range(0, len(text), 100))
    (tmp_path / "a.csv.GZ").write_bytes(packed)
    assert outcome(rows_of(tmp_path), "x", "t") == [(i, float(i), "z" * (i % 9)) for i in range(300)]


@pytest.mark.parametrize("damage", ["cut", "bent", "checksum"])
def test_damage_beyond_the_sample_names_the_file(tmp_path: Path, damage: str) -> None:
    text = b"x,t\n" + b"".join(b"1,%s\n" % os.urandom(20).hex().encode() for _ in range(40_000))
    packed = gzip.compress(text)
    packer = zlib.compressobj(wbits=31)
    damaged = {
        "cut": packed[: len(packed) * 3 // 4],
        "bent": packer.compress(text) + packer.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 1000,  # a block of no type
        "checksum": packed[:-8] + bytes(8),
    }
    path = tmp_path / "a.csv.gz"
    path.write_bytes(damaged[damage])
    with pytest.raises(
        UnreadableFileError, match=f"^{path}: cannot be read after [0-9]+ rows: .*restore or remove the file$"
    ):
        rows_of(path)


def test_reasons_do_not_tell_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(put_csv(tmp_path / "a.csv", "x\n1\n"), spec=X)

    def fail(uri: str) -> None:
        raise OSError("403 for https://user:hush@host/a.csv?sig=hush")

    monkeypatch.setattr(scoring.csv_records, "open_csv_text", fail)
    with pytest.raises(UnreadableFileError, match=re.escape("403 for https://host/a.csv")) as caught:
        blocks_of(plan)
    assert "hush" not in str(caught.value)


# --- any table that Python's csv module can write

cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=6) | st.sampled_from(
    ['"', ",", "\n", "\r\n", "\r", "a\nb", '""', " ", "NA", "\ufeff", "\ufdd0", "\ufffd"]
)
good_records = st.tuples(cells, cells)
bad_records = st.lists(cells, min_size=3, max_size=4) | st.just(["one"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(good_records | bad_records, max_size=12),
    st.sampled_from([2, 10, 100, 2**20]),
    # Python 3.11 leaves a lone \r unquoted where lines end with \n.
    st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]),
    st.integers(1, 5),
)
@example([("", ""), ["one"], ("\u20ac" * 6, "\r\n")], 2, ("\r\n", csv.QUOTE_MINIMAL), 1)
def test_what_the_csv_module_writes_is_read_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    records: list[Sequence[str]],
    spare_bytes: int,
    style: tuple[str, Any],
    block_rows: int,
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=style[0], quoting=style[1])
    ends = [0, *(writer.writerow(record) and text.tell() for record in [["t", "id"], *records])]
    longest = max(len(text.getvalue()[start:end].encode()) for start, end in itertools.pairwise(ends))
    path = put_csv(tmp_path / "a.csv", text.getvalue())
    plan = plan_of(path, spec=spec_of(texts=("t",)))
    monkeypatch.setattr(scoring.csv_records, "_BLOCK_BYTES", longest + spare_bytes)
    blocks = blocks_of(plan, block_rows=block_rows)
    rows = pa.concat_tables([plan.schema.arrow.empty_table(), *blocks])
    rows = rows.take(pc.sort_indices(rows, sort_keys=[("source_row", "ascending")]))
    assert rows["source_row"].to_pylist() == list(range(len(records)))
    is_good = [len(record) == 2 for record in records]
    assert rows["reason"].to_pylist() == [None if good else "row_malformed" for good in is_good]
    expected = [tuple(record) if good else (None, None) for record, good in zip(records, is_good, strict=True)]
    assert list(zip(rows["model:t"].to_pylist(), rows["keep:id"].to_pylist(), strict=True)) == expected
