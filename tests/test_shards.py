"""Inputs to shards: listing, inspection, the schema check across files, kept columns, and the cutting."""

import base64
import gzip
import logging
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scoring.opening
from scoring.columns import KeptColumn, ModelColumn
from scoring.config import DEFAULT_NULL_VALUES, CsvConfig, InputConfig
from scoring.errors import ConfigError, InputError
from scoring.shards import (
    InputPlan,
    SourceFile,
    cut_shards,
    footer_digest,
    inspect_files,
    list_inputs,
    partition_keys,
    plan_inputs,
)
from scoring.spec import (
    CategoricalColumn,
    CategoryKind,
    FeatureSpec,
    ImageColumn,
    NumericalColumn,
    TextColumn,
)
from scoring.storage import write_bytes

RESERVED = ("source_file", "source_row", "stage", "reason", "message", "proba_a", "prediction")


def spec_of(
    *,
    numbers: Sequence[str] = (),
    categories: Sequence[tuple[str, CategoryKind]] = (),
    texts: Sequence[str] = (),
    images: Sequence[str] = (),
) -> FeatureSpec:
    """A predictor's columns; how they are scaled or encoded is no matter of reading."""
    return FeatureSpec(
        label="label",
        problem_type="regression",
        class_labels=(),
        numerical=tuple(NumericalColumn(name, 0.0, None, None) for name in numbers),
        categorical=tuple(CategoricalColumn(name, kind, (), 0) for name, kind in categories),
        text=tuple(TextColumn(name) for name in texts),
        image=tuple(ImageColumn(name, "image_path") for name in images),
        numerical_models=(),
        categorical_models=(),
        text_models=(),
        image_models=(),
        skip_missing=False,
    )


def plan_of(*paths: str | Path, spec: FeatureSpec, csv: CsvConfig | None = None, **settings: Any) -> InputPlan:
    config = InputConfig(paths=tuple(map(str, paths)), csv=csv or CsvConfig(), **settings)
    return plan_inputs(inspect_files(list_inputs(config), config), spec, config, RESERVED)


def listed(*paths: str | Path, **settings: Any) -> list[str]:
    return [file.uri for file in list_inputs(InputConfig(paths=tuple(map(str, paths)), **settings))]


def inspected(*paths: str | Path, **settings: Any) -> tuple[SourceFile, ...]:
    config = InputConfig(paths=tuple(map(str, paths)), **settings)
    return inspect_files(list_inputs(config), config)


def put_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def put_csv(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.name.lower().endswith(".gz") else text.encode())
    return path


X = spec_of(numbers=("x",))


# --- listing


def test_suffixes_decide_what_is_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["a.parquet", "b.pq", "c.csv", "d.csv.gz", "E.CSV", "f.PARQUET", "g.CSV.GZ"]
    for name in [*names, "readme.md", "h.gz", "parquet", "_hidden.csv", ".tmp.csv"]:
        (tmp_path / name).touch()
    with caplog.at_level(logging.INFO):
        assert listed(tmp_path) == [str(tmp_path / name) for name in sorted(names)]
    assert f"input.paths: {tmp_path}: 3 other files ignored" in caplog.messages


