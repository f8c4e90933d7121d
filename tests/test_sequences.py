"""A row's fields joined to one token sequence: as upstream's loop over the fields does it, whatever the model's tokens are."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from scoring.sequences import join_fields, trim_lengths
from scoring.spec import TextModel

# Few ids, so that a text's own tokens are the special ones too.
ids = st.integers(0, 4)


def by_rows(rows: list[list[list[int]]], model: TextModel) -> tuple[list[list[int]], list[list[int]]]:
    """TextProcessor.build_one_token_sequence, a row at a time."""
    found = []
    for fields in rows:
        budget = model.max_len - (len(fields) + 1 if model.insert_sep else 2) + (1 if model.eos_only else 0)
        tokens = [] if model.eos_only else [model.cls_id]
        segments, segment = [0], 0
        for field, length in zip(fields, trim_lengths([len(field) for field in fields], budget), strict=True):
            tokens += field[:length]
            segments += [segment] * length
            if model.insert_sep:
                tokens.append(model.sep_id)
                segments.append(segment)
            segment = (segment + 1) % model.segment_num
        if not tokens or tokens[-1] != model.eos_id:
            tokens.append(model.eos_id)
            segments.append(segment)
        found.append((tokens, segments))
    return [tokens for tokens, _ in found], [segments for _, segments in found]


@given(
    rows=st.integers(1, 3).flatmap(
        lambda num: st.lists(st.lists(st.lists(ids, max_size=9), min_size=num, max_size=num), min_size=1, max_size=6)
    ),
    special=st.tuples(ids, ids, ids),
    max_len=st.integers(5, 20),
    insert_sep=st.booleans(),
    segment_num=st.integers(1, 3),
)
def test_sequences_are_those_of_upstreams_loop(
    rows: list[list[list[int]]], special: tuple[int, int, int], max_len: int, insert_sep: bool, segment_num: int
) -> None:
    model = TextModel("text", "", *special, 0, max_len, insert_sep, segment_num, False)
    columns = [pa.array(list(column), pa.list_(pa.int32())) for column in zip(*rows, strict=True)]
    tokens, segments = join_fields(columns, model)
    assert (tokens.to_pylist(), segments.to_pylist()) == by_rows(rows, model)
    assert tokens.type == pa.list_(pa.int32())


def test_no_row_has_no_sequence() -> None:
    model = TextModel("text", "", 1, 2, 2, 0, 64, True, 2, False)
    none = pa.array([], pa.list_(pa.int32()))
    tokens, segments = join_fields([none, none], model)
    assert (len(tokens), len(segments)) == (0, 0)
