"""Every way to decode images on a machine with a GPU, against Pillow's pixels, on rows of which some are bad; JSON.

python -m tests.pixels FOLDER ROWS [OUT.json]
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.bench_data import Recipe, make_cut
from scoring.columns import MARK_FIELDS, SOURCE_ROW
from scoring.config import ImagesConfig
from scoring.decoding import DecodePlan
from scoring.features import FeatureBuilder
from scoring.images import ImageFetcher
from scoring.spec import FeatureSpec, ImageColumn, ImageModel

MODEL = ImageModel("image", 224, (0.5,) * 3, (0.5,) * 3, ("resize_shorter_side", "center_crop"), 1)
SPEC = FeatureSpec(
    "y", "binary", (0, 1), (), (), (), (ImageColumn("Images", "image_bytearray"),), (), (), (), (MODEL,), False
)
PLANS = {
    "exact": DecodePlan("exact", resizes_on_gpu=True),
    "fast": DecodePlan("fast"),
    "gpu": DecodePlan("gpu", resizes_on_gpu=True),
    "gpu, half on cores": DecodePlan("gpu", resizes_on_gpu=True, cpu_share=0.5),
}
MAX_PIXELS = 10**8


def pixels(cells: pa.ChunkedArray, plan: DecodePlan, *, on_gpu: bool) -> tuple[Any, set[int]]:
    """Pixels (n, size, size, 3) of every row, zeros for those without, and the bad rows."""
    from scoring.collate import collate
    from scoring.device_images import ImageStage
    from scoring.nvjpeg import JpegDecoder

    num = len(cells)
    marks = {field.name: pa.nulls(num, field.type) for field in MARK_FIELDS}
    table = pa.table({"model:Images": cells, SOURCE_ROW: pa.array(range(num), pa.int64()), **marks})
    fetcher = ImageFetcher(ImagesConfig(base="/", max_pixels=MAX_PIXELS))
    features = FeatureBuilder(SPEC, fetcher, plan)(table)
    bad = set(np.flatnonzero(pc.is_valid(features["reason"]).to_numpy(zero_copy_only=False)).tolist())
    if not on_gpu:
        return collate(features, SPEC)["image:pixels"][:, 0], bad
    stage = ImageStage(MODEL, "cuda:0", JpegDecoder() if plan.mode == "gpu" else None, max_pixels=MAX_PIXELS)
    images, failed = stage.load(features)  # on the same stream as what follows
    return images.take(np.arange(num), 1)[:, 0].cpu().numpy(), bad | set(failed)


def check(folder: Path, rows: int) -> dict[str, Any]:
    """{way: share of equal values, largest difference, bad rows}, and how many bad rows there are."""
    cut = make_cut(folder, Recipe(rows=rows, bad=True))
    cells = pa.concat_tables([pq.read_table(file, columns=["Images"]) for file in cut.parquet])["Images"]
    wanted, wanted_bad = pixels(cells, DecodePlan(), on_gpu=False)
    found: dict[str, Any] = {"rows": rows, "bad_injected": cut.num_bad, "bad_reference": len(wanted_bad)}
    for name, plan in PLANS.items():
        got, bad = pixels(cells, plan, on_gpu=plan.uses_gpu)
        difference = np.abs(got.astype(np.int16) - wanted)
        found[name] = {
            "equal": float((difference == 0).mean()),
            "max": int(difference.max()),
            "bad": len(bad),
            "same_bad": bad == wanted_bad,
        }
    return found


if __name__ == "__main__":
    document = check(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps(document, indent=1))
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(json.dumps(document, indent=1) + "\n")
