"""The configuration as users meet it: precedence, paths, every refusal with its message, redaction, fingerprint."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from scoring.config import (
    NOT_BUILT,
    SCORES_VERSION,
    Fingerprint,
    ScoreConfig,
    describe,
    fingerprint,
    load_config,
    resolved_yaml,
)
from scoring.errors import (
    ConfigError,
    EngineError,
    FingerprintError,
    IncompleteError,
    InputError,
    LockError,
    OutputError,
    ParityError,
    PredictorError,
    QuarantineLimitError,
    ScoringError,
    VerificationError,
)
from scoring.storage import ListedFile

FLAGS: dict[str, object] = {"input.paths": ["data"], "predictor.path": "model", "output.path": "out", "run.id": None}
FILES = (ListedFile("/d/a.parquet", 10, "100"), ListedFile("/d/b.parquet", 20, "200"))


def load(
    cwd: Path, *overrides: str, flags: Mapping[str, object] = FLAGS, text: str | None = None, file: str = "job.yaml"
) -> ScoreConfig:
    if text is not None:
        (cwd / file).write_text(text)
    return load_config(file=file if text is not None else None, flags=flags, overrides=overrides, cwd=cwd)


def problems(cwd: Path, *overrides: str, flags: Mapping[str, object] = FLAGS, text: str | None = None) -> Sequence[str]:
    with pytest.raises(ConfigError) as caught:
        load(cwd, *overrides, flags=flags, text=text)
    return str(caught.value).splitlines()


# --- the tree


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (ScoringError, 1),
        (ConfigError, 2),
        (PredictorError, 2),
        (FingerprintError, 2),
        (OutputError, 2),
        (InputError, 3),
        (QuarantineLimitError, 3),
        (VerificationError, 3),
        (EngineError, 4),
        (ParityError, 4),
        (LockError, 5),
        (IncompleteError, 6),
    ],
)
def test_each_error_has_its_branch_exit_code(error: type[ScoringError], exit_code: int) -> None:
    assert error("x").exit_code == exit_code


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from models(field.annotation)


def test_every_setting_describes_itself_with_its_default() -> None:
    leaves = 0
    for model in models(ScoreConfig):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
                leaves += 1
                said = "required" if field.is_required() else "default"
                assert said in field.description, f"{model.__name__}.{name}"
    assert leaves == 31


def test_the_tree_is_frozen_and_takes_no_other_field(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        config.batch.rows = 1
    with pytest.raises(ValidationError, match="extra"):
        ScoreConfig.model_validate({**config.model_dump(), "other": {}})


def test_defaults(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.input.format, config.input.keep, config.input.csv.delimiter) == ("auto", None, ",")
    assert (config.batch.rows, config.batch.tokens) == (None, None)
    assert (config.parity.rows, config.parity.max_abs_diff) == (512, 0.005)
    assert config.quarantine.max_fraction == 0.01
    assert config.images.schemes == ("file", "s3", "gs", "gcs", "az", "abfs", "abfss")
    assert (config.run.id, config.run.incremental) == (None, False)


# --- precedence and values


def test_flags_override_the_file_and_set_overrides_both(tmp_path: Path) -> None:
    text = "batch: {rows: 8}\nquarantine: {max_fraction: 0.5}\noutput: {path: from_file}\n"
    config = load(tmp_path, "batch.rows=16", text=text)
    assert config.batch.rows == 16
    assert config.quarantine.max_fraction == 0.5
    assert config.output.path == str(tmp_path / "out")


def test_file_alone_is_enough(tmp_path: Path) -> None:
    text = "input: {paths: data, csv: {delimiter: ';'}}\npredictor: {path: m}\noutput.path: o\nbatch:\n"
    config = load(tmp_path, text=text, flags={"input.paths": None, "output.path": None})
    assert config.input.paths == (str(tmp_path / "data"),)
    assert config.input.csv.delimiter == ";"
    assert config.output.path == str(tmp_path / "o")


def test_flag_and_set_that_disagree_are_refused_naming_both(tmp_path: Path) -> None:
    expected = f"output.path: --output gives '{tmp_path}/out' and --set gives '{tmp_path}/other'; keep one"
    assert problems(tmp_path, "output.path=other") == [expected]


def test_flag_and_set_that_agree_are_fine(tmp_path: Path) -> None:
    config = load(tmp_path, "output.path=./out", "input.paths=[data/]")
    assert config.output.path == str(tmp_path / "out")


def test_one_key_twice_with_two_values_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "batch.rows=1", "batch.rows=2") == [
        "batch.rows: --set gives 1 and --set gives 2; keep one"
    ]
    assert problems(tmp_path, text="batch:\n  rows: 1\n  rows: 2\n") == [
        "batch.rows: job.yaml line 2 gives 1 and job.yaml line 3 gives 2; keep one"
    ]


@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"'])
@pytest.mark.parametrize("text", ["007", "1e5", "2024-01-01", "true", "yes", "0x1F"])
def test_text_is_never_turned_into_another_type(tmp_path: Path, form: str, text: str) -> None:
    written = form.format(text)
    by_set = load(tmp_path, f"run.id={written}", f"input.keep=[{written}, id]", f"predictor.sha256={written}")
    assert (by_set.run.id, by_set.input.keep, by_set.predictor.sha256) == (text, (text, "id"), text.lower())
    by_file = load(tmp_path, text=f"run: {{id: {written}}}\ninput: {{keep: [{written}, id]}}\n")
    assert (by_file.run.id, by_file.input.keep) == (text, (text, "id"))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("input.keep=[id,name]", ("id", "name")),
        ("input.keep=id", ("id",)),
        ("input.keep=[]", ()),
        ("input.keep=null", None),
        ("input.csv.null_values=[NULL, null, '', ~]", ("NULL", "null", "", "~")),
        ("input.csv.delimiter=,", ","),
        ("input.csv.delimiter=|", "|"),
        ("input.csv.delimiter= ", " "),
        ("input.csv.delimiter=\\t", "\t"),
        ("input.csv.delimiter=\t", "\t"),
        ("input.csv.encoding=UTF8", "utf-8"),
        ("images.timeout_s=null", None),
        ("images.timeout_s=1e-1", 0.1),
        ("resources.gpus=0.25", 0.25),
        ("batch.rows= 64 ", 64),
        ("engine.provider=torch", "torch"),
        ("predictor.sha256=ABC", "abc"),
    ],
)
def test_set_takes_yaml_values(tmp_path: Path, override: str, value: object) -> None:
    config = load(tmp_path, override)
    found: object = config
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value


def test_null_values_of_the_file_stay_text(tmp_path: Path) -> None:
    config = load(tmp_path, text="input:\n  csv:\n    null_values: [null, NULL, ~, '', 1.5]\n")
    assert config.input.csv.null_values == ("null", "NULL", "~", "", "1.5")


# --- paths


def test_relative_paths_of_every_source_start_from_cwd(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "job.yaml").write_text("images: {base: pictures}\n")
    flags = {**FLAGS, "input.paths": ["data", "../up/*.csv"]}
    config = load_config(file="sub/job.yaml", flags=flags, overrides=["engine.cache=cache"], cwd=tmp_path)
    assert config.images.base == str(tmp_path / "pictures")
    assert config.engine.cache == str(tmp_path / "cache")
    assert config.input.paths == (str(tmp_path / "data"), str(tmp_path.parent / "up" / "*.csv"))


def test_images_base_is_the_working_directory_unless_named(tmp_path: Path) -> None:
    assert load(tmp_path).images.base == str(tmp_path)
    assert load(tmp_path, "images.base=null").images.base == str(tmp_path)


def test_images_are_confined_where_the_base_is_named(tmp_path: Path) -> None:
    assert load(tmp_path).images.confined is False
    assert load(tmp_path, "images.base=null").images.confined is False
    assert load(tmp_path, "images.base=pictures").images.confined is True
    assert load(tmp_path, "images.base=s3://b/pictures").images.confined is True
    assert load(tmp_path, f"images.base={tmp_path}").images.confined is True
    assert load(tmp_path, text="images: {base: pictures}").images.confined is True
    assert load(tmp_path, "images.base=null", text="images: {base: pictures}").images.confined is False
    assert load(tmp_path, "images.base=pictures", "images.confined=false").images.confined is False
    assert load(tmp_path, "images.confined=true").images.confined is True


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load(tmp_path).engine.cache == str(tmp_path / "home" / ".cache" / "multimodal-scorer")
    assert load(tmp_path, "images.base=~/pictures").images.base == str(tmp_path / "home" / "pictures")


def test_uris_are_left_alone_and_file_uris_become_paths(tmp_path: Path) -> None:
    flags = {**FLAGS, "input.paths": ["s3://b/x/../y/*.csv", "file:///d/a%20b"], "output.path": "gs://b/out/"}
    config = load(tmp_path, flags=flags)
    assert config.input.paths == ("s3://b/x/../y/*.csv", "/d/a b")
    assert config.output.path == "gs://b/out/"


def test_links_are_not_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    config = load(tmp_path, flags={**FLAGS, "input.paths": ["link"]})
    assert config.input.paths == (str(tmp_path / "link"),)


# --- refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.row=1", "batch.row: unknown key; did you mean 'batch.rows'?"),
        ("engine.rows=1", "engine.rows: unknown key; did you mean 'batch.rows' or 'parity.rows'?"),
        ("images.max_fraction=1", "images.max_fraction: unknown key; did you mean 'quarantine.max_fraction'?"),
        ("csv.delimiter=;", "csv.delimiter: unknown key; did you mean 'input.csv.delimiter'?"),
        ("imagse.base=x", "imagse.base: unknown key; did you mean 'images.base'?"),
        ("batch.rows.x=1", "batch.rows.x: unknown key; did you mean 'batch.rows'?"),
        (
            "zzz=1",
            "zzz: unknown key; the sections are batch, engine, images, input, input.csv, output, parity, predictor, "
            "quarantine, resources, run",
        ),
        ("batch=64", "batch: got '64', must be a section with the keys batch.rows, batch.tokens"),
        ("batch.rows", "batch.rows: --set without a value; write --set key.path=value"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, override: str, message: str) -> None:
    assert problems(tmp_path, override) == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch: {row: 1}", "batch.row: unknown key; did you mean 'batch.rows'?"),
        ("imagse: {base: x}", "imagse: unknown key; did you mean 'images'?"),
        ("batch: 64", "batch: got '64', must be a section with the keys batch.rows, batch.tokens"),
        ("predictor: {sha256: }", "predictor.sha256: has no value; give it one, or leave the key out"),
        ("[a]", "--config: job.yaml holds no sections; begin with 'input:' and its keys below"),
    ],
)
def test_file_that_says_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert problems(tmp_path, text=text) == [message]


@pytest.mark.parametrize(
    ("override", "must"),
    [
        ("batch.rows=many", "must be an integer between 1 and 65536 or null; the default is null"),
        ("batch.rows=0", "must be an integer between 1 and 65536 or null; the default is null"),
        ("batch.rows=65537", "must be an integer between 1 and 65536 or null; the default is null"),
        ("batch.rows=true", "must be an integer between 1 and 65536 or null; the default is null"),
        ("batch.rows=", "must be an integer between 1 and 65536 or null; the default is null"),
        ("quarantine.max_fraction=1.01", "must be a number between 0 and 1; the default is 0.01"),
        ("quarantine.max_fraction=nan", "must be a number between 0 and 1; the default is 0.01"),
        ("images.timeout_s=0", "must be a number above 0 or null; the default is 60.0"),
        ("images.timeout_s=inf", "must be a number above 0 or null; the default is 60.0"),
        ("images.max_pixels=-1", "must be an integer of at least 1; the default is 178956970"),
        ("engine.precision=fp8", "must be one of auto, fp16, fp32; the default is 'auto'"),
        ("run.incremental=maybe", "must be true or false; the default is false"),
        ("predictor.sha256=", "must be a text (not empty) or null; the default is null"),
        (
            "input.csv.delimiter=ab",
            "must be a single ASCII character, not a quote or a line end (a tab is '\\t'); the default is ','",
        ),
        (
            "input.csv.encoding=klingon",
            "must be a text encoding that Python knows, like utf-8 or cp1252; the default is 'utf-8'",
        ),
        (
            "images.schemes=https://",
            "must be lower-case schemes without '://', like file, s3 or https; "
            "the default is ['file', 's3', 'gs', 'gcs', 'az', 'abfs', 'abfss']",
        ),
    ],
)
def test_wrong_value_says_what_it_got_and_what_it_must_be(tmp_path: Path, override: str, must: str) -> None:
    key, _, text = override.partition("=")
    assert problems(tmp_path, override) == [f"{key}: got {text!r}, {must}"]


def test_kept_column_named_twice_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "input.keep=[id, b, id]") == [
        "input.keep: got ['id', 'b', 'id'], must name each column once; twice there: 'id'; the default is null"
    ]


@pytest.mark.parametrize("run_id", [".hidden", "a/b", "a b", "", "x" * 129, "a\n", "ä"])
def test_unsafe_run_id_is_refused(tmp_path: Path, run_id: str) -> None:
    (problem,) = problems(tmp_path, flags={**FLAGS, "run.id": run_id})
    assert problem.startswith("run.id: got ")
    assert "must be 1 to 128 letters, digits, '.', '_' or '-', not beginning with '.'" in problem


@pytest.mark.parametrize("run_id", ["nightly_2024-01-01.2", "x" * 128])
def test_safe_run_id_is_taken(tmp_path: Path, run_id: str) -> None:
    assert load(tmp_path, flags={**FLAGS, "run.id": run_id}).run.id == run_id


def test_missing_settings_name_their_flags(tmp_path: Path) -> None:
    assert problems(tmp_path, flags={"input.paths": []}) == [
        "input.paths: required; give --input or set it in the file given with --config",
        "predictor.path: required; give --predictor or set it in the file given with --config",
        "output.path: required; give --output or set it in the file given with --config",
    ]


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    flags = {"input.paths": ["data"], "output.path": "data/out"}
    found = problems(tmp_path, "batch.row=1", "foo", "run.incremental=true", flags=flags, text="batch: {rows: x}")
    assert [line.partition(":")[0] for line in found] == [
        "foo",
        "batch.rows",
        "batch.row",
        "predictor.path",
        "run.incremental",
        "output.path",
    ]


def test_config_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config: none.yaml cannot be read: .*No such file"):
        load_config(file="none.yaml", flags=FLAGS, overrides=[], cwd=tmp_path)
    (problem,) = problems(tmp_path, text="batch: {rows: 1\n")
    assert problem.startswith("--config: job.yaml cannot be read: while parsing a flow mapping")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.incremental=true", "run.incremental: true is not built yet; use false"),
    ],
)
def test_setting_that_is_not_built_is_refused(tmp_path: Path, override: str, message: str) -> None:
    assert problems(tmp_path, override) == [message]


@pytest.mark.parametrize(
    "override",
    [
        "run.incremental=false",
    ],
)
def test_what_is_built_of_a_half_built_setting_works(tmp_path: Path, override: str) -> None:
    assert override.partition("=")[0] in NOT_BUILT
    load(tmp_path, override)


# --- contradictions


@pytest.mark.parametrize(
    ("paths", "output"),
    [
        ("data", "data"),
        ("data", "data/out"),
        ("data", "data/a/b"),
        ("data/*", "data/out"),
        ("data/**", "data/out"),
        ("data/**/*.parquet", "data/out"),
        ("*/out", "data/out"),
        ("data/day=[0-9]", "data/day=1"),
        ("data[1]", "data[1]/out"),
        (".", "out"),
        ("s3://b/data", "s3://b/data/out"),
        ("s3://b/data/**/part-*.parquet", "s3://b/data/out/"),
    ],
)
def test_output_that_the_next_run_would_read_is_refused(tmp_path: Path, paths: str, output: str) -> None:
    (problem,) = problems(tmp_path, flags={**FLAGS, "input.paths": ["elsewhere", paths], "output.path": output})
    assert re.fullmatch(
        r"output\.path: '.*' lies in input\.paths '.*', so the next run would read the scores as input; "
        r"write elsewhere, or below a folder whose name begins with '_'",
        problem,
    )


@pytest.mark.parametrize(
    ("paths", "output"),
    [
        ("data", "data2"),
        ("data", "data/_out"),
        ("data", "data/.out/x"),
        ("data/*.parquet", "data/out"),
        ("data/a.parquet", "data"),
        ("data/day=[0-9]", "data/out"),
        ("s3://b/data", "s3://b/data-out"),
        ("s3://b/data", "gs://b/data/out"),
    ],
)
def test_output_beside_the_input_is_fine(tmp_path: Path, paths: str, output: str) -> None:
    load(tmp_path, flags={**FLAGS, "input.paths": [paths], "output.path": output})


def test_output_that_reaches_the_input_through_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (problem,) = problems(tmp_path, flags={**FLAGS, "output.path": "link/out"})
    assert problem.startswith(f"output.path: '{tmp_path}/link/out' lies in input.paths '{tmp_path}/data'")


@pytest.mark.parametrize("below", ["model", "model/out", "model/_out", "model/../model/x"])
def test_output_or_cache_inside_the_predictor_is_refused(tmp_path: Path, below: str) -> None:
    resolved = os.path.normpath(tmp_path / below)
    ending = f"'{resolved}' lies in predictor.path '{tmp_path}/model' and would change its hash; move it"
    assert problems(tmp_path, flags={**FLAGS, "output.path": below}) == [f"output.path: {ending}"]
    assert problems(tmp_path, f"engine.cache={below}") == [f"engine.cache: {ending}"]


def test_gpus_for_the_cpu_engine_are_refused(tmp_path: Path) -> None:
    assert ("resources.gpus: 0.5 contradicts engine.provider=cpu, which uses none; drop one of the two") in problems(
        tmp_path, "resources.gpus=0.5", "engine.provider=cpu"
    )
    load(tmp_path, "resources.gpus=0", "engine.provider=cpu")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_engine_that_needs_a_gpu_without_any_is_refused(tmp_path: Path, provider: str) -> None:
    assert problems(tmp_path, "resources.gpus=0", f"engine.provider={provider}") == [
        f"resources.gpus: 0 contradicts engine.provider={provider}, which needs one; drop one of the two"
    ]
    load(tmp_path, "resources.gpus=0.5", f"engine.provider={provider}")


def test_half_precision_on_the_cpu_engine_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "engine.precision=fp16", "engine.provider=cpu") == [
        "engine.precision: fp16 contradicts engine.provider=cpu, which computes in fp32; drop one of the two"
    ]


# --- printing, and secrets

SECRET_FLAGS: dict[str, object] = {
    "input.paths": ["s3://AKIA:hush1@bucket/in", "https://host/a.csv?X-Amz-Signature=hush2"],
    "predictor.path": "abfs://box:hush3@account.example/model?sig=hush4",
    "output.path": "s3://AKIA:hu/sh5@bucket/out",
}
SECRET_OVERRIDES = ("images.base=https://user:hush6@host/images", "engine.cache=gs://token:hush7@b/cache?k=hush8")


def test_no_secret_in_what_is_printed_or_stored(tmp_path: Path) -> None:
    config = load(tmp_path, *SECRET_OVERRIDES, flags=SECRET_FLAGS)
    assert config.engine.cache == "gs://token:hush7@b/cache?k=hush8"
    listing = [ListedFile("s3://AKIA:hush9@b/x.csv?versionId=hush0", 1, "e")]
    stored = fingerprint(config, predictor_hash="p", listing=listing, scores_version=1)
    texts = [resolved_yaml(config), *(value for _, value in describe(config)), *stored.parts, *stored.parts.values()]
    for text in texts:
        assert re.search("hush|AKIA|sh5|sig=|Signature", text) is None
    assert dict(describe(config))["predictor.path"] == "abfs://box@account.example/model"
    assert dict(describe(config))["engine.cache"] == "gs://b/cache"
    assert "input file s3://b/x.csv" in stored.parts


def test_no_secret_in_a_refusal(tmp_path: Path) -> None:
    overrides = [
        "output.path=s3://AKIA:hush@b/other?sig=hush",
        "batch.rows=s3://AKIA:hush@b",
        "images.schemes=[s3://AKIA:hush@b, 'https://x:hush@h']",
        "images.base=simplecache::s3://AKIA:hush@b/x",
        "engine.cache=s3://AKIA:hush@bucket/out/c",
        "s3://AKIA:hush@b",
    ]
    flags = {**SECRET_FLAGS, "predictor.path": "s3://AKIA:hush@bucket/out"}
    text = "\n".join(problems(tmp_path, *overrides, flags=flags, text="batch: 'https://u:hush@h/?hush'"))
    assert len(text.splitlines()) == 7
    assert re.search("hush|AKIA", text) is None


def test_resolved_yaml_loads_to_the_same_configuration(tmp_path: Path) -> None:
    overrides = ["run.id=007", "input.csv.null_values=['', NULL, 1]", "input.csv.delimiter=\\t", "images.timeout_s=2"]
    config = load(tmp_path, *overrides, "resources.gpus=0.5", "input.keep=[]")
    assert load(tmp_path / "..", text=resolved_yaml(config), flags={}, file=f"{tmp_path.name}/again.yaml") == config
    assert list(yaml.safe_load(resolved_yaml(config))) == list(ScoreConfig.model_fields)


def test_describe_lists_every_key_once_as_text(tmp_path: Path) -> None:
    listed = describe(load(tmp_path, "input.keep=[id, ü]"))
    assert len(listed) == len({key for key, _ in listed}) == 31
    assert dict(listed)["input.keep"] == '["id", "ü"]'
    assert dict(listed)["batch.tokens"] == "null"
    assert dict(listed)["engine.provider"] == "auto"


# --- fingerprint


def printed(
    cwd: Path,
    *overrides: str,
    predictor_hash: str = "abc",
    listing: Sequence[ListedFile] = FILES,
    scores_version: int = SCORES_VERSION,
) -> Fingerprint:
    return fingerprint(
        load(cwd, *overrides), predictor_hash=predictor_hash, listing=listing, scores_version=scores_version
    )


@pytest.mark.parametrize(
    "override",
    [
        "input.format=csv",
        "input.keep=[id]",
        "input.csv.delimiter=;",
        "input.csv.encoding=cp1252",
        "input.csv.null_values=[NA]",
        "images.confined=true",
        "images.decode=exact",
        "images.on_error=blank",
        "images.schemes=[file]",
        "images.max_pixels=1000",
        "images.timeout_s=5",
        "engine.precision=fp32",
    ],
)
def test_setting_that_decides_scores_changes_the_fingerprint(tmp_path: Path, override: str) -> None:
    before, after = printed(tmp_path), printed(tmp_path, override)
    assert after.digest != before.digest
    (difference,) = after.differences(before.parts)
    assert difference.startswith(f"{override.partition('=')[0]}: was ")


def test_naming_the_base_confines_images_to_it(tmp_path: Path) -> None:
    unnamed, named = printed(tmp_path), printed(tmp_path, "images.base=other")
    assert named.differences(unnamed.parts) == [
        f'images.base: was "{tmp_path}", now "{tmp_path}/other"',
        "images.confined: was false, now true",
    ]
    loose = printed(tmp_path, "images.base=other", "images.confined=false")
    assert loose.differences(unnamed.parts) == [f'images.base: was "{tmp_path}", now "{tmp_path}/other"']


@pytest.mark.parametrize(
    "override",
    [
        "engine.provider=torch",
        "engine.cache=elsewhere",
        "batch.rows=1",
        "quarantine.max_fraction=0.5",
        "resources.gpus=0",
        "resources.cpus=1",
        "resources.actors=1",
        "run.id=named",
        "predictor.sha256=abc",
        "input.csv.encoding=UTF8",
    ],
)
def test_setting_that_does_not_decide_scores_keeps_the_fingerprint(tmp_path: Path, override: str) -> None:
    assert printed(tmp_path, override) == printed(tmp_path)


def test_places_keep_the_fingerprint_when_their_content_is_the_same(tmp_path: Path) -> None:
    flags = {"input.paths": ["data/*.parquet"], "predictor.path": "copy", "output.path": "other"}
    moved = fingerprint(
        load(tmp_path, flags=flags), predictor_hash="abc", listing=FILES[::-1], scores_version=SCORES_VERSION
    )
    assert moved == printed(tmp_path)


@pytest.mark.parametrize(
    ("listing", "difference"),
    [
        (FILES[:1], "input file /d/b.parquet: gone (was 20 bytes, 200)"),
        ((*FILES, ListedFile("/d/c.parquet", 1, "9")), "input file /d/c.parquet: added (1 bytes, 9)"),
        (
            (FILES[0], ListedFile("/d/b.parquet", 21, "200")),
            "input file /d/b.parquet: was 20 bytes, 200, now 21 bytes, 200",
        ),
        (
            (FILES[0], ListedFile("/d/b.parquet", 20, "201")),
            "input file /d/b.parquet: was 20 bytes, 200, now 20 bytes, 201",
        ),
    ],
)
def test_changed_input_list_is_named_file_by_file(
    tmp_path: Path, listing: Sequence[ListedFile], difference: str
) -> None:
    before, after = printed(tmp_path), printed(tmp_path, listing=listing)
    assert after.run_id != before.run_id
    assert after.differences(before.parts) == [difference]


def test_predictor_and_scores_version_are_named(tmp_path: Path) -> None:
    before = printed(tmp_path)
    assert printed(tmp_path, predictor_hash="abd").differences(before.parts) == ["predictor: was abc, now abd"]
    assert printed(tmp_path, scores_version=SCORES_VERSION + 1).differences(before.parts) == [
        f"scores_version: was {SCORES_VERSION}, now {SCORES_VERSION + 1}"
    ]
    assert printed(tmp_path).differences(before.parts) == []


def test_two_versions_of_one_shown_name_both_count(tmp_path: Path) -> None:
    both = [ListedFile("s3://b/x.csv?versionId=1", 1, "a"), ListedFile("s3://b/x.csv?versionId=2", 1, "b")]
    assert printed(tmp_path, listing=both).digest != printed(tmp_path, listing=both[1:]).digest


def test_run_id_is_the_start_of_the_digest(tmp_path: Path) -> None:
    made = printed(tmp_path)
    assert re.fullmatch("[0-9a-f]{64}", made.digest)
    assert made.run_id == made.digest[:16]
    assert load(tmp_path, f"run.id={made.run_id}").run.id == made.run_id