def test_every_suffix_is_read_as_what_it_says(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.pq", "f.PARQUET"):
        put_parquet(tmp_path / name, {"x": [1, 2]})
    for name in ("c.csv", "d.csv.gz", "g.CSV.GZ"):
        put_csv(tmp_path / name, "x,y\n1,2\n")
    files = {Path(file.uri).name: file for file in inspected(tmp_path)}
    assert {name: file.format for name, file in files.items()} == {
        **dict.fromkeys(("a.parquet", "b.pq", "f.PARQUET"), "parquet"),
        **dict.fromkeys(("c.csv", "d.csv.gz", "g.CSV.GZ"), "csv"),
    }
    assert all(file.columns == {"x": pa.string(), "y": pa.string()} for file in files.values() if file.format == "csv")
    assert {file.num_rows for file in files.values() if file.format == "csv"} == {1}
    assert files["b.pq"].columns == {"x": pa.int64()}
    assert files["b.pq"].row_groups[0][0] == files["b.pq"].num_rows == 2
    assert files["b.pq"].size_bytes == (tmp_path / "b.pq").stat().st_size


def test_named_format_reads_files_without_suffix(tmp_path: Path) -> None:
    put_csv(tmp_path / "part-0", "x\n1\n")
    put_csv(tmp_path / "part-1.gz", "x\n1\n")
    assert [file.columns for file in inspected(tmp_path, format="csv")] == [{"x": pa.string()}] * 2


def test_globs_files_and_folders_together_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/1.csv", "a/2.csv", "b/deep/3.parquet", "4.csv"):
        put_csv(tmp_path / name, "x\n")
    everything = [str(tmp_path / name) for name in ("4.csv", "a/1.csv", "a/2.csv", "b/deep/3.parquet")]
    assert listed(tmp_path / "4.csv", tmp_path / "a", tmp_path / "**" / "*.parquet") == everything
    assert listed(tmp_path / "a" / "[12].csv") == everything[1:3]
    assert not caplog.messages
    assert listed(tmp_path, tmp_path / "a" / "1.csv", f"file://{tmp_path}/4.csv") == everything
    assert caplog.messages == [
        f"input.paths: {tmp_path}/a/1.csv is named more than once; it is read once",
        f"input.paths: {tmp_path}/4.csv is named more than once; it is read once",
    ]


def test_local_names_are_absolute_and_links_not_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_csv(tmp_path / "real" / "a.csv", "x\n1\n")
    os.symlink(tmp_path / "real", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    assert [file.source_file for file in inspected("link/a.csv")] == [f"{tmp_path}/link/a.csv"]


def test_object_store_uris(caplog: pytest.LogCaptureFixture) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    write_bytes(f"{root}/in/country=at/a.csv", b"x\n1\n")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1, 2, 3]}), sink, row_group_size=2)
    write_bytes(f"{root}/in/country=at/b.parquet", sink.getvalue().to_pybytes())
    plan = plan_of(f"{root}/in", f"{root}/in/country=at/*.csv", spec=X)
    assert [file.source_file for file in plan.files] == [
        f"{root}/in/country=at/a.csv",
        f"{root}/in/country=at/b.parquet",
    ]
    assert [file.partition for file in plan.files] == [{"country": "at"}] * 2
    assert [rows for rows, _ in plan.files[1].row_groups] == [2, 1]
    assert caplog.messages == [f"input.paths: {root}/in/country=at/a.csv is named more than once; it is read once"]


def test_inputs_that_match_nothing_are_all_named(tmp_path: Path) -> None:
    put_csv(tmp_path / "ok.csv", "x\n1\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "notes.txt").touch()
    remote = f"memory://{uuid.uuid4().hex}/none"
    with pytest.raises(InputError) as caught:
        listed(tmp_path / "ok.csv", tmp_path / "no*.csv", tmp_path / "docs", remote)
    assert str(caught.value).splitlines() == [
        f"input {tmp_path}/no*.csv: matches no file; give a file, a folder, a glob or a URI of .parquet, .pq, .csv, "
        ".csv.gz files",
        f"input {tmp_path}/docs: 1 files, none of them .parquet, .pq, .csv, .csv.gz (first: {tmp_path}/docs/notes.txt); "
        "set input.format if they are parquet or CSV under another name",
        f"input {remote}: matches no file; give a file, a folder, a glob or a URI of .parquet, .pq, .csv, .csv.gz files",
    ]


def test_files_that_only_a_query_tells_apart_are_refused() -> None:
    # Their rows would share source_file and source_row. memory:// takes the query as part of the name.
    root = f"memory://{uuid.uuid4().hex}"
    write_bytes(f"{root}/a.csv?v=1", b"x\n1\n")
    assert listed(f"{root}/a.csv?v=1") == [f"{root}/a.csv?v=1"]
    write_bytes(f"{root}/a.csv?v=2", b"x\n1\n2\n")
    with pytest.raises(
        InputError, match="stands for different files once credentials and queries are left out"
    ) as caught:
        listed(f"{root}/a.csv?v=1", f"{root}/a.csv?v=2")
    assert f"{root}/a.csv" in str(caught.value)
    assert "?v" not in str(caught.value)


# --- partitions


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/d/country=at/year=2024/a.csv", {"country": "at", "year": "2024"}),
        ("/d/city=S%C3%A3o%20Paulo%2FSP/a.csv", {"city": "S\u00e3o Paulo/SP"}),
        ("/d/k=__HIVE_DEFAULT_PARTITION__/a.csv", {"k": None}),
        ("/d/k=/a.csv", {"k": ""}),
        ("/d/k=a=b/a.csv", {"k": "a=b"}),
        ("/d/=v/plain/k=1.csv", {}),
        ("s3://key:k=v@bucket/k=2/a.csv", {"k": "2"}),
    ],
)
def test_partition_keys(path: str, keys: dict[str, str | None]) -> None:
    assert partition_keys(path) == keys


