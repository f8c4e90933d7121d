"""The configuration tree, how it is loaded and checked, and the fingerprint of a run.

Sources, weakest first: the YAML file, the command line's flags, `--set`. Every problem found is reported at once, each
line beginning with the full key. Whether inputs exist, what the predictor needs and how many actors fit belong to the
modules that use the settings.
"""

import codecs
import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, cast

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from scoring.errors import ConfigError
from scoring.storage import ListedFile, absolute, is_local, join, read_bytes, redact, redact_text, would_list

SCORES_VERSION = 2
"""Raised when the same row could score differently: part of every fingerprint."""

# What pandas.read_csv takes for missing (pandas 2.3, `na_values`).
DEFAULT_NULL_VALUES = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
)


# --- the tree


def _one_character(text: str) -> str:
    text = "\t" if text == "\\t" else text
    if len(text) != 1 or not text.isascii() or text in '"\r\n':
        raise ValueError("must be a single ASCII character, not a quote or a line end (a tab is '\\t')")
    return text


def _codec(name: str) -> str:
    try:
        return codecs.lookup(name).name
    except LookupError:
        raise ValueError("must be a text encoding that Python knows, like utf-8 or cp1252") from None


def _without_duplicates(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"must name each column once; twice there: {', '.join(map(repr, twice))}")
    return names


def _bare_schemes(schemes: tuple[str, ...]) -> tuple[str, ...]:
    for scheme in schemes:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
            raise ValueError("must be lower-case schemes without '://', like file, s3 or https")
    return schemes


def _run_id(text: str) -> str:
    if not re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,128}", text):
        raise ValueError("must be 1 to 128 letters, digits, '.', '_' or '-', not beginning with '.'")
    return text


