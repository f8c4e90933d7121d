"""Batches packed for one copy: every array arrives as it was; and what a GPU's engine is given is what the host has."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from scoring import staging
from scoring.device_images import DeviceImages
from scoring.engines.base import Shapes
from scoring.spec import ImageModel
from scoring.staging import Batch
from scoring.upload import upload

MODEL = ImageModel("image", 2, (0.5,) * 3, (0.5,) * 3, ("resize_to_square",), 2)


def test_arrays_arrive_with_their_shapes_types_and_values() -> None:
    rng = np.random.default_rng(0)
    batches: list[dict[str, npt.NDArray[Any]]] = [
        {
            "numbers": rng.normal(size=(rows, 3)).astype(np.float32),
            "none": np.empty((rows, 0), dtype=np.float32),
            "tokens": rng.integers(0, 99, (rows, 7), dtype=np.int32),
            "turned": rng.integers(0, 99, (5, rows), dtype=np.int64).T,
            "bytes": rng.integers(0, 255, (rows, 1, 3), dtype=np.uint8),
        }
        for rows in (1, 64, 129)
    ]
    found = upload(batches, "cpu")
    assert [list(batch) for batch in found] == [list(batch) for batch in batches]
    for tensors, arrays in zip(found, batches, strict=True):
        for name, tensor in tensors.items():
            assert tensor.is_contiguous()
            assert tensor.numpy().dtype == arrays[name].dtype
            np.testing.assert_array_equal(tensor.numpy(), arrays[name])
    assert upload([], "cpu") == []
    assert upload([{}], "cpu") == [{}]


def test_what_an_engine_is_given_is_the_batch_padded_to_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(staging, "CUDA", "cpu")
    rng = np.random.default_rng(1)
    pixels = torch.from_numpy(rng.integers(1, 255, (6, 2, 2, 3), dtype=np.uint8))
    pixels[-1] = 0
    images = DeviceImages(2, pixels, np.array([[0, 1], [2, 5], [5, 5], [3, 4]]))
    arrays = {
        "text:token_ids": rng.integers(1, 99, (3, 5), dtype=np.int32),
        "text:valid_length": np.array([5, 2, 3]),
        "image:image_num": np.array([2, 1, 2]),
    }
    batch = Batch(np.array([3, 1, 0]), arrays, images, MODEL)
    assert batch.padded().keys() == batch.complete().keys(), "not uploaded: as it is"
    (uploaded,) = staging._upload([batch], Shapes((4, 8), (8, 16)))
    found = {name: np.asarray(array) for name, array in uploaded.padded().items()}
    wanted = {name: np.asarray(array) for name, array in batch.complete().items()}
    assert wanted["image:pixels"].shape == (3, 2, 2, 2, 3)
    np.testing.assert_array_equal(wanted["image:pixels"][0], pixels[[3, 4]])
    assert found.keys() == wanted.keys()
    assert found["text:token_ids"].shape == (4, 8)
    for name, array in wanted.items():
        rows = found[name][:3, :5] if name == "text:token_ids" else found[name][:3]
        np.testing.assert_array_equal(rows, array)
        np.testing.assert_array_equal(found[name][3], found[name][2], err_msg="the last row is repeated")
    assert not found["text:token_ids"][:, 5:].any()
    part = uploaded.take(np.array([2]))
    np.testing.assert_array_equal(np.asarray(part.padded()["image:pixels"])[0], pixels[[0, 1]])