def test_partition_keys_are_columns_unless_the_file_has_them(tmp_path: Path) -> None:
    put_csv(tmp_path / "x=5" / "country=at" / "a.csv", "y\n1\n")
    put_csv(tmp_path / "x=5" / "country=de" / "b.csv", "y,country\n1,ch\n")
    plan = plan_of(tmp_path, spec=X)
    assert plan.schema.kept == (KeptColumn("country", pa.string()), KeptColumn("y", pa.string()))
    assert plan.schema.model == (ModelColumn("x", "number", pa.float64()),)
    assert [file.is_text("country") for file in plan.files] == [True, True]


# --- inspection


def test_files_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    good = put_parquet(tmp_path / "good.parquet", {"x": list(range(1000))}).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "text.parquet").write_text("x,y\n1,2\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "blank.csv").write_text("\n\n")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    packed = gzip.compress(os.urandom(5000).hex().encode())
    (tmp_path / "cut.csv.gz").write_bytes(packed[:2000])
    (tmp_path / "bent.csv.gz").write_bytes(packed[:10] + b"\xff" * 50 + packed[60:])
    (tmp_path / "plain.csv.gz").write_text("x\n1\n")
    with pytest.raises(InputError) as caught:
        inspected(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "9 of 10 input files cannot be read; restore or remove these files:"
    named = [Path(line.partition(": ")[0]).name for line in lines[1:]]
    assert named == sorted(path.name for path in tmp_path.iterdir() if path.name != "good.parquet")
    reasons = dict(zip(named, (line.partition(": ")[2] for line in lines[1:]), strict=True))
    assert reasons["empty.csv"] == "no header; an empty CSV file has a header line and no rows"
    assert reasons["blank.csv"] == reasons["empty.csv"]
    assert "Not a gzipped file" in reasons["plain.csv.gz"]
    assert "while decompressing data" in reasons["bent.csv.gz"]
    assert all(reasons.values())


def test_reasons_do_not_tell_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> None:
        raise OSError(f"403 for https://user:{'hush' * 100}@host/{uri}?sig=hush")

    monkeypatch.setattr(scoring.opening, "open_input", fail)
    with pytest.raises(InputError, match="403 for https://host/") as caught:
        inspected(put_csv(tmp_path / "a.csv", "x\n"))
    assert "hush" not in str(caught.value)


def test_columns_that_occur_twice_are_refused(tmp_path: Path) -> None:
    put_csv(tmp_path / "a.csv", "x,y,x,z,y\n1,2,3,4,5\n")
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(InputError) as caught:
        inspected(tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        f"{tmp_path}/a.csv: column names occur more than once: x, y",
        f"{tmp_path}/b.parquet: column names occur more than once: x",
    ]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("x,y\n1,2\n", ["x", "y"]),
        ("\ufeffx,y\r\n1,2\r\n", ["x", "y"]),
        ('\ufeff"x","y"\n', ["x", "y"]),
        ("\n\r\n\nx,y\n1,2\n", ["x", "y"]),
        ('"a\nb","c,d","e""f"\n', ["a\nb", "c,d", 'e"f']),
        (",x\n0,1\n", ["", "x"]),
        (" x ,\u00fc\n", [" x ", "\u00fc"]),
        ("x", ["x"]),
    ],
)
def test_csv_headers(tmp_path: Path, text: str, names: list[str]) -> None:
    (file,) = inspected(put_csv(tmp_path / "a.csv", text))
    assert list(file.columns) == names


def test_csv_header_in_the_wrong_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("gr\u00f6\u00dfe\n1\n".encode("cp1252"))
    with pytest.raises(InputError, match="the header is no utf-8 text") as caught:
        inspected(path)
    assert "set input.csv.encoding" in str(caught.value)
    assert list(inspected(path, csv=CsvConfig(encoding="cp1252"))[0].columns) == ["gr\u00f6\u00dfe"]


