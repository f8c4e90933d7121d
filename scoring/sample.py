"""A sample of the run's own rows, as features: what engines are checked and timed on before the bulk is scored.

Owns which rows. They come from shards spread over the whole input, since files are often sorted by day or by source.
"""

import pyarrow as pa
import pyarrow.compute as pc

from scoring.config import ScoreConfig
from scoring.features import FeatureBuilder
from scoring.images import ImageFetcher
from scoring.reading import read_shard
from scoring.shards import InputPlan
from scoring.spec import FeatureSpec

_MAX_SHARDS = 8
# The gate may cost a tenth of a small run, not more; fewer than this many rows would say little.
_SHARE = 10
_MIN_ROWS = 64


def sample_features(inputs: InputPlan, config: ScoreConfig, spec: FeatureSpec) -> pa.Table | None:
    """About `parity.rows` rows of the input that have no fault, as features; None if there are none."""
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
    builder = FeatureBuilder(spec, ImageFetcher(config.images), blank_bad_images=config.images.on_error == "blank")
    features = builder(pa.concat_tables(blocks))
    good = features.filter(pc.is_null(features["reason"]))
    return good if good.num_rows else None
