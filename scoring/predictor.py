"""The predictor: its folder, its hash, what it is, its feature spec and the reference that scores are held against.

Owns everything that opens a predictor's files. Loading runs the pickles in them: `check_hash` and `refuse_unsupported`
read bytes, JSON and YAML only and come first. `extract_spec` and `load_predictor` import AutoGluon (28 s, 1 GB) and are
called in the run's one `Preparer`, and in scoring actors whose engine is the network itself.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scoring.errors import PredictorError
from scoring.spec import (
    SPEC_VERSION,
    CategoricalColumn,
    CategoryKind,
    FeatureSpec,
    ImageColumn,
    ImageModel,
    LabelScaler,
    NumericalColumn,
    Scalar,
    TextColumn,
    TextModel,
)
from scoring.storage import create_exclusive, exists, filesystem, is_local, join, read_bytes, redact

if TYPE_CHECKING:
    from autogluon.multimodal import MultiModalPredictor

logger = logging.getLogger(__name__)

_PROBLEM_TYPES = ("binary", "multiclass", "regression", "classification")
_LEARNERS = ("BaseLearner",)
_MODELS = (
    "numerical_mlp",
    "categorical_mlp",
    "ft_transformer",
    "timm_image",
    "hf_text",
    "fusion_mlp",
    "fusion_transformer",
    "clip",
)
_TRANSFORMS = ("resize_to_square", "resize_shorter_side", "center_crop")


def hash_predictor(folder: Path) -> str:
    """sha256 over the sorted relative name, size and content of every file but logs and event files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not _is_log(path)):
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _is_log(path: Path) -> bool:
    return path.suffix == ".log" or path.name.startswith("events.out.tfevents")


def fetch_predictor(uri: str, cache: str, expected_hash: str | None = None) -> Path:
    """The predictor as a local folder: itself when local, else a copy in `cache`, downloaded once a node.

    With `expected_hash` a copy made before is used without listing the store. Raises PredictorError.
    """
    if is_local(uri):
        if not (Path(uri) / "assets.json").is_file():
            raise PredictorError(
                f"predictor {uri}: no assets.json there; predictor.path must be a folder that fit() saved"
            )
        return Path(uri)
    root = Path(cache if is_local(cache) else "~/.cache/multimodal-scorer").expanduser() / "predictors"
    if expected_hash is not None and (root / expected_hash).is_dir():
        return root / expected_hash
    staging = root / f"download-{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    try:
        _download(uri, staging)
        found = hash_predictor(staging)
        _refuse_other_hash(uri, found, expected_hash)
        if not (root / found).is_dir():
            staging.rename(root / found)
        return root / found
    except FileExistsError:  # another process of this node finished the same download first
        return root / found
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(uri: str, folder: Path) -> None:
    fs, path = filesystem(uri)
    if not exists(join(uri, "assets.json")):
        raise PredictorError(
            f"predictor {redact(uri)}: no assets.json there; predictor.path must be a folder that fit() saved"
        )
    fs.get(path.rstrip("/") + "/", str(folder) + "/", recursive=True)


def check_hash(folder: Path, uri: str, expected_hash: str | None) -> str:
    """The folder's hash. Raises PredictorError when `predictor.sha256` names another; no pickle is opened before."""
    found = hash_predictor(folder)
    _refuse_other_hash(uri, found, expected_hash)
    return found


