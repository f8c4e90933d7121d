"""On a machine with a GPU: `pytest -m gpu`. Without one these tests fail, they do not skip."""

from pathlib import Path

import pytest

from tests import gpu

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def test_scores_on_the_gpu_equal_the_cpu_reference(tmp_path: Path) -> None:
    import torch

    assert torch.cuda.is_available(), "this test needs a GPU"
    document = gpu.check(tmp_path / "demo", 1_000)
    assert document["engine"]["used"] == [f"torch-fp32-{torch.cuda.get_device_name(0)}"]
    assert document["totals"]["rows_scored"] == 998
    assert document["against_cpu_fp32"]["max_abs_diff"] <= 1e-4
    assert document["against_cpu_fp32"]["label_flips"] == 0