_Name = Annotated[str, Field(min_length=1)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CsvConfig(_Section):
    """How CSV text becomes cells."""

    delimiter: Annotated[str, AfterValidator(_one_character)] = ","
    """Character between cells (one ASCII character, default ","). A wrong one makes the whole line one cell."""
    encoding: Annotated[str, AfterValidator(_codec)] = "utf-8"
    """Text encoding (a codec of Python, default "utf-8"). A wrong one gives unreadable files or garbled text."""
    null_values: tuple[str, ...] | None = None
    """Cell texts that mean a missing value (list, default null: the ones pandas takes, the empty text among them).
    A shorter list keeps words like "None" or "NA" as text, but must repeat "" for empty cells to stay missing."""


class InputConfig(_Section):
    """What is read."""

    paths: Annotated[tuple[_Name, ...], Field(min_length=1)]
    """Files, folders (read to any depth) or globs, local or URI (list, required). A folder takes in whatever is added
    to it later, and that starts a new run."""
    format: Literal["auto", "parquet", "csv"] = "auto"
    """File format (default auto: by suffix, other files left alone). A named one reads files without a suffix too, and
    every stray file of a folder with them."""
    keep: Annotated[tuple[_Name, ...], AfterValidator(_without_duplicates)] | None = None
    """Input columns copied to scores and quarantine (list, default null: those the predictor does not read). Each adds
    to the output's size; [] leaves only source_file and source_row to join on."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """What a file that cannot be read does (default fail: the run ends before publishing). skip publishes without its
    rows, and lists it in the manifest."""
    csv: CsvConfig = CsvConfig()
    """How CSV text becomes cells; without effect on parquet."""


class PredictorConfig(_Section):
    """Which model scores."""

    path: _Name
    """Folder of the saved MultiModalPredictor, local or URI (required). Loading it runs its pickles: see sha256."""
    sha256: Annotated[_Name, AfterValidator(str.lower)] | None = None
    """Predictor hash (hex, as --dry-run prints it; default null: any) checked before anything is unpickled. A pin keeps
    out a changed or planted model, and must be renewed with every training."""


class OutputConfig(_Section):
    """Where results go."""

    path: _Name
    """Folder that holds all runs, local or URI (required). Shared by runs: one at a time may publish to it."""


class EngineConfig(_Section):
    """What computes the model."""

    provider: Literal["auto", "tensorrt", "cuda", "torch", "cpu"] = "auto"
    """Inference engine (default auto: the fastest that passes parity, and why is logged). A named one never falls back:
    where it does not work the run ends."""
    precision: Literal["auto", "fp16", "fp32"] = "auto"
    """Arithmetic of the model (default auto: fp16 where a GPU gains from it). fp16 is several times faster and moves
    probabilities by about 6e-4; fp32 is the reference's."""
    compile: Literal["auto", "always", "never"] = "auto"
    """When the model is compiled for a GPU, which takes a minute or two (default auto: beside the first engine, in runs that
    are long enough to gain from it). always: before the first row of the first run, so that it and later ones begin with
    the faster engine; it stays in engine.cache for every run of that predictor on that kind of machine. never leaves the
    cores to the run, and what is there unused."""
    cache: _Name = "~/.cache/multimodal-scorer"
    """Folder or URI for built engines (default "~/.cache/multimodal-scorer"). One that is shared, or outlives the
    machine, saves each new worker the build, which takes seconds to minutes."""


class BatchConfig(_Section):
    """How many rows travel together."""

    rows: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Rows in one forward pass (1 to 65536; default null: 512 on a GPU, 64 on a CPU). More feeds the GPU better until its
    memory runs out; a row that kills the process takes longer to find."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens in one forward pass, padding included (default null: 65536 on a GPU, no limit but rows on a CPU). A budget
    evens out memory between short and long texts, at the price of smaller batches of long ones."""


class ImagesConfig(_Section):
    """How image cells become pixels."""

    base: _Name | None = None
    """Folder or URI that relative image paths start from (default null: the driver's working directory at start). Name
    it for runs that must not depend on where they are started."""
    confined: bool | None = None
    """Whether image paths must stay below images.base (default null: true where images.base is named, else false). Keeps
    out `..`, absolute paths and links that lead elsewhere, so that whoever writes the input reads no other files of the
    workers; costs about 50 us an image. URIs with a scheme are images.schemes' matter."""
    decode: Literal["auto", "exact", "fast", "gpu"] = "auto"
    """How images become pixels (default auto: gpu where the decoder is installed, else exact). exact is the predictor's own
    pixels, bit for bit, decoded on the cores and resized on the GPU where there is one; fast decodes and resizes on the
    cores, within 2 of 255 levels; gpu decodes plain JPEGs on the GPU's own engine, 99.99 % of values exact, and needs few
    cores. What fast and gpu cannot read takes exact."""
    on_error: Literal["quarantine", "blank"] = "quarantine"
    """What an unusable image does to its row (default quarantine). blank scores it with an image of zeros, as the
    predictor would, and such scores look like any other."""
    schemes: Annotated[tuple[_Name, ...], AfterValidator(_bare_schemes)] = (
        *("file", "s3", "gs", "gcs", "az", "abfs", "abfss"),
    )
    """Where cells may fetch images from (list, default local files and object stores). http and https must be asked
    for: then whoever writes the input makes the workers call any address they can reach."""
    max_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    """Largest image that is decoded (pixels, default 178956970, where Pillow stops: all that the predictor decodes). A
    worker needs up to 8 bytes a pixel while it decodes one, 16 for a WEBP; a lower limit keeps out decompression bombs
    sooner. A file of more than 8 bytes for each of these pixels is too large unread."""
    timeout_s: Annotated[_Number, Field(gt=0)] | None = 60.0
    """Longest fetch of one image (seconds, default 60; null: no limit). Short ones quarantine rows when the store is
    slow, long ones let a dead server hold up a worker."""


class ParityConfig(_Section):
    """The check of the engine against the reference, before the bulk is scored."""

    rows: Annotated[int, Field(ge=1)] = 512
    """Rows of this run scored by both (default 512; a small run gives a tenth of its rows, at least 64). More finds rarer
    differences; the reference, AutoGluon's own call, takes about 8 ms a row on a GPU and 15 on a core."""
    max_abs_diff: Annotated[_Number, Field(gt=0)] = 0.005
    """Largest difference of a probability, or of a regression in standard deviations of the label (default 0.005).
    Lower refuses fp16 first."""


class QuarantineConfig(_Section):
    """How many bad rows a run may have."""

    max_fraction: Annotated[_Number, Field(ge=0, le=1)] = 0.01
    """Part of all rows that may be quarantined and still be published (0 to 1, default 0.01). 0 publishes only clean
    runs; 1 publishes whatever is left. A rerun with another limit rescores nothing."""


class ResourcesConfig(_Section):
    """What the run takes of the cluster."""

    gpus: Annotated[_Number, Field(ge=0)] | None = None
    """GPUs each scoring actor reserves (default null: 1 where the cluster has one, else 0). A fraction lets actors
    share a GPU and its memory."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPU cores for reading and features (default null: from the cluster). Fewer leave room for other jobs; the GPU
    waits when they are too few."""
    actors: Annotated[int, Field(ge=1)] | None = None
    """Scoring actors (default null: from the cluster, one a GPU). Each holds its own copy of the model."""


class RunConfig(_Section):
    """Which run this is."""

    id: Annotated[str, AfterValidator(_run_id)] | None = None
    """Name of the run's folder (1 to 128 letters, digits, '.', '_', '-'; default null: from the fingerprint). A named
    run refuses a changed model, setting or input instead of starting a new run."""
    incremental: bool = False
    """Score only files that the last published run has not (default false: all). Saves the rescoring, and one output
    then holds scores made at different times."""


class ScoreConfig(_Section):
    """The whole configuration of `jobs.score`."""

    input: InputConfig
    """What is read."""
    predictor: PredictorConfig
    """Which model scores."""
    output: OutputConfig
    """Where results go."""
    engine: EngineConfig = EngineConfig()
    """What computes the model."""
    batch: BatchConfig = BatchConfig()
    """How many rows travel together."""
    images: ImagesConfig = ImagesConfig()
    """How image cells become pixels."""
    parity: ParityConfig = ParityConfig()
    """The check of the engine against the reference."""
    quarantine: QuarantineConfig = QuarantineConfig()
    """How many bad rows a run may have."""
    resources: ResourcesConfig = ResourcesConfig()
    """What the run takes of the cluster."""
    run: RunConfig = RunConfig()
    """Which run this is."""


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


_FIELDS = dict(_fields(ScoreConfig))
_SECTIONS = {key.rpartition(".")[0] for key in _FIELDS}
_PATHS = ("input.paths", "predictor.path", "output.path", "engine.cache", "images.base")
# JSON Schema's words for a setting's type and bounds, in ours.
_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text (not empty)",
    "array": "a list of texts",
    "null": "null",
}
_BOUNDS = {"minimum": "of at least", "exclusiveMinimum": "above", "minItems": "of length at least"}
_FLAGS = {"input.paths": "--input", "predictor.path": "--predictor", "output.path": "--output", "run.id": "--run-id"}


@dataclass(frozen=True)
class NotBuilt:
    """Values of a setting that have no effect yet, and what to use instead."""

    values: tuple[object, ...] | None
    """None: all but the default."""
    instead: str


NOT_BUILT: dict[str, NotBuilt] = {
    "run.incremental": NotBuilt((True,), "false"),
}


# --- loading


@dataclass(frozen=True)
class _Given:
    key: str
    value: object
    source: str


class _Nothing:
    """A key written without a value: not null, or an unset variable in a template would drop a pin."""


def load_config(*, file: str | None, flags: Mapping[str, object], overrides: Sequence[str], cwd: Path) -> ScoreConfig:
    """Read the YAML `file`, then `flags` (by dotted key, None: not given), then `--set` overrides; check all of it.

    Relative paths of every source start from `cwd`. Raises ConfigError with every problem, one a line.
    """
    problems: list[str] = []
    from_file = _from_file(file, cwd, problems)
    from_command = [*_from_flags(flags), *_from_overrides(overrides, problems)]
    settings = {**_defaults(cwd), **_settled(from_file, cwd, problems), **_settled(from_command, cwd, problems)}
    _settle_images(settings, cwd)
    problems += _missing({given.key for given in [*from_file, *from_command]})
    problems += [*_not_built(settings), *_contradictions(settings)]
    if problems:
        raise ConfigError("\n".join(problems))
    return ScoreConfig.model_validate(_nested(settings))


def _from_file(file: str | None, cwd: Path, problems: list[str]) -> list[_Given]:
    if file is None:
        return []
    try:
        node = yaml.compose(read_bytes(absolute(file, cwd)), Loader=yaml.SafeLoader)
    except (OSError, ConfigError, yaml.YAMLError) as error:
        reason = " ".join(redact_text(str(error)).split())
        problems.append(f"--config: {redact(file)} cannot be read: {reason}; name a YAML file")
        return []
    if isinstance(node, yaml.MappingNode):
        return list(_from_node(node, f"{redact(file)} line"))
    if node is not None:
        problems.append(f"--config: {redact(file)} holds no sections; begin with 'input:' and its keys below")
    return []


def _from_node(node: yaml.MappingNode, source: str, prefix: str = "") -> Iterator[_Given]:
    for key_node, node_below in node.value:
        key = f"{prefix}{key_node.value}"
        value = _node_value(node_below)
        if key in _SECTIONS and isinstance(node_below, yaml.MappingNode):
            yield from _from_node(node_below, source, f"{key}.")
        elif key not in _SECTIONS or not isinstance(value, _Nothing):
            yield _Given(key, value, f"{source} {key_node.start_mark.line + 1}")


def _node_value(node: yaml.Node) -> object:
    """The scalars as text: the field's type says what a number is, so that an id of 007 or a null value NULL stays."""
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _node_value(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [item.value if isinstance(item, yaml.ScalarNode) else _node_value(item) for item in node.value]
    if node.tag == "tag:yaml.org,2002:null":
        return None if node.value else _Nothing()
    return node.value


def _from_flags(flags: Mapping[str, object]) -> list[_Given]:
    return [_Given(key, value, _FLAGS.get(key, key)) for key, value in flags.items() if value not in (None, [], ())]


def _from_overrides(overrides: Sequence[str], problems: list[str]) -> Iterator[_Given]:
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals:
            problems.append(f"{redact_text(key)}: --set without a value; write --set key.path=value")
        elif key in _FIELDS:
            yield _Given(key, _override_value(key, text.strip() or text), "--set")
        else:
            yield _Given(key, text, "--set")


def _override_value(key: str, text: str) -> object:
    """null, a quoted text or a list in brackets as YAML has them; anything else word for word."""
    kinds = [option.get("type") for option in _options(key)]
    if "null" in kinds and text in ("null", "~"):
        return None
    if text[:1] in ("'", '"') or ("array" in kinds and text.startswith("[")):
        try:
            return cast("object", yaml.load(text, Loader=yaml.BaseLoader))
        except yaml.YAMLError:
            return text  # "[ab]*.parquet" is a glob
    return text


def _settled(givens: Sequence[_Given], cwd: Path, problems: list[str]) -> dict[str, object]:
    """The settings of one layer, typed and with absolute paths; one key with two values is a problem."""
    settled: dict[str, _Given] = {}
    for given in givens:
        try:
            now = _Given(given.key, _resolved(given.key, _typed(given), cwd), given.source)
        except ConfigError as error:
            problems.append(str(error))
            continue
        before = settled.setdefault(given.key, now)
        if before.value != now.value:
            problems.append(
                f"{now.key}: {before.source} gives {_shown(before.value)} and {now.source} gives {_shown(now.value)}; "
                "keep one"
            )
    return {key: given.value for key, given in settled.items()}


def _typed(given: _Given) -> object:
    key, value = given.key, given.value
    if key not in _FIELDS:
        raise ConfigError(_unknown(given))
    if isinstance(value, _Nothing):
        raise ConfigError(f"{key}: has no value; give it one, or leave the key out")
    if isinstance(value, str) and any(option.get("type") == "array" for option in _options(key)):
        value = [value]
    try:
        return _adapter(key).validate_python(value)
    except ValidationError as error:
        cause = error.errors()[0].get("ctx", {}).get("error")
        must = str(cause) if isinstance(cause, ValueError) else f"must be {_expected(key)}"
        field = _FIELDS[key]
        advice = f"set it with {_FLAGS[key]}" if field.is_required() else f"the default is {_shown(field.default)}"
        raise ConfigError(f"{key}: got {_shown(given.value)}, {must}; {advice}") from error


def _resolved(key: str, value: object, cwd: Path) -> object:
    if key not in _PATHS:
        return value
    if isinstance(value, tuple):
        return tuple(_resolved(key, path, cwd) for path in value)
    if value is None:
        return None
    try:
        return absolute(os.path.expanduser(str(value)), cwd)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _defaults(cwd: Path) -> dict[str, object]:
    return {key: _resolved(key, field.default, cwd) for key, field in _FIELDS.items() if not field.is_required()}


def _settle_images(settings: dict[str, object], cwd: Path) -> None:
    """The defaults that hang on whether `images.base` was named: a stored configuration says what they came to."""
    if settings["images.confined"] is None:
        settings["images.confined"] = settings["images.base"] is not None
    if settings["images.base"] is None:
        settings["images.base"] = str(cwd)


def _nested(settings: Mapping[str, object]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for key, value in settings.items():
        *above, name = key.split(".")
        section = tree
        for part in above:
            section = cast("dict[str, object]", section.setdefault(part, {}))
        section[name] = value
    return tree


# --- checks and their messages


def _missing(given_keys: set[str]) -> list[str]:
    required = [key for key, field in _FIELDS.items() if field.is_required() and key not in given_keys]
    return [f"{key}: required; give {_FLAGS[key]} or set it in the file given with --config" for key in required]


def _not_built(settings: Mapping[str, object]) -> Iterator[str]:
    for key, refused in NOT_BUILT.items():
        value = settings[key]
        if value in refused.values if refused.values is not None else value != _FIELDS[key].default:
            yield f"{key}: {_shown(value)} is not built yet; use {refused.instead}"


def _contradictions(settings: Mapping[str, object]) -> Iterator[str]:
    output = cast("str", settings.get("output.path", ""))
    predictor = cast("str", settings.get("predictor.path", ""))
    for path in cast("tuple[str, ...]", settings.get("input.paths", ())):
        if output and _real_names(_is_read_back, path, output):
            yield (
                f"output.path: {_shown(output)} lies in input.paths {_shown(path)}, so the next run would read the "
                "scores as input; write elsewhere, or below a folder whose name begins with '_'"
            )
    for key in ("output.path", "engine.cache"):
        path = cast("str", settings.get(key, ""))
        if path and predictor and _real_names(_is_inside, predictor, path):
            yield f"{key}: {_shown(path)} lies in predictor.path {_shown(predictor)} and would change its hash; move it"
    gpus = settings["resources.gpus"]
    provider = settings["engine.provider"]
    if gpus and provider == "cpu":
        yield f"resources.gpus: {gpus} contradicts engine.provider=cpu, which uses none; drop one of the two"
    if gpus == 0 and provider in ("cuda", "tensorrt"):
        yield f"resources.gpus: 0 contradicts engine.provider={provider}, which needs one; drop one of the two"
    if provider == "cpu" and settings["engine.precision"] == "fp16":
        yield "engine.precision: fp16 contradicts engine.provider=cpu, which computes in fp32; drop one of the two"


def _real_names(test: Callable[[str, str], bool], outer: str, inner: str) -> bool:
    """The test on the names as given, and on where links lead."""
    if test(outer, inner):
        return True
    return is_local(outer) and is_local(inner) and test(os.path.realpath(outer), os.path.realpath(inner))


def _is_read_back(pattern: str, output: str) -> bool:
    return would_list(pattern, join(output, "runs", "ID", "scores", "part-0.parquet"))


def _is_inside(folder: str, path: str) -> bool:
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def _unknown(given: _Given) -> str:
    section = [key for key in _FIELDS if key.startswith(f"{given.key}.")]
    if section:
        return f"{given.key}: got {_shown(given.value)}, must be a section with the keys {', '.join(section)}"
    near = _nearest(given.key)
    if near:
        return f"{given.key}: unknown key; did you mean {' or '.join(map(repr, near))}?"
    return f"{given.key}: unknown key; the sections are {', '.join(sorted(_SECTIONS))}"


def _nearest(key: str) -> list[str]:
    """The valid keys most like this one, as a whole or by the last part, for a key put in the wrong section."""
    scores = {valid: _likeness(key, valid) for valid in [*_FIELDS, *_SECTIONS]}
    best = max(scores.values())
    return [valid for valid, score in scores.items() if score >= max(0.7, best - 0.05)][:3]


def _likeness(key: str, valid: str) -> float:
    last, valid_last = key.rpartition(".")[2], valid.rpartition(".")[2]
    whole = difflib.SequenceMatcher(None, key, valid).ratio()
    return max(whole, 0.95 * difflib.SequenceMatcher(None, last, valid_last).ratio())


def _expected(key: str) -> str:
    return " or ".join(_phrase(option) for option in _options(key))


def _phrase(option: Mapping[str, object]) -> str:
    if "enum" in option:
        return "one of " + ", ".join(cast("list[str]", option["enum"]))
    kind = _KINDS[cast("str", option["type"])]
    if "minimum" in option and "maximum" in option:
        return f"{kind} between {option['minimum']} and {option['maximum']}"
    return " ".join([kind, *(f"{word} {option[name]}" for name, word in _BOUNDS.items() if name in option)])


@cache
def _options(key: str) -> list[dict[str, object]]:
    """The setting's possible types, in JSON Schema's words."""
    schema = _adapter(key).json_schema()
    return cast("list[dict[str, object]]", schema.get("anyOf", [schema]))


@cache
def _adapter(key: str) -> TypeAdapter[object]:
    return TypeAdapter(Annotated[_FIELDS[key].annotation, _FIELDS[key]])  # type: ignore[arg-type]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, bool | NoneType) else repr(value)
    text = redact_text(repr(list(value)) if isinstance(value, tuple) else text)
    return text if len(text) <= 120 else f"{text[:117]}..."


# --- what is printed and stored


def resolved_yaml(config: ScoreConfig) -> str:
    """The whole configuration as a file that `--config` takes, URIs without credentials and query."""
    tree = _nested({key: list(v) if isinstance(v, tuple) else v for key, v in _stored(config).items()})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def describe(config: ScoreConfig) -> list[tuple[str, str]]:
    """Every key with its value as text, in the tree's order, URIs without credentials and query."""
    return [(key, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for key, v in _stored(config).items()]


def _stored(section: BaseModel, prefix: str = "") -> dict[str, object]:
    """Dotted keys and values as they may be shown and stored."""
    stored: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        stored |= _stored(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: _safe(value)}
    return stored


def _safe(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(_safe(item) for item in value)
    return redact(value) if isinstance(value, str) else value


# --- fingerprint


@dataclass(frozen=True)
class Fingerprint:
    """What decides a run's scores: sha256 (hex) over `parts`, one entry for each ingredient and each input file."""

    digest: str
    parts: dict[str, str]

    @property
    def run_id(self) -> str:
        """The id of a run that was not given one."""
        return self.digest[:16]

    def with_part(self, name: str, value: str) -> "Fingerprint":
        """The same with one more ingredient."""
        return _digested({**self.parts, name: value})

    def differences(self, other_parts: Mapping[str, str]) -> list[str]:
        """What differs from an earlier run's parts, one text each, sorted by ingredient; [] for the same run."""
        keys = sorted({*self.parts, *other_parts})
        return [
            _difference(key, other_parts.get(key), self.parts.get(key))
            for key in keys
            if other_parts.get(key) != self.parts.get(key)
        ]


def fingerprint(
    config: ScoreConfig, *, predictor_hash: str, listing: Sequence[ListedFile], scores_version: int
) -> Fingerprint:
    """Fingerprint a run; the listing's order and the way the input was named (folder, glob, files) do not matter."""
    parts = {key: json.dumps(value) for key, value in _stored(config).items() if _decides_scores(key)}
    parts |= {"predictor": predictor_hash, "scores_version": str(scores_version)}
    files: dict[str, set[str]] = {}
    for file in listing:
        files.setdefault(f"input file {redact(file.uri)}", set()).add(f"{file.size_bytes} bytes, {file.version}")
    parts |= {name: "; ".join(sorted(versions)) for name, versions in files.items()}
    return _digested(parts)


def _digested(parts: dict[str, str]) -> Fingerprint:
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return Fingerprint(hashlib.sha256(text.encode()).hexdigest(), parts)


def _decides_scores(key: str) -> bool:
    # What becomes of a file that cannot be read changes no score: a run that failed on one is published by a rerun that skips it.
    is_policy = key in ("input.paths", "input.on_bad_file")
    return key == "engine.precision" or (key.startswith(("input.", "images.")) and not is_policy)


def _difference(key: str, before: str | None, now: str | None) -> str:
    if before is None:
        return f"{key}: added ({now})"
    return f"{key}: gone (was {before})" if now is None else f"{key}: was {before}, now {now}"