def test_csv_with_an_image_in_base64_is_read(tmp_path: Path) -> None:
    # The csv module's own limit is 131,072 characters a field.
    image = base64.b64encode(bytes(150_000)).decode()
    (file,) = inspected(put_csv(tmp_path / "a.csv", f"photo,x\n{image},1\n"))
    assert (list(file.columns), file.num_rows) == (["photo", "x"], 1)


def test_csv_rows_are_estimated_from_bytes(tmp_path: Path) -> None:
    num_rows = 100_000
    (file,) = inspected(put_csv(tmp_path / "a.csv", "x,y\n" + "12345,67890\n" * num_rows))
    assert file.num_rows == pytest.approx(num_rows, rel=0.01)
    (small,) = inspected(put_csv(tmp_path / "b.csv", "x,y\n" + "1,2\n\n" * 7))
    assert small.num_rows == 7


def test_files_without_rows_are_fine(tmp_path: Path) -> None:
    put_csv(tmp_path / "a.csv", "x,y\n")
    put_parquet(tmp_path / "b.parquet", {"x": pa.array([], pa.float64())})
    with pq.ParquetWriter(tmp_path / "c.parquet", pa.schema([("x", pa.int32())])):
        pass  # no row group at all
    plan = plan_of(tmp_path, spec=X)
    assert plan.files[2].row_groups == ()
    assert [(shard.first_row, shard.num_rows) for shard in plan.shards] == [(0, None), (0, 0), (0, 0)]
    assert plan.estimated_rows == 0
    assert not plan.has_exact_rows
    assert plan_of(tmp_path / "[bc].parquet", spec=X).has_exact_rows


# --- columns against the predictor


def test_missing_columns_name_every_file(tmp_path: Path) -> None:
    put_csv(tmp_path / "a.csv", "x,z\n1,2\n")
    put_parquet(tmp_path / "b.parquet", {"y": [1], "z": [2]})
    put_csv(tmp_path / "c.csv", "y,x\n1,2\n")
    put_csv(tmp_path / "d.csv", "p,q\n1,2\n")
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, spec=spec_of(numbers=("x", "y")))
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/a.csv: column 'y' missing, the predictor reads it; the file has: x, z. Rename or add the column",
        f"{tmp_path}/b.parquet: column 'x' missing, the predictor reads it; the file has: y, z. Rename or add the column",
        f"{tmp_path}/d.csv: columns 'x', 'y' missing, the predictor reads them; the file has: p, q. Rename or add the column",
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_columns_are_never_taken_by_position(tmp_path: Path, name: str) -> None:
    # Upstream renames columns silently when their count matches.
    path = tmp_path / name
    if name.endswith("csv"):
        put_csv(path, "X,why\n1,2\n")
    else:
        put_parquet(path, {"X": [1.0], "why": [2.0]})
    with pytest.raises(InputError, match=re.escape("columns 'x', 'y' missing")):
        plan_of(path, spec=spec_of(numbers=("x", "y")))


def test_canonical_types_do_not_depend_on_the_file(tmp_path: Path) -> None:
    spec = spec_of(
        numbers=("n",), categories=(("c", "string"), ("k", "number"), ("b", "bool")), texts=("t",), images=("p",)
    )
    put_csv(tmp_path / "a.csv", "n,c,k,b,t,p\n1,u,2,True,hi,a.jpg\n")
    columns = {"n": pa.array([1], pa.int8()), "c": ["u"], "k": [2], "b": [True], "t": [5], "p": ["a.jpg"]}
    put_parquet(tmp_path / "b.parquet", columns)
    decoded = {
        "n": pa.array(["1"]).dictionary_encode(),
        "c": pa.array(["u"], pa.large_string()),
        "k": pa.array([2.0], pa.float32()),
        "b": pa.nulls(1),
        "t": pa.nulls(1),
        "p": pa.nulls(1),
    }
    put_parquet(tmp_path / "c.parquet", decoded)
    expected = (
        ModelColumn("p", "image", pa.string()),
        ModelColumn("t", "text", pa.string()),
        ModelColumn("n", "number", pa.float64()),
        ModelColumn("c", "category", pa.string()),
        ModelColumn("k", "category", pa.float64()),
        ModelColumn("b", "category", pa.bool_()),
    )
    for pattern in ("*", "a.csv", "b.parquet"):
        assert plan_of(tmp_path / pattern, spec=spec).schema.model == expected
    assert plan_of(tmp_path / "a.csv", spec=spec).schema.null_values == DEFAULT_NULL_VALUES


