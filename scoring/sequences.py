"""One token sequence a row for each text model, equal to upstream's TextProcessor, a block at a time.

Owns how a row's fields are trimmed and joined. What a text's tokens are is the tokenizer's, by its words where that is the
same (`words.py`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scoring.spec import TextModel
from scoring.words import WordTokenizer, splits_into_words

Int64 = npt.NDArray[np.int64]


class TokenSequences:
    """Builds one model's token sequences (TextProcessor.build_one_token_sequence)."""

    def __init__(self, model: TextModel) -> None:
        from tokenizers import Tokenizer

        self.model = model
        self._tokenizer = Tokenizer.from_str(model.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._words = WordTokenizer(self._tokenizer) if splits_into_words(model.tokenizer_json) else None

    def build(self, texts: Mapping[str, pa.LargeStringArray]) -> tuple[pa.ListArray, pa.ListArray]:
        """Texts by column, each n long -> n lists of token ids, int32, at most `max_len` long, and of their segment ids."""
        return join_fields([self._encode(column) for column in texts.values()], self.model)

    def _encode(self, texts: pa.LargeStringArray) -> pa.ListArray:
        if self.model.normalize:
            texts = pa.array([normalize_text(text) for text in texts.to_pylist()], pa.large_string())
        if self._words is not None:
            return self._words.encode(texts)
        encodings = self._tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
        return pa.array([encoding.ids for encoding in encodings], pa.list_(pa.int32()))


def join_fields(fields: Sequence[pa.ListArray], model: TextModel) -> tuple[pa.ListArray, pa.ListArray]:
    """The rows' fields, a column each, as upstream joins them: token ids and segment ids, int32 lists.

    All rows' tokens are one array meanwhile: as Python's lists they took twice the time.
    """
    values = [field.flatten().to_numpy() for field in fields]
    lengths = np.stack([field.value_lengths().to_numpy() for field in fields], axis=1).astype(np.int64)
    first = np.cumsum(lengths, axis=0) - lengths
    kept = _trim(lengths, model.max_len - _num_special(model, len(fields)))
    with_sep = kept + int(model.insert_sep)
    has_cls = int(not model.eos_only)
    is_open = _last_tokens(values, first, kept, model) != model.eos_id
    counts = has_cls + with_sep.sum(axis=1) + is_open
    place = starts = np.cumsum(counts) - counts
    # SEP wherever nothing else is put.
    tokens = np.full(int(counts.sum()), model.sep_id, dtype=np.int32)
    if has_cls:
        tokens[starts] = model.cls_id
        place = starts + 1
    for column, ids in enumerate(values):
        num = kept[:, column]
        whole = np.array_equal(num, lengths[:, column])
        tokens[_spans(place, num)] = ids if whole else ids[_spans(first[:, column], num)]
        place = place + with_sep[:, column]
    tokens[place[is_open]] = model.eos_id
    return _lists(tokens, counts), _segments(with_sep, is_open, model.segment_num)


def _num_special(model: TextModel, num_fields: int) -> int:
    """Tokens that the budget for texts leaves room for, as upstream counts them."""
    return (num_fields + 1 if model.insert_sep else 2) - int(model.eos_only)


def _trim(lengths: Int64, budget: int) -> Int64:
    kept = lengths.copy()
    for row in np.flatnonzero(lengths.sum(axis=1) > budget).tolist():
        kept[row] = trim_lengths(lengths[row].tolist(), budget)
    return kept


def _last_tokens(values: Sequence[npt.NDArray[np.int32]], first: Int64, kept: Int64, model: TextModel) -> Int64:
    """Each row's last token before EOS is thought of; -1 where there is none."""
    if model.insert_sep:
        return np.full(len(kept), model.sep_id, dtype=np.int64)
    last = np.full(len(kept), -1 if model.eos_only else model.cls_id, dtype=np.int64)
    for column, ids in enumerate(values):
        some = kept[:, column] > 0
        last[some] = ids[(first + kept - 1)[some, column]]
    return last


def _segments(with_sep: Int64, is_open: npt.NDArray[np.bool_], segment_num: int) -> pa.ListArray:
    """Upstream starts the segments with one entry even where there is no CLS token; kept, so that they are equal."""
    counts = 1 + with_sep.sum(axis=1) + is_open
    segments = np.zeros(int(counts.sum()), dtype=np.int32)
    if segment_num > 1:
        place = np.cumsum(counts) - counts + 1
        num_fields = with_sep.shape[1]
        for column in range(num_fields):
            segments[_spans(place, with_sep[:, column])] = column % segment_num
            place = place + with_sep[:, column]
        segments[place[is_open]] = num_fields % segment_num
    return _lists(segments, counts)


def _spans(starts: Int64, counts: Int64) -> Int64:
    """The places start, start + 1, ... of each row, `counts` of them, one row after the other."""
    places: Int64 = np.arange(int(counts.sum())) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return places


def _lists(values: npt.NDArray[np.int32], counts: Int64) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def trim_lengths(lengths: list[int], budget: int) -> list[int]:
    """Cut the longest fields first until their sum is `budget` (TextProcessor.get_trimmed_lengths, do_merge=True)."""
    if sum(lengths) <= budget:
        return lengths
    trimmed = [0] * len(lengths)
    while (remainder := budget - sum(trimmed)) > 0:
        open_fields = [i for i, length in enumerate(lengths) if length > trimmed[i]]
        if remainder < len(open_fields):
            for i in open_fields[:remainder]:
                trimmed[i] += 1
            break
        step = min(min(lengths[i] - trimmed[i] for i in open_fields), remainder // len(open_fields))
        for i in open_fields:
            trimmed[i] += step
    return trimmed


def normalize_text(text: str) -> str:
    """Upstream's `data.text.normalize_text`: repair mixed utf-8 and cp1252, then transliterate to ASCII."""
    import codecs

    from text_unidecode import unidecode

    def as_utf8(error: UnicodeError) -> tuple[bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        return error.object[error.start : error.end].encode("utf-8"), error.end

    def as_cp1252(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        return error.object[error.start : error.end].decode("cp1252"), error.end

    codecs.register_error("scoring_utf8", as_utf8)
    codecs.register_error("scoring_cp1252", as_cp1252)
    repaired = text.encode("raw_unicode_escape").decode("utf-8", errors="scoring_cp1252")
    repaired = repaired.encode("cp1252", errors="scoring_utf8").decode("utf-8", errors="scoring_cp1252")
    return str(unidecode(repaired))
