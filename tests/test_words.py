"""Words tokenised once each: the same ids as the tokenizer gives for whole texts, whatever is in them."""

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from scoring import words
from scoring.words import WordTokenizer, splits_into_words

PIECES = [
    "a",
    "b",
    "##a",
    "##b",
    "ab",
    "é",
    "e",
    "##e",
    "ς",
    "\u03c3",
    "##\u03c3",
    "中",
    "文",
    ".",
    "-",
    "'",
    "##1",
    "1",
    "i",
    "̇",
]
SPECIAL = ["[UNK]", "[SEP]", "[MASK]"]


def tokenizer(normalizer: Any, pre_tokenizer: Any, added: tuple[AddedToken, ...] = ()) -> Tokenizer:
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *PIECES])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[1:]])
    made.add_tokens(list(added))
    return made


TOKENIZERS = {
    "uncased": tokenizer(normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "cased": tokenizer(normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer()),
    "accents kept": tokenizer(normalizers.BertNormalizer(strip_accents=False), pre_tokenizers.BertPreTokenizer()),
    "plain": tokenizer(None, pre_tokenizers.Whitespace()),
    "composed": tokenizer(normalizers.NFC(), pre_tokenizers.WhitespaceSplit()),
    "single words": tokenizer(
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        (AddedToken("ab", single_word=True), AddedToken("b-", lstrip=True, rstrip=True)),
    ),
}
# White space of every kind, controls, marks that combine, letters whose case depends on where they stand, added tokens.
texts = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIAL, *PIECES, " ", "  ", "\t", "\n", "\r", "\x0b", "\x1c", "\x85", "\xa0", "\u2003", "\u3000"]
        ),
        st.sampled_from(
            ["\u0301", "\u0345", "\u200d", "\ufeff", "\x00", "İ", "Σ", "ß", "ﬁ", "Á", "A\u030a", "\U0001f600"]
        ),
        st.text(max_size=3),
    ),
    max_size=12,
).map("".join)


def ids_of(subject: WordTokenizer, batch: list[str]) -> list[list[int]]:
    found: list[list[int]] = subject.encode(pa.array(batch, pa.large_string())).to_pylist()
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@given(batches=st.lists(st.lists(texts, max_size=4), max_size=3))
@example(batches=[["a [SEP]b", " ab  ab ", "ab\u0301 a", "", " "], ["[MASK] [SEP]", "b- ab-"]])
def test_ids_are_those_of_the_whole_text(name: str, batches: list[list[str]]) -> None:
    whole = TOKENIZERS[name]
    assert splits_into_words(whole.to_str())
    subject = WordTokenizer(whole)
    for batch in batches:
        wanted = [encoding.ids for encoding in whole.encode_batch_fast(batch, add_special_tokens=False)]
        assert ids_of(subject, batch) == wanted


def test_a_word_is_tokenised_once_and_the_cache_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MAX_WORDS", 4)
    asked: list[list[str]] = []

    class Counting:
        def encode_batch_fast(self, batch: list[str], **options: Any) -> Any:
            asked.append(sorted(batch))
            return TOKENIZERS["uncased"].encode_batch_fast(batch, **options)

    subject = WordTokenizer(Counting())
    long = "ab" * 40
    for batch in (["a b", "b a"], ["ab b " + long], [long], ["1 . - a b"]):
        wanted = [encoding.ids for encoding in TOKENIZERS["uncased"].encode_batch_fast(batch, add_special_tokens=False)]
        assert ids_of(subject, batch) == wanted
    assert asked == [["a", "b"], ["ab", long], [long], ["-", ".", "1", "a", "b"]]


@pytest.mark.parametrize(
    ("change", "splits"),
    [
        ({}, True),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, False),
        ({"pre_tokenizer": {"type": "Metaspace"}}, False),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, False),
        ({"pre_tokenizer": None}, False),
        ({"normalizer": {"type": "Precompiled"}}, False),
        ({"normalizer": {"type": "Replace"}}, False),
        ({"added_tokens": [{"content": "two words"}]}, False),
    ],
)
def test_other_tokenizers_get_whole_texts(change: dict[str, Any], splits: bool) -> None:
    document = {**json.loads(TOKENIZERS["uncased"].to_str()), **change}
    assert splits_into_words(json.dumps(document)) is splits