def test_columns_of_nulls_alone_fit_every_role(tmp_path: Path) -> None:
    spec = spec_of(numbers=("n",), categories=(("c", "string"), ("k", "number"), ("b", "bool")), images=("p",))
    path = put_parquet(tmp_path / "a.parquet", {name: pa.nulls(2) for name in "nckbp"})
    types = {column.name: column.type for column in plan_of(path, spec=spec).schema.model}
    assert types == {"n": pa.float64(), "c": pa.string(), "k": pa.float64(), "b": pa.bool_(), "p": pa.string()}


@pytest.mark.parametrize(
    ("spec", "cells", "kind", "role"),
    [
        (spec_of(categories=(("x", "number"),)), ["1"], "string", "category"),
        (spec_of(categories=(("x", "number"),)), [True], "bool", "category"),
        (spec_of(categories=(("x", "string"),)), [1], "int64", "category"),
        (spec_of(categories=(("x", "bool"),)), ["True"], "string", "category"),
        (spec_of(numbers=("x",)), [[1.0]], "list<", "number"),
        (spec_of(numbers=("x",)), pa.array([0], pa.date32()), "date32", "number"),
        (spec_of(texts=("x",)), [b"a"], "binary", "text"),
        (spec_of(texts=("x",)), [["a"]], "list<", "text"),
        (spec_of(images=("x",)), [1], "int64", "image"),
    ],
)
def test_types_that_do_not_fit_name_every_file(
    tmp_path: Path, spec: FeatureSpec, cells: Any, kind: str, role: str
) -> None:
    put_parquet(tmp_path / "a.parquet", {"x": cells})
    put_csv(tmp_path / "b.csv", "x\n1\n")
    put_parquet(tmp_path / "c.parquet", {"x": cells})
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, spec=spec)
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{tmp_path}/a.parquet", f"{tmp_path}/c.parquet"]
    for line in lines:
        assert f": column 'x' is {kind}" in line
        assert line.endswith(f"the predictor was fitted on a {role} of another type; cast it")


def test_types_that_disagree_name_every_file(tmp_path: Path) -> None:
    put_parquet(tmp_path / "a.parquet", {"p": ["a.jpg"], "x": [1]})
    put_parquet(tmp_path / "b.parquet", {"p": [b"\xff"], "x": [1]})
    put_csv(tmp_path / "c.csv", "p,x\na.jpg,1\n")
    put_parquet(tmp_path / "d.parquet", {"p": [["a.jpg"]], "x": [1]})
    put_parquet(tmp_path / "e.parquet", {"p": pa.nulls(1), "x": [[1]]})
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, spec=spec_of(numbers=("x",), images=("p",)))
    images, numbers = str(caught.value).splitlines()
    assert re.fullmatch(
        f"column 'p' is string in {tmp_path}/a.parquet, {tmp_path}/c.csv but binary in {tmp_path}/b.parquet but "
        f"list<.*string> in {tmp_path}/d.parquet; cast it to one type",
        images,
    )
    assert numbers.startswith(f"{tmp_path}/e.parquet: column 'x' is list<")


# --- kept columns


def kept_of(*paths: str | Path, spec: FeatureSpec = X, **settings: Any) -> dict[str, pa.DataType]:
    return {column.name: column.type for column in plan_of(*paths, spec=spec, **settings).schema.kept}


def test_default_keeps_what_the_predictor_does_not_read_in_the_first_files_order(tmp_path: Path) -> None:
    put_parquet(tmp_path / "a.parquet", {"id": [1], "x": [1], "b": ["u"]})
    put_parquet(tmp_path / "b.parquet", {"c": [1.5], "b": ["u"], "x": [1], "id": [1]})
    assert list(kept_of(tmp_path)) == ["id", "b", "c"]
    assert kept_of(tmp_path, keep=()) == {}
    assert list(kept_of(tmp_path, keep=("c", "x", "id"))) == ["c", "x", "id"]