def _refuse_other_hash(uri: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise PredictorError(
            f"predictor.sha256: {redact(uri)} has {found}, the configuration pins {expected}; nothing was unpickled. "
            "Point predictor.path at the pinned predictor, or update predictor.sha256 if the change is meant"
        )


def refuse_unsupported(folder: Path) -> None:
    """Refuse by name what cannot be scored row by row, from assets.json and config.yaml alone. Raises PredictorError."""
    assets = json.loads((folder / "assets.json").read_text())
    learner, problem = assets["learner_class"], assets["problem_type"]
    if learner not in _LEARNERS or problem not in _PROBLEM_TYPES:
        raise PredictorError(
            f"predictor {folder}: problem type {problem!r} ({learner}) cannot be scored here; "
            "this job scores binary, multiclass and regression predictors"
        )
    if not assets["fit_called"]:
        raise PredictorError(f"predictor {folder}: it was saved before fit(); train it first")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    names = config["model"]["names"]
    unknown = sorted(name for name in names if not name.startswith(_MODELS))
    if unknown:
        raise PredictorError(
            f"predictor {folder}: model {', '.join(unknown)} cannot be scored here; supported: {', '.join(_MODELS)}"
        )
    if config["data"].get("templates", {}).get("turn_on"):
        raise PredictorError(
            f"predictor {folder}: data.templates.turn_on draws a random template a row; train without it"
        )
    for name in names:
        _refuse_lost_backbone(folder, name, config["model"].get(name) or {})
    chunked = sorted(name for name in names if (config["model"].get(name) or {}).get("stochastic_chunk"))
    if chunked:
        raise PredictorError(
            f"predictor {folder}: model.{chunked[0]}.stochastic_chunk draws a random piece of each text, so that no two "
            "predictions agree; train without it"
        )


def _refuse_lost_backbone(folder: Path, name: str, model: dict[str, Any]) -> None:
    """fit() does not copy a timm model's local checkpoint folder; load() then looks for it at its old place."""
    checkpoint = str(model.get("checkpoint_name") or "")
    if name.startswith("timm_image") and checkpoint.startswith("/") and not Path(checkpoint).exists():
        raise PredictorError(
            f"predictor {folder}: model.{name}.checkpoint_name is the folder {checkpoint}, which is not on this machine; "
            f"put it there, or write the architecture's name into model.{name}.checkpoint_name of config.yaml"
        )


def load_spec(predictor_hash: str, cache: str) -> FeatureSpec | None:
    """The spec an earlier run extracted from this very predictor with these very versions, or None."""
    uri = _spec_uri(predictor_hash, cache)
    if not exists(uri):
        return None
    try:
        return FeatureSpec.from_json(read_bytes(uri).decode())
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("feature spec %s is unreadable (%s); it is extracted again and not used", uri, error)
        return None


def store_spec(spec: FeatureSpec, predictor_hash: str, cache: str) -> None:
    """Keep the spec for later runs; the first writer wins, and an unwritable cache is only a warning."""
    try:
        create_exclusive(_spec_uri(predictor_hash, cache), spec.to_json().encode())
    except OSError as error:
        logger.warning("engine.cache: cannot keep the feature spec in %s: %s", redact(cache), error)


def _spec_uri(predictor_hash: str, cache: str) -> str:
    from importlib.metadata import version

    versions = f"{version('autogluon.multimodal')}-{version('transformers')}"
    return join(cache, "specs", f"{predictor_hash}-v{SPEC_VERSION}-{versions}.json")


class LazyPredictor:
    """A saved predictor, loaded when it is first called for; thread-safe. `find` gives its folder."""

    def __init__(self, find: Callable[[], Path]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._loaded: MultiModalPredictor | None = None

    def __call__(self) -> "MultiModalPredictor":
        with self._lock:
            if self._loaded is None:
                self._loaded = load_predictor(self._find())
        return self._loaded


def load_predictor(folder: Path) -> "MultiModalPredictor":
    """Load with AutoGluon, on the CPU, in fp32 as saved. Runs the folder's pickles: check the hash before."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from autogluon.multimodal import MultiModalPredictor

    return MultiModalPredictor.load(str(folder), verbosity=1)


def extract_spec(predictor: "MultiModalPredictor") -> FeatureSpec:
    """Read a loaded predictor's fitted columns, scalers, categories, tokenizers and image sizes into plain data.

    Raises PredictorError for what features.py has no equal for, naming it.
    """
    learner = predictor._learner
    columns = learner._df_preprocessor
    processors = learner._data_processors
    problem_type = learner._problem_type
    is_regression = problem_type == "regression"
    text_models = tuple(_text_model(item, learner._save_path) for item in processors.get("text", []))
    image_processors = processors.get("image", [])
    spec = FeatureSpec(
        label=learner._label_column,
        problem_type="multiclass" if problem_type == "classification" else problem_type,
        class_labels=_class_labels(learner),
        numerical=tuple(_numerical_column(columns, name) for name in columns.numerical_feature_names),
        categorical=tuple(_categorical_column(columns, name) for name in columns.categorical_feature_names),
        text=tuple(_text_column(columns, name) for name in columns.text_feature_names) if text_models else (),
        image=tuple(ImageColumn(name, columns.column_types[name]) for name in columns.image_feature_names)
        if image_processors
        else (),
        numerical_models=tuple(item.prefix for item in processors.get("numerical", [])),
        categorical_models=tuple(item.prefix for item in processors.get("categorical", [])),
        text_models=text_models,
        image_models=tuple(_image_model(item) for item in image_processors),
        skip_missing=any(item.missing_value_strategy.lower() != "zero" for item in image_processors),
        label_scaler=_label_scaler(columns.label_scaler) if is_regression else None,
        has_sigmoid=bool(learner._model_postprocess_fn),
    )
    return replace(spec, weights=_weights_hash(predictor, spec))


def original_model(predictor: "MultiModalPredictor") -> Any:
    """The predictor's own network, also after `optimize_for_inference` put an engine in its place."""
    model = predictor._learner._model
    return getattr(model, "original", model)


def _weights_hash(predictor: "MultiModalPredictor", spec: FeatureSpec) -> str:
    """sha256 over the network's weights and the feature spec: what two predictors of one shape differ in."""
    import torch

    digest = hashlib.sha256(spec.to_json().encode())
    for name, tensor in sorted(original_model(predictor).state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _label_scaler(scaler: Any) -> LabelScaler:
    kind = type(scaler).__name__
    if kind == "MinMaxScaler":
        return LabelScaler("minmax", float(scaler.scale_[0]), float(scaler.min_[0]))
    if kind != "StandardScaler":
        raise PredictorError(f"the label is scaled by {kind}; StandardScaler and MinMaxScaler can be undone here")
    scale = float(scaler.scale_[0]) if scaler.with_std else None
    return LabelScaler("standard", scale, float(scaler.mean_[0]) if scaler.with_mean else None)


def _class_labels(learner: Any) -> tuple[Scalar, ...]:
    if learner._problem_type == "regression":
        return ()
    return tuple(_scalar(label, f"label {learner._label_column!r}") for label in learner.class_labels)


def _scalar(value: Any, where: str) -> Scalar:
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, str | bool | int | float):
        raise PredictorError(
            f"{where}: value {plain!r} is a {type(plain).__name__}; only text, numbers and booleans can be scored"
        )
    return plain


def _numerical_column(columns: Any, name: str) -> NumericalColumn:
    pipeline = columns._feature_generators[name]
    imputer, scaler = pipeline.named_steps["imputer"], pipeline.named_steps["scaler"]
    return NumericalColumn(
        name=name,
        fill=float(imputer.statistics_[0]),
        mean=float(scaler.mean_[0]) if scaler.with_mean else None,
        scale=float(scaler.scale_[0]) if scaler.with_std else None,
    )


def _categorical_column(columns: Any, name: str) -> CategoricalColumn:
    generator = columns._feature_generators[name]
    values = tuple(_scalar(value, f"column {name!r}") for value in generator.category_map[name])
    fills = generator._fillna_map or {}
    return CategoricalColumn(
        name=name,
        kind=_category_kind(name, values),
        values=values,
        unknown=columns.categorical_num_categories[name] - 1,
        fill=values.index(_scalar(fills[name], name)) if name in fills else None,
    )


def _category_kind(name: str, values: tuple[Scalar, ...]) -> CategoryKind:
    if all(isinstance(value, str) for value in values):
        return "string"
    if all(isinstance(value, bool) for value in values):
        return "bool"
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return "number"
    raise PredictorError(f"column {name!r}: its categories mix types ({values!r}); train on one type")


def _text_column(columns: Any, name: str) -> TextColumn:
    origin = columns.column_types[name]
    if origin not in ("text", "categorical", "numerical"):
        raise PredictorError(f"column {name!r}: text of type {origin!r} cannot be scored here")
    return TextColumn(name=name, origin=origin, template=columns.config.categorical.convert_to_text_template)


def _text_model(processor: Any, folder: str) -> TextModel:
    return TextModel(
        prefix=processor.prefix,
        tokenizer_json=_tokenizer_json(processor, Path(folder) / processor.prefix / "tokenizer.json"),
        cls_id=processor.cls_token_id,
        sep_id=processor.sep_token_id,
        eos_id=processor.eos_token_id,
        # PadCollator takes None for 0.
        pad_id=processor.tokenizer.pad_token_id or 0,
        max_len=processor.max_len,
        insert_sep=bool(processor.insert_sep),
        segment_num=processor.text_segment_num,
        normalize=bool(processor.normalize_text),
    )


def _tokenizer_json(processor: Any, saved: Path) -> str:
    """The fast tokenizer's JSON: the saved file itself where it is the one in use.

    Writing a Unigram model out and reading it again loses 1 ULP of its scores (transformers 5), the file does not.
    """
    from tokenizers import Tokenizer

    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PredictorError(
            f"model {processor.prefix}: {type(processor.tokenizer).__name__} has no fast tokenizer; save it with one "
            "(tokenizer.json) and load again"
        )
    written = _plain_tokenizer(Tokenizer.from_str(backend.to_str()))
    if saved.is_file():
        text = saved.read_text()
        if _plain_tokenizer(Tokenizer.from_str(text)) == _plain_tokenizer(backend):
            return text
    return written


def _plain_tokenizer(tokenizer: Any) -> str:
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return str(copy.to_str())


def _image_model(processor: Any) -> ImageModel:
    transforms = tuple(processor.val_transforms)
    if not transforms or any(name not in _TRANSFORMS for name in transforms):
        raise PredictorError(
            f"model {processor.prefix}: val_transforms {list(map(str, transforms))} cannot be reproduced here; "
            f"supported: {', '.join(_TRANSFORMS)}"
        )
    if transforms[-1] == "resize_shorter_side":
        raise PredictorError(
            f"model {processor.prefix}: val_transforms leave images of different sizes; end with center_crop"
        )
    return ImageModel(
        prefix=processor.prefix,
        size=int(processor.size),
        mean=tuple(float(value) for value in processor.mean),
        std=tuple(float(value) for value in processor.std),
        transforms=transforms,
        max_images=processor.max_image_num_per_column,
    )
