"""The feature spec's JSON form."""

import json
import math

import pytest

from scoring.spec import (
    CategoricalColumn,
    FeatureSpec,
    ImageColumn,
    ImageModel,
    LabelScaler,
    NumericalColumn,
    TextColumn,
    TextModel,
)

SPEC = FeatureSpec(
    label="label",
    problem_type="multiclass",
    class_labels=(0, 1.5, "two", True),
    numerical=(
        NumericalColumn("n", fill=0.1, mean=1 / 3, scale=5e-324),
        NumericalColumn("m", fill=-0.0, mean=None, scale=None),
        NumericalColumn("o", fill=1.7976931348623157e308, mean=2**53 + 1.0, scale=math.pi),
    ),
    categorical=(
        CategoricalColumn("c", "string", ("a", "1", "\u00e4\u2028\U0001f600"), unknown=3),
        CategoricalColumn("k", "number", (1, 2.5, 1e-7), unknown=0, fill=2),
        CategoricalColumn("b", "bool", (False, True), unknown=2),
    ),
    text=(TextColumn("t"), TextColumn("c", "categorical", "latex"), TextColumn("n", "numerical")),
    image=(ImageColumn("p", "image_path"), ImageColumn("q", "image_base64_str")),
    numerical_models=("numerical_mlp",),
    categorical_models=("categorical_mlp", "ft_transformer"),
    text_models=(
        TextModel(
            prefix="hf_text",
            tokenizer_json='{"version": "1.0", "quote": "\\""}',
            cls_id=101,
            sep_id=102,
            eos_id=102,
            pad_id=0,
            max_len=512,
            insert_sep=True,
            segment_num=2,
            normalize=False,
        ),
    ),
    image_models=(
        ImageModel("timm_image", 224, (0.485, 0.456, 0.406), (0.229, 0.1 + 0.2, 0.225), ("resize_to_square",), 2),
    ),
    skip_missing=True,
    label_scaler=LabelScaler("standard", 0.1 + 0.2, None),
    has_sigmoid=True,
    weights="abc",
)


def test_json_round_trip_is_exact() -> None:
    back = FeatureSpec.from_json(SPEC.to_json())
    assert back == SPEC
    # Equality does not tell 1 from 1.0 or True, nor 0.0 from -0.0; repr does.
    assert repr(back) == repr(SPEC)
    assert back.image_models[0].std[1] == 0.30000000000000004
    assert [type(value) for value in back.class_labels] == [int, float, str, bool]


def test_json_is_plain_data() -> None:
    document = json.loads(SPEC.to_json())
    assert document["version"] == 2
    assert document["numerical"][0] == {"name": "n", "fill": 0.1, "mean": 0.3333333333333333, "scale": 5e-324}
    assert document["categorical"][1]["values"] == [1, 2.5, 1e-07]


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_another_version_is_refused(version: object) -> None:
    document = {**json.loads(SPEC.to_json()), "version": version}
    with pytest.raises(ValueError, match=f"^feature spec version {version} is not 2$"):
        FeatureSpec.from_json(json.dumps(document))
    del document["version"]
    with pytest.raises(ValueError, match=r"^feature spec version None is not 2$"):
        FeatureSpec.from_json(json.dumps(document))


def test_columns_once_each_in_upstreams_order() -> None:
    assert SPEC.columns == ("p", "q", "t", "c", "n", "m", "o", "k", "b")
    assert not SPEC.is_regression
    assert SPEC.text_models[0].eos_only is False