def test_default_never_keeps_bytes(tmp_path: Path) -> None:
    hugging_face = pa.array(
        [{"bytes": b"\xff", "path": "a"}], pa.struct({"bytes": pa.large_binary(), "path": pa.string()})
    )
    columns = {
        "x": [1],
        "raw": [b"a"],
        "large": pa.array([b"a"], pa.large_binary()),
        "fixed": pa.array([b"abc"], pa.binary(3)),
        "listed": [[b"a"]],
        "packed": hugging_face,
        "coded": pa.array([b"a"]).dictionary_encode(),
        "sometimes": ["text"],
        "words": [["a"]],
    }
    put_parquet(tmp_path / "a.parquet", columns)
    put_parquet(tmp_path / "b.parquet", {**columns, "sometimes": [b"bytes"]})
    assert list(kept_of(tmp_path)) == ["words"]
    assert kept_of(tmp_path, keep=("raw",)) == {"raw": pa.binary()}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (pa.int8(), pa.int64(), pa.int64()),
        (pa.uint32(), pa.int8(), pa.int64()),
        (pa.uint64(), pa.uint64(), pa.uint64()),
        (pa.uint64(), pa.int8(), pa.string()),
        (pa.int32(), pa.float32(), pa.float64()),
        (pa.float32(), pa.float32(), pa.float32()),
        (pa.int32(), pa.null(), pa.int32()),
        (pa.null(), pa.null(), pa.string()),
        (pa.int32(), pa.string(), pa.string()),
        (pa.bool_(), pa.int8(), pa.string()),
        (pa.timestamp("us"), pa.date32(), pa.string()),
        (pa.large_string(), pa.string(), pa.string()),
        (pa.dictionary(pa.int32(), pa.string()), pa.string(), pa.string()),
        (pa.list_(pa.int8()), pa.list_(pa.int8()), pa.list_(pa.int8())),
    ],
)
def test_kept_columns_share_one_type(
    tmp_path: Path, first: pa.DataType, second: pa.DataType, expected: pa.DataType, caplog: pytest.LogCaptureFixture
) -> None:
    put_parquet(tmp_path / "a.parquet", {"x": [1], "k": pa.nulls(1, first)})
    put_parquet(tmp_path / "b.parquet", {"x": [1], "k": pa.nulls(1, second)})
    assert kept_of(tmp_path) == {"k": expected}
    is_warned = expected == pa.string() and {first, second} not in (
        {pa.null()},
        {pa.large_string(), pa.string()},
        {pa.dictionary(pa.int32(), pa.string()), pa.string()},
    )
    assert [message for message in caplog.messages if "it is kept as text" in message] == (
        [f"input.keep: column 'k' is {sorted(map(str, (first, second)))} in different files; it is kept as text"]
        if is_warned
        else []
    )


def test_unknown_kept_columns_are_refused(tmp_path: Path) -> None:
    put_csv(tmp_path / "a.csv", "x,id\n1,2\n")
    with pytest.raises(ConfigError) as caught:
        kept_of(tmp_path, keep=("id", "ID", "nothing"))
    assert str(caught.value) == "input.keep: ID, nothing in no input file; they have: x, id"


@pytest.mark.parametrize("keep", [None, ("id", "prediction", "source_row")])
def test_kept_columns_named_like_output_columns_are_refused(tmp_path: Path, keep: tuple[str, ...] | None) -> None:
    put_csv(tmp_path / "a.csv", "x,id,prediction,source_row\n1,2,3,4\n")
    with pytest.raises(ConfigError, match=r"^input\.keep: prediction, source_row would collide with output columns"):
        kept_of(tmp_path, keep=keep)
    assert list(kept_of(tmp_path, keep=("id",))) == ["id"]


def test_a_model_column_named_like_an_output_column_is_no_collision(tmp_path: Path) -> None:
    put_csv(tmp_path / "a.csv", "prediction,id\n1,2\n")
    assert list(kept_of(tmp_path, spec=spec_of(numbers=("prediction",)))) == ["id"]


# --- cutting


def source_file(row_groups: Sequence[tuple[int, int]], name: str = "/d/a.parquet") -> SourceFile:
    num_rows = sum(rows for rows, _ in row_groups)
    return SourceFile(name, name, 1, "1", "parquet", {}, {}, num_rows, tuple(row_groups))


