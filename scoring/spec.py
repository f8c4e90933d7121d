"""The feature spec: everything the feature workers need to know about a predictor, as plain data.

Owns the dataclasses and their JSON form. It is extracted once by `predictor.py` (which imports AutoGluon) and applied by
`features.py` (which does not): importing autogluon.multimodal costs 28 s and 1 GB a process, this module nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

SPEC_VERSION = 2

CategoryKind = Literal["string", "number", "bool"]
Scalar = str | int | float | bool


@dataclass(frozen=True)
class NumericalColumn:
    """One numerical column. Arithmetic is upstream's, in float64: fill nulls, subtract `mean`, divide by `scale`."""

    name: str
    fill: float
    mean: float | None
    scale: float | None


@dataclass(frozen=True)
class CategoricalColumn:
    """One categorical column: `values[i]` has code i; anything else, nulls included, has code `unknown`.

    `fill` is the code of a null where upstream imputes categories (None: a null is unknown).
    """

    name: str
    kind: CategoryKind
    values: tuple[Scalar, ...]
    unknown: int
    fill: int | None = None


@dataclass(frozen=True)
class TextColumn:
    """One text column. `origin` says what was fitted: free text, or a category or number that upstream writes out."""

    name: str
    origin: Literal["text", "categorical", "numerical"] = "text"
    template: str = "direct"


@dataclass(frozen=True)
class ImageColumn:
    """One image column; `fitted_as` is upstream's column type when the predictor was trained."""

    name: str
    fitted_as: Literal["image_path", "image_bytearray", "image_base64_str"]


@dataclass(frozen=True)
class TextModel:
    """How the text model `prefix` builds its one token sequence a row (TextProcessor.build_one_token_sequence)."""

    prefix: str
    tokenizer_json: str
    cls_id: int
    sep_id: int
    eos_id: int
    pad_id: int
    max_len: int
    insert_sep: bool
    segment_num: int
    normalize: bool

    @property
    def eos_only(self) -> bool:
        return self.cls_id == self.sep_id == self.eos_id


@dataclass(frozen=True)
class ImageModel:
    """How the image model `prefix` prepares one image: transforms (in order), then `size` x `size` RGB, mean and std."""

    prefix: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transforms: tuple[str, ...]
    max_images: int


@dataclass(frozen=True)
class LabelScaler:
    """How a regression's label was scaled: `standard` (x * scale + offset undoes it) or `minmax` ((x - offset) / scale).

    None is a step that is left out.
    """

    kind: Literal["standard", "minmax"]
    scale: float | None
    offset: float | None

    @property
    def unit(self) -> float:
        """What differences of the label are measured in: its standard deviation, or its range."""
        scale = self.scale or 1.0
        return scale if self.kind == "standard" else 1.0 / scale


@dataclass(frozen=True)
class FeatureSpec:
    """A predictor's columns, models and labels. `skip_missing`: upstream drops rows whose image is null.

    `has_sigmoid`: upstream applies one to the logits. `weights` is a hash of the network and of all else here: what engines
    and exported graphs are kept under.
    """

    label: str
    problem_type: Literal["binary", "multiclass", "regression"]
    class_labels: tuple[Scalar, ...]
    numerical: tuple[NumericalColumn, ...]
    categorical: tuple[CategoricalColumn, ...]
    text: tuple[TextColumn, ...]
    image: tuple[ImageColumn, ...]
    numerical_models: tuple[str, ...]
    categorical_models: tuple[str, ...]
    text_models: tuple[TextModel, ...]
    image_models: tuple[ImageModel, ...]
    skip_missing: bool
    label_scaler: LabelScaler | None = None
    has_sigmoid: bool = False
    weights: str = ""
    version: int = SPEC_VERSION

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns the predictor reads, each once, in upstream's order (image, text, numerical, categorical)."""
        groups: tuple[Sequence[ImageColumn | TextColumn | NumericalColumn | CategoricalColumn], ...] = (
            self.image,
            self.text,
            self.numerical,
            self.categorical,
        )
        return tuple(dict.fromkeys(column.name for group in groups for column in group))

    @property
    def is_regression(self) -> bool:
        return self.problem_type == "regression"

    def to_json(self) -> str:
        """The spec as one JSON document; floats survive exactly (shortest repr)."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "FeatureSpec":
        """Read `to_json`'s document. Raises ValueError when it was written by another SPEC_VERSION."""
        data = json.loads(text)
        if data.get("version") != SPEC_VERSION:
            raise ValueError(f"feature spec version {data.get('version')} is not {SPEC_VERSION}")
        return cls(
            label=data["label"],
            problem_type=data["problem_type"],
            class_labels=tuple(data["class_labels"]),
            numerical=tuple(NumericalColumn(**item) for item in data["numerical"]),
            categorical=tuple(
                CategoricalColumn(**{**item, "values": tuple(item["values"])}) for item in data["categorical"]
            ),
            text=tuple(TextColumn(**item) for item in data["text"]),
            image=tuple(ImageColumn(**item) for item in data["image"]),
            numerical_models=tuple(data["numerical_models"]),
            categorical_models=tuple(data["categorical_models"]),
            text_models=tuple(TextModel(**item) for item in data["text_models"]),
            image_models=tuple(
                ImageModel(**{**item, **{key: tuple(item[key]) for key in ("mean", "std", "transforms")}})
                for item in data["image_models"]
            ),
            skip_missing=data["skip_missing"],
            label_scaler=LabelScaler(**data["label_scaler"]) if data["label_scaler"] else None,
            has_sigmoid=data["has_sigmoid"],
            weights=data["weights"],
        )
