"""Files that cannot be read: each is named, the rows lost to it are known or said to be unknown, and the rest is read.

Damage is done to real files, before the listing or after it. A store that falters is a file object that does.
"""

import csv
import gzip
import io
import logging
import os
import pickle
import random
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import scoring.csv_records
import scoring.errors
import scoring.opening
import scoring.reading
from scoring.config import CsvConfig, InputConfig
from scoring.errors import InputError
from scoring.reading import UnreadableFileError, read_shard
from scoring.shards import BadFile, InputPlan, inspect_all, inspect_files, list_inputs, plan_inputs
from scoring.storage import ListedFile, write_bytes
from tests.test_shards import RESERVED, X, plan_of, put_csv, put_parquet, spec_of

XT = spec_of(numbers=("x",), texts=("t",))
GROUP_ROWS = 100


def config_of(*paths: str | Path, **settings: Any) -> InputConfig:
    return InputConfig(paths=tuple(map(str, paths)), **settings)


def put_groups(path: Path, num_groups: int = 4, **options: Any) -> Path:
    """A file of `GROUP_ROWS` rows a group; x is the row's number, t a text of its own."""
    num_rows = num_groups * GROUP_ROWS
    columns = {"x": [float(i) for i in range(num_rows)], "t": [f"text {i * 7919 % 100_003}" for i in range(num_rows)]}
    return put_parquet(path, columns, row_group_size=GROUP_ROWS, use_dictionary=False, **options)


def column_bytes(path: Path, group: int, column: int) -> tuple[int, int]:
    chunk = pq.read_metadata(path).row_group(group).column(column)
    return chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size


def damage(path: Path, start: int, end: int, byte: bytes = b"\xff") -> None:
    data = bytearray(path.read_bytes())
    data[start:end] = byte * (end - start)
    path.write_bytes(data)


def read(plan: InputPlan, block_rows: int = 256) -> list[dict[str, Any]]:
    """All rows of all shards as read, each block checked for its schema and size."""
    rows = []
    for shard in plan.shards:
        for block in read_shard(shard, plan.schema, CsvConfig(), block_rows):
            block.validate(full=True)
            assert block.schema == plan.schema.arrow
            assert block.num_rows <= block_rows
            assert set(block["shard"].to_pylist()) <= {shard.index}
            rows += block.to_pylist()
    return rows


def check_rows(rows: list[dict[str, Any]], lost: set[int], num_rows: int) -> None:
    """Every row once and in order; the lost ones without values, the others with their own."""
    assert [row["source_row"] for row in rows] == list(range(num_rows))
    for row in rows:
        number = row["source_row"]
        cells = (row["stage"], row["reason"], row["model:x"], row["model:t"])
        expected = (None, None, float(number), f"text {number * 7919 % 100_003}")
        assert cells == (("read", "file_unreadable", None, None) if number in lost else expected)


# --- inspection