groups = st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 100 * 2**20)), max_size=12)


@given(st.lists(groups, max_size=4))
def test_shards_cover_every_row_group_exactly_once(files: list[list[tuple[int, int]]]) -> None:
    shards = cut_shards([source_file(row_groups, f"/d/{i}.parquet") for i, row_groups in enumerate(files)])
    assert [shard.index for shard in shards] == list(range(len(shards)))
    for i, row_groups in enumerate(files):
        own = [shard for shard in shards if shard.file.uri == f"/d/{i}.parquet"]
        assert own
        assert [group for shard in own for group in shard.row_groups] == list(range(len(row_groups)))
        next_row = 0
        for shard in own:
            assert shard.first_row == next_row
            assert shard.num_rows == sum(row_groups[group][0] for group in shard.row_groups)
            next_row += shard.num_rows
            is_one_group = len(shard.row_groups) <= 1
            assert is_one_group or shard.num_rows <= 16_384
            assert is_one_group or sum(row_groups[group][1] for group in shard.row_groups) <= 64 * 2**20
        assert next_row == sum(rows for rows, _ in row_groups)


def test_row_groups_are_joined_up_to_a_shards_rows_and_bytes() -> None:
    rows = cut_shards([source_file([(10_000, 1), (6_384, 1), (1, 1), (20_000, 1), (5, 1)])])
    assert [shard.row_groups for shard in rows] == [(0, 1), (2,), (3,), (4,)]
    mib = 2**20
    size = cut_shards([source_file([(1, 40 * mib), (1, 24 * mib), (1, mib), (1, 100 * mib)])])
    assert [shard.row_groups for shard in size] == [(0, 1), (2,), (3,)]


def test_partitions_and_mixed_formats_make_one_plan(tmp_path: Path) -> None:
    put_csv(tmp_path / "day=1" / "a.csv", "x,note\n1,hi\n")
    put_parquet(tmp_path / "day=2" / "b.parquet", {"x": range(5), "note": ["n"] * 5}, row_group_size=2)
    put_parquet(tmp_path / "day=__HIVE_DEFAULT_PARTITION__" / "c.pq", {"x": [1.5], "note": pa.nulls(1)})
    plan = plan_of(tmp_path, spec=X)
    assert plan.schema.model == (ModelColumn("x", "number", pa.float64()),)
    assert plan.schema.kept == (KeptColumn("day", pa.string()), KeptColumn("note", pa.string()))
    assert [(shard.index, shard.first_row, shard.num_rows, shard.row_groups) for shard in plan.shards] == [
        (0, 0, None, ()),
        (1, 0, 5, (0, 1, 2)),
        (2, 0, 1, (0,)),
    ]
    assert [file.partition["day"] for file in plan.files] == ["1", "2", None]
    assert plan.estimated_rows == 7


def test_bytes_a_row_are_known_where_rows_are(tmp_path: Path) -> None:
    put_parquet(tmp_path / "b.parquet", {"x": range(5), "note": ["n"] * 5})
    put_parquet(tmp_path / "c.parquet", {"x": range(15), "note": ["n"] * 15})
    size = sum((tmp_path / name).stat().st_size for name in ("b.parquet", "c.parquet"))
    assert plan_of(tmp_path, spec=X).row_bytes == size / 20
    put_csv(tmp_path / "a.csv", "x,note\n1,hi\n")
    assert plan_of(tmp_path, spec=X).row_bytes == 0


@pytest.mark.parametrize("num_columns", [1, 1000])
def test_a_footers_digest_tells_files_of_one_size_apart(tmp_path: Path, num_columns: int) -> None:
    def digest(first: float) -> str:
        columns = {f"column {i:04d}": [first if i == 0 else 1.0] for i in range(num_columns)}
        path = put_parquet(tmp_path / "a.parquet", columns, compression="none", use_dictionary=False)
        footers.add(int.from_bytes(path.read_bytes()[-8:-4], "little"))
        with path.open("rb") as stream, pa.OSFile(str(path)) as other:
            assert footer_digest(stream) == footer_digest(other)
            return footer_digest(stream)

    footers: set[int] = set()
    assert digest(2.0) == digest(2.0) != digest(3.0)
    (size,) = footers
    assert (size > 2**16) == (num_columns == 1000), "more than is read at once"
