"""A sample of the run's own rows: what engines are checked and timed on before the bulk is scored.

Owns which rows, and both forms of them: features as the actors get them, and cells as AutoGluon itself reads them. Rows come
from shards spread over the whole input, since files are often sorted by day or by source.
"""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from scoring.columns import MODEL_PREFIX
from scoring.config import ScoreConfig
from scoring.decoding import DecodePlan
from scoring.features import FeatureBuilder
from scoring.images import ImageFetcher, split_references
from scoring.reading import read_shard
from scoring.shards import InputPlan
from scoring.spec import FeatureSpec

_MAX_SHARDS = 8
# The gate may cost a tenth of a small run, not more; fewer than this many rows would say little.
_SHARE = 10
_MIN_ROWS = 64


@dataclass(frozen=True)
class Sample:
    """The same rows twice: `features` as scoring actors get them, and `raw`, the predictor's columns by their own names.

    An image column of `raw` holds a list of file contents a row, null for an image that is missing.
    """

    features: pa.Table
    raw: pa.Table


def draw_sample(
    inputs: InputPlan, config: ScoreConfig, spec: FeatureSpec, decode: DecodePlan | None = None
) -> Sample | None:
    """About `parity.rows` rows of the input that have no fault; None if there are none."""
    wanted = min(config.parity.rows, max(_MIN_ROWS, inputs.estimated_rows // _SHARE))
    shards = [shard for shard in inputs.shards if shard.estimated_rows]
    chosen = shards[:: -(-len(shards) // _MAX_SHARDS)] if shards else []
    blocks = []
    for shard in chosen:
        share = -(-wanted // len(chosen))
        for block in read_shard(shard, inputs.schema, config.input.csv, block_rows=share):
            blocks.append(block.slice(0, share))
            break
    if not blocks:
        return None
    sample, _ = split_sample(pa.concat_tables(blocks), config, spec, decode)
    return sample if sample.features.num_rows else None


def split_sample(
    table: pa.Table, config: ScoreConfig, spec: FeatureSpec, decode: DecodePlan | None = None
) -> tuple[Sample, pa.Table]:
    """Rows as read -> those without a fault in both forms, and the features of the others, marked with what is wrong."""
    fetcher = ImageFetcher(config.images)
    features = FeatureBuilder(spec, fetcher, decode, blank_bad_images=config.images.on_error == "blank")(table)
    is_good = pc.is_null(features["reason"])
    sample = Sample(features.filter(is_good), _raw_cells(table.filter(is_good), spec, fetcher))
    return sample, features.filter(pc.invert(is_good))


def _raw_cells(table: pa.Table, spec: FeatureSpec, fetcher: ImageFetcher) -> pa.Table:
    images = {column.name: column for column in spec.image}
    max_images = max((model.max_images for model in spec.image_models), default=1)
    columns = {}
    for name in spec.columns:
        cells = table[MODEL_PREFIX + name]
        if name in images:
            references = split_references(cells, images[name], max_images)
            fetched = [row[0] for row in fetcher.fetch_all([[row] for row in references])]
            contents = [[item if isinstance(item, bytes) else None for item in row] for row in fetched]
            cells = pa.array(contents, pa.list_(pa.binary()))
        columns[name] = cells
    return pa.table(columns)