def damaged_files(folder: Path) -> dict[str, str]:
    """Files in `folder`, each unusable in its own way, and a part of what is to be said of each."""
    good = put_groups(folder / "a_good.parquet").read_bytes()
    footer = int.from_bytes(good[-8:-4], "little")
    packed = gzip.compress(b"x,t\n" + os.urandom(4000).hex().encode())
    contents = {
        "cut.parquet": (good[:-20], "magic bytes not found"),
        "half.parquet": (good[: len(good) // 2], "magic bytes not found"),
        "empty.parquet": (b"", "0 bytes"),
        "magic.parquet": (good[:-4] + b"PAR9", "magic bytes not found"),
        "long.parquet": (good[:-8] + b"\xff\xff\xff\x7f" + good[-4:], "footer"),
        "thrift.parquet": (good[: -8 - footer] + bytes(footer) + good[-8:], "thrift"),
        "text.parquet": (b"x,t\n1,u\n", "magic bytes not found"),
        "empty.csv": (b"", "no header"),
        "cut.csv.gz": (packed[:1000], "ended before the end-of-stream marker"),
        "plain.csv.gz": (b"x,t\n1,u\n", "Not a gzipped file"),
        "twice.csv": (b"x,x,t\n1,1,u\n", "column names occur more than once: x"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "gone.csv").symlink_to(folder / "nowhere.csv")
    os.mkfifo(folder / "pipe.csv")
    said = {name: reason for name, (_, reason) in contents.items()}
    return {**said, "gone.csv": "no such file", "pipe.csv": "is not a regular file"}


def test_every_bad_file_is_named_and_the_good_ones_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = damaged_files(tmp_path)
    config = config_of(tmp_path, on_bad_file="skip")
    listing = list_inputs(config)
    caplog.clear()
    files, bad_files = inspect_all(listing, config)
    assert [file.source_file for file in files] == [str(tmp_path / "a_good.parquet")]
    assert [bad.source_file for bad in bad_files] == [str(tmp_path / name) for name in sorted(said)]
    for bad in bad_files:
        assert said[Path(bad.source_file).name].lower() in bad.reason.lower()
        assert bad.num_rows is None
        assert (
            f"input.on_bad_file=skip: {bad.source_file} cannot be read and is left out: {bad.reason}" in caplog.messages
        )
    assert len(caplog.messages) == len(said)
    assert inspect_files(listing, config) == files


def test_fail_names_the_same_files_and_ends_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = damaged_files(tmp_path)
    config = config_of(tmp_path)
    with pytest.raises(InputError) as caught:
        inspect_files(list_inputs(config), config)
    _, bad_files = inspect_all(list_inputs(config), config)
    assert str(caught.value).splitlines() == [
        f"{len(said)} of {len(said) + 1} input files cannot be read; restore or remove these files:",
        *(f"{bad.source_file}: {bad.reason}" for bad in bad_files),
    ]
    assert not caplog.messages


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_nothing_but_bad_files_is_an_error_under_both_policies(tmp_path: Path, policy: str) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.csv").touch()
    config = config_of(tmp_path, on_bad_file=policy)
    for inspect in (inspect_all, inspect_files):
        with pytest.raises(InputError, match=r"^2 of 2 input files cannot be read; restore or remove these files:\n"):
            inspect(list_inputs(config), config)


def test_a_file_that_changes_between_listing_and_inspection_is_bad(tmp_path: Path) -> None:
    for name in ("grown.parquet", "touched.parquet", "good.parquet"):
        put_groups(tmp_path / name, 1)
    config = config_of(tmp_path, on_bad_file="skip")
    listing = list_inputs(config)
    put_groups(tmp_path / "grown.parquet", 2)
    os.utime(tmp_path / "touched.parquet", (1, 1))
    files, bad_files = inspect_all(listing, config)
    assert [Path(file.uri).name for file in files] == ["good.parquet"]
    assert [Path(bad.source_file).name for bad in bad_files] == ["grown.parquet", "touched.parquet"]
    assert all(bad.reason.startswith("changed since it was listed (") for bad in bad_files)


def test_a_footer_whose_counts_disagree_is_bad(tmp_path: Path) -> None:
    put_parquet(tmp_path / "a.parquet", {"x": [0.0]})
    path = put_parquet(tmp_path / "b.parquet", {"x": [1.0, 2.0, 3.0]})
    # Thrift's compact protocol: num_rows is 3 (zigzag 6), the list of row groups follows.
    data = path.read_bytes()
    assert data.count(b"\x16\x06\x19") == 1
    path.write_bytes(data.replace(b"\x16\x06\x19", b"\x16\x08\x19"))
    config = config_of(tmp_path, on_bad_file="skip")
    _, bad_files = inspect_all(list_inputs(config), config)
    assert bad_files == (BadFile(str(path), "its footer says 4 rows, its row groups [3]; rewrite the file", None),)


# --- parquet: row groups


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("bad_groups", [[0], [1], [3], [1, 2], [0, 3], [0, 1, 2, 3]], ids=str)
def test_a_bad_row_group_costs_its_own_rows(
    tmp_path: Path, bad_groups: list[int], block_rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = put_groups(tmp_path / "a.parquet", compression="zstd")
    for group in bad_groups:
        damage(path, *column_bytes(path, group, 1))
    plan = plan_of(path, spec=XT)
    assert [shard.num_rows for shard in plan.shards] == [4 * GROUP_ROWS]
    rows = read(plan, block_rows)
    check_rows(rows, {group * GROUP_ROWS + i for group in bad_groups for i in range(GROUP_ROWS)}, 4 * GROUP_ROWS)
    assert len(caplog.messages) == len(bad_groups)
    for group, message in zip(bad_groups, caplog.messages, strict=True):
        first = group * GROUP_ROWS
        assert message.startswith(f"{path}: rows {first} to {first + GROUP_ROWS - 1} cannot be read: ")
        assert message.endswith("; restore or rewrite the file")
        assert rows[first]["message"] == message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
def test_every_codec(tmp_path: Path, compression: str) -> None:
    path = put_groups(tmp_path / "a.parquet", compression=compression)
    damage(path, *column_bytes(path, 2, 0))
    check_rows(read(plan_of(path, spec=XT)), set(range(200, 300)), 400)


def test_shards_lose_their_own_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoring.shards._SHARD_ROWS", 2 * GROUP_ROWS)
    path = put_groups(tmp_path / "a.parquet", 5)
    damage(path, *column_bytes(path, 3, 0))
    plan = plan_of(path, spec=XT)
    assert len(plan.shards) == 3
    check_rows(read(plan), set(range(300, 400)), 500)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_what_comes_before_a_bad_page_is_kept(tmp_path: Path, num_groups: int) -> None:
    path = tmp_path / "a.parquet"
    columns = {"x": [float(i) for i in range(3000)], "t": [f"text {i * 7919 % 100_003}" for i in range(3000)]}
    pages = {"use_dictionary": False, "data_page_size": 512, "write_batch_size": 50, "compression": "zstd"}
    put_parquet(path, columns, row_group_size=3000 // num_groups, **pages)
    start, end = column_bytes(path, 0, 1)
    damage(path, (start + end) // 2, end)
    rows = read(plan_of(path, spec=XT), block_rows=50)
    lost = {row["source_row"] for row in rows if row["reason"]}
    size = 3000 // num_groups
    assert size // 4 < min(lost) < size * 3 // 4
    check_rows(rows, set(range(min(lost), size)), 3000)


def test_a_column_that_nobody_reads_may_be_damaged(tmp_path: Path) -> None:
    path = put_groups(tmp_path / "a.parquet")
    damage(path, *column_bytes(path, 1, 1))
    rows = read(plan_of(path, spec=X, keep=()))
    assert [(row["source_row"], row["model:x"], row["reason"]) for row in rows] == [
        (i, float(i), None) for i in range(400)
    ]


def test_checksums_are_verified_where_the_file_has_them(tmp_path: Path) -> None:
    path = put_groups(tmp_path / "a.parquet", compression="none", write_page_checksum=True)
    _, end = column_bytes(path, 1, 0)
    damage(path, end - 100, end - 99)  # inside a plain float: any bits are a number
    check_rows(read(plan_of(path, spec=XT)), set(range(100, 200)), 400)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 60),
    st.sampled_from(["none", "snappy", "zstd"]),
    st.booleans(),
    st.sampled_from([1, 64, 1000]),
)
# Their footers, written anew by arrow, ended the process.
@example(1619, 11, "snappy", False, 64)
@example(9643, 7, "snappy", False, 64)
def test_whatever_is_damaged_every_row_is_there_once(
    tmp_path: Path, seed: int, num_bytes: int, compression: str, has_dictionary: bool, block_rows: int
) -> None:
    path = tmp_path / "a.parquet"
    columns = {"x": [float(i) for i in range(300)], "t": [f"text {i % 40}" for i in range(300)], "n": list(range(300))}
    put_parquet(path, columns, row_group_size=100, compression=compression, use_dictionary=has_dictionary)
    dice = random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(num_bytes):
        data[dice.randrange(len(data))] = dice.randrange(256)
    path.write_bytes(data)
    try:
        plan = plan_of(path, spec=XT)
    except InputError:
        return  # the footer is damaged: an unreadable file
    rows = read(plan, block_rows)
    numbers = sorted(row["source_row"] for row in rows)
    assert numbers == list(range(sum(shard.num_rows or 0 for shard in plan.shards)))


def test_a_value_that_python_has_no_name_for_costs_its_row(tmp_path: Path) -> None:
    put_parquet(tmp_path / "a.parquet", {"x": [0.0], "when": ["then"]})
    years = pa.array([datetime(2024, 1, 1), None], pa.timestamp("us")).cast(pa.int64()).to_pylist()
    when = pa.array([years[0], 2**62, years[0], None], pa.int64()).cast(pa.timestamp("us"))
    put_parquet(tmp_path / "b.parquet", {"x": [1.0, 2.0, 3.0, 4.0], "when": when})
    rows = read(plan_of(tmp_path, spec=X))[1:]
    assert [(row["source_row"], row["reason"], row["model:x"]) for row in rows] == [
        (0, None, 1.0),
        (1, "row_malformed", None),
        (2, None, 3.0),
        (3, None, 4.0),
    ]
    assert rows[1]["message"].startswith("holds a value that cannot be handled: ")
    assert rows[0]["keep:when"] == "2024-01-01 00:00:00"


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, AssertionError])
@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_bugs_are_not_bad_files(
    tmp_path: Path, name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put_parquet(tmp_path / name, {"x": [1.0]}) if "parquet" in name else put_csv(tmp_path / name, "x\n1\n")
    plan = plan_of(path, spec=X)

    def fail(*arguments: Any) -> None:
        raise error("a bug")

    monkeypatch.setattr(scoring.reading, "build_block", fail)
    with pytest.raises(error, match="a bug"):
        read(plan)


# --- files that vanish or are replaced after the plan


def vanish(path: Path) -> None:
    path.unlink()


def grow(path: Path) -> None:
    put_groups(path, 5) if path.suffix == ".parquet" else path.write_bytes(path.read_bytes() + b"9,v\n")


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def rewrite(path: Path) -> None:
    """Another file of the same size, written so soon that its time tells nothing."""
    status = path.stat()
    data = path.read_bytes()
    if path.suffix == ".parquet":
        put_parquet(path, {"x": [float(-i) for i in range(400)], "t": ["u"] * 400})
        put_parquet(path, {"x": [1.0]})
        fill = len(data) - path.stat().st_size
        other = path.read_bytes()
        path.write_bytes(other[:4] + bytes(fill) + other[4:])
    else:
        path.write_bytes(data.replace(b"x,t", b"y,t"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def forbid(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES = [
    (vanish, "no such file"),
    (grow, "changed since it was listed ("),
    (touch, "changed since it was listed ("),
    (forbid, "is not a regular file"),
]


@pytest.mark.parametrize(
    ("change", "said"),
    [*CHANGES, (rewrite, "changed since it was listed (another footer); rerun for the file as it is now")],
)
def test_a_parquet_file_that_is_another_one_loses_all_rows(
    tmp_path: Path, change: Callable[[Path], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scoring.shards._SHARD_ROWS", GROUP_ROWS)
    path = put_groups(tmp_path / "a.parquet")
    plan = plan_of(path, spec=XT)
    change(path)
    rows = read(plan, block_rows=30)
    check_rows(rows, set(range(400)), 400)
    assert {row["message"].partition(": ")[2].startswith(said) for row in rows} == {True}


@pytest.mark.parametrize(("change", "said"), [*CHANGES, (rewrite, "Column 'x' in include_columns does not exist")])
def test_a_csv_file_that_is_another_one_is_unreadable(
    tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    path = put_csv(tmp_path / "a.csv", "x,t\n1,u\n")
    plan = plan_of(path, spec=XT)
    change(path)
    with pytest.raises(UnreadableFileError) as caught:
        read(plan)
    assert (caught.value.source_file, caught.value.rows_read) == (str(path), 0)
    assert said in caught.value.reason
    assert str(caught.value) == f"{path}: cannot be read after 0 rows: {caught.value.reason}"


# --- CSV


def csv_rows(plan: InputPlan, block_rows: int = 3) -> tuple[list[tuple[Any, ...]], UnreadableFileError | None]:
    """(number, x, t, reason) of each row before the break, and the break."""
    rows: list[tuple[Any, ...]] = []
    (shard,) = plan.shards
    try:
        for block in read_shard(shard, plan.schema, CsvConfig(), block_rows):
            rows += [(row["source_row"], row["model:x"], row["model:t"], row["reason"]) for row in block.to_pylist()]
    except UnreadableFileError as error:
        return sorted(rows), error
    return sorted(rows), None


class Breaking(io.BytesIO):
    """A file whose device fails at the end of what was written to it."""

    def read1(self, size: int | None = -1, /) -> bytes:
        data = super().read1(size)
        if not data:
            raise OSError(5, "Input/output error")
        return data


TEXT = """x,t
1,one
23,two
only one cell
456,caf\u00e9

-7,"a
b"
nan,"c,""d\"""
8e2,
"9",nine
x,too,many
0.5,end
"""


@pytest.mark.parametrize("block_bytes", [32, 2**20])
def test_wherever_a_csv_file_breaks_whole_records_come_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    path = put_csv(tmp_path / "a.csv", TEXT)
    plan = plan_of(path, spec=XT)
    whole, error = csv_rows(plan)
    assert error is None
    assert [row[0] for row in whole] == list(range(10))
    monkeypatch.setattr(scoring.csv_records, "_BLOCK_BYTES", block_bytes)
    data = TEXT.encode()
    most = 0
    for size in range(len(data) + 1):
        monkeypatch.setattr(scoring.csv_records, "open_csv_text", lambda _, size=size: Breaking(data[:size]))
        rows, error = csv_rows(plan)
        assert error is not None
        assert (error.source_file, error.rows_read) == (str(path), len(rows))
        assert error.reason == "Input/output error; restore or remove the file"
        assert rows == whole[: len(rows)]
        most = max(most, len(rows))
        # Nothing but the record that breaks off is given up.
        num_records = len([1 for record in csv.reader(io.StringIO(data[:size].decode(errors="replace"))) if record]) - 1
        assert len(rows) >= num_records - 1
    assert most == 9


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("block_bytes", [2**16, 2**25])
def test_a_gzip_file_that_is_cut_gives_what_was_before(
    tmp_path: Path, share: float, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring.csv_records, "_BLOCK_BYTES", block_bytes)
    lines = [f"{i},{random.Random(i).randbytes(20).hex()}" for i in range(40_000)]
    text = "\n".join(["x,t", *lines]) + "\n"
    packed = gzip.compress(text.encode(), compresslevel=1)
    path = tmp_path / "a.csv.gz"
    path.write_bytes(packed[: int(len(packed) * share)])
    rows, error = csv_rows(plan_of(path, spec=XT), block_rows=1000)
    assert error is not None
    assert error.rows_read == len(rows)
    assert error.reason == (
        "Compressed file ended before the end-of-stream marker was reached; restore or remove the file"
    )
    assert len(rows) == pytest.approx(40_000 * share, rel=0.05)
    assert rows == [(i, float(i), lines[i].partition(",")[2], None) for i in range(len(rows))]


def test_records_behind_an_overlong_one_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The parser is a block ahead: it knows of malformed records whose good neighbours it never hands out.
    lines = ["0,u", "bad", *[f"{i},v" for i in range(2, 60)], "bad", f"60,{'w' * 500}", "61,z"]
    path = put_csv(tmp_path / "a.csv", "\n".join(["x,t", *lines]))
    plan = plan_of(path, spec=XT)
    monkeypatch.setattr(scoring.csv_records, "_BLOCK_BYTES", 128)
    rows, error = csv_rows(plan)
    assert error is not None
    assert "a record is longer than 128 bytes, or a quote is never closed; repair the file" in error.reason
    assert error.rows_read == len(rows)
    assert [row[0] for row in rows] == list(range(len(rows)))
    assert len(rows) > 10


def test_the_error_survives_its_way_to_the_driver() -> None:
    error = pickle.loads(pickle.dumps(UnreadableFileError("/d/a.csv", "Input/output error", 7)))
    assert (error.source_file, error.reason, error.rows_read) == ("/d/a.csv", "Input/output error", 7)
    assert str(error) == "/d/a.csv: cannot be read after 7 rows: Input/output error"


# --- stores that falter


class Faltering(io.BytesIO):
    """A store's file whose reads fail while `faults` has some; every other call is served."""

    def __init__(self, data: bytes, faults: Iterator[Exception]) -> None:
        super().__init__(data)
        self.size = len(data)
        self._faults = faults

    def read(self, size: int | None = -1, /) -> bytes:
        fault = next(self._faults, None)
        if fault is not None:
            super().read(10)  # such a stream may have moved
            raise fault
        return super().read(size)


class DriverError(Exception):
    """An error of a driver's library, no OSError."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} for https://key:hush@host/a?sig=hush")
        self.status = status


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("scoring.opening.time.sleep", waited.append)
    return waited


@pytest.fixture(params=["a.parquet", "a.csv", "a.csv.gz"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[InputPlan, bytes]:
    """The plan of a file in a store, and its bytes."""
    name = str(request.param)
    if name == "a.parquet":
        local = put_groups(tmp_path / name)
    else:
        lines = [f"{i},text {i * 7919 % 100_003}" for i in range(400)]
        local = put_csv(tmp_path / name, "\n".join(["x,t", *lines]))
    uri = f"memory://{uuid.uuid4().hex}/{name}"
    write_bytes(uri, local.read_bytes())
    return plan_of(uri, spec=XT), local.read_bytes()


def serve(monkeypatch: pytest.MonkeyPatch, data: bytes, *faults: Exception) -> None:
    left = iter(faults)
    monkeypatch.setattr(scoring.opening, "open_input", lambda uri: Faltering(data, left))


def test_reads_are_tried_three_times(
    stored: tuple[InputPlan, bytes],
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan, data = stored
    serve(monkeypatch, data, DriverError(503), TimeoutError("slow"))
    check_rows(sorted(read(plan), key=lambda row: row["source_row"]), set(), 400)
    assert waits == [1.0, 2.0]
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "503 for https://host/a; reading it again in 1 s",
        "slow; reading it again in 2 s",
    ]


def test_opening_is_tried_three_times(
    stored: tuple[InputPlan, bytes], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, data = stored
    faults = iter([ConnectionResetError("reset"), DriverError(429)])

    def open_shakily(uri: str) -> io.BytesIO:
        fault = next(faults, None)
        if fault is not None:
            raise fault
        return Faltering(data, iter(()))

    monkeypatch.setattr(scoring.opening, "open_input", open_shakily)
    check_rows(sorted(read(plan), key=lambda row: row["source_row"]), set(), 400)
    assert waits == [1.0, 2.0]


def test_a_store_that_stays_away_makes_a_bad_file(
    stored: tuple[InputPlan, bytes], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, data = stored
    serve(monkeypatch, data, *[DriverError(503)] * 100)
    said = "DriverError: 503 for https://host/a (try 3 of 3)"
    if plan.has_exact_rows:
        rows = read(plan)
        check_rows(rows, set(range(400)), 400)
        assert rows[0]["message"] == f"rows 0 to 399 cannot be read: {said}; restore or rewrite the file"
    else:
        rows_before, error = csv_rows(plan)
        assert error is not None
        assert (rows_before, error.reason) == ([], f"{said}; restore or remove the file")
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (DriverError(403), "DriverError: 403 for https://host/a (try 1 of 3)"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (FileNotFoundError("bucket/a"), "no such file"),
    ],
)
def test_a_refusal_is_not_tried_again(
    fault: Exception, said: str, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"memory://{uuid.uuid4().hex}/a.parquet"
    data = put_groups(tmp_path / "a.parquet").read_bytes()
    write_bytes(uri, data)
    plan = plan_of(uri, spec=XT)
    serve(monkeypatch, data, fault)
    rows = read(plan)
    check_rows(rows, set(range(400)), 400)
    assert rows[0]["message"] == f"rows 0 to 399 cannot be read: {said}; restore or rewrite the file"
    assert waits == []


def test_a_corrupt_file_in_a_store_is_read_once(tmp_path: Path, waits: list[float]) -> None:
    local = put_groups(tmp_path / "a.parquet")
    damage(local, *column_bytes(local, 1, 0))
    uri = f"memory://{uuid.uuid4().hex}/a.parquet"
    write_bytes(uri, local.read_bytes())
    check_rows(read(plan_of(uri, spec=XT)), set(range(100, 200)), 400)
    assert waits == []


def test_a_file_replaced_in_a_store_loses_all_rows(tmp_path: Path, waits: list[float]) -> None:
    uri = f"memory://{uuid.uuid4().hex}/a.parquet"
    write_bytes(uri, put_groups(tmp_path / "a.parquet").read_bytes())
    plan = plan_of(uri, spec=XT)
    write_bytes(uri, put_groups(tmp_path / "b.parquet", 5).read_bytes())
    rows = read(plan)
    check_rows(rows, set(range(400)), 400)
    assert "changed since it was listed (" in rows[0]["message"]
    assert waits == []


def test_a_file_replaced_while_it_is_read_is_not_mixed_with_the_new_one(
    stored: tuple[InputPlan, bytes], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, data = stored
    versions = iter([data, data + b"9,v\n"])
    faults = iter([DriverError(503)])
    monkeypatch.setattr(scoring.opening, "open_input", lambda uri: Faltering(next(versions), faults))
    said = "changed while it was read; rerun for the file as it is now"
    if plan.has_exact_rows:
        rows = read(plan)
        check_rows(rows, set(range(400)), 400)
        assert rows[0]["message"] == f"rows 0 to 399 cannot be read: {said}"
    else:
        rows_before, error = csv_rows(plan)
        assert error is not None
        assert (rows_before, error.reason) == ([], said)
    assert waits == [1.0]


def test_a_local_file_is_never_tried_again(tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_csv(tmp_path / "a.csv", "x,t\n1,u\n")
    plan = plan_of(path, spec=XT)
    monkeypatch.setattr(scoring.csv_records, "open_csv_text", lambda _: Breaking(b"x,t\n1,u\n2,"))
    rows, error = csv_rows(plan)
    assert error is not None
    assert rows == [(0, 1.0, "u", None)]
    assert waits == []


def test_a_missing_driver_is_a_matter_of_configuration(waits: list[float]) -> None:
    config = config_of("nowhere://b/a.parquet")
    with pytest.raises(scoring.errors.ConfigError, match="no driver for nowhere://"):
        inspect_all([ListedFile("nowhere://b/a.parquet", 1, "1")], config)
    assert waits == []


def test_skipped_files_do_not_stop_the_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_parquet(tmp_path / "a.parquet", {"x": [1.0], "t": ["text 0"]})
    (tmp_path / "b.parquet").touch()
    config = config_of(tmp_path, on_bad_file="skip")
    with caplog.at_level(logging.WARNING):
        files, bad_files = inspect_all(list_inputs(config), config)
    plan = plan_inputs(files, XT, config, RESERVED)
    assert [row["model:x"] for row in read(plan)] == [1.0]
    assert [Path(bad.source_file).name for bad in bad_files] == ["b.parquet"]
