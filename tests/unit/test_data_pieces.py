"""Long texts in pieces: the tokens are those of the whole, and a tokenizer that could join pieces is not given any."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from megatron_patch.data import encoding, pieces
from megatron_patch.data.pieces import in_groups, is_cut_after_newlines
from megatron_patch.data.tokenizer import SPACE, load_tokenizer

PARTS = st.sampled_from(("\n", "\n\n", " ", "  ", "def ", "self", "\t", "é", "世", "😀", "a", ":\n    ", "\r\n"))
LLAMA = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
    """Both spaces and newlines matter to it; it has no tokens beside those of its model."""
    state = json.loads(load_tokenizer(tokenizer_directory).backend_tokenizer.to_str())
    made = Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "pre_tokenizer": None}))
    made.normalizer = LLAMA
    return made


@settings(deadline=None, database=None)
@given(parts=st.lists(PARTS, max_size=40), longest=st.integers(1, 9), characters=st.integers(1, 30))
def test_the_tokens_of_pieces_are_those_of_the_whole(parts, longest, characters, tokenizer):
    texts = ["".join(parts), "short", "".join(reversed(parts))]
    encode = encoding.batch_encoder(SimpleNamespace(is_fast=True, backend_tokenizer=tokenizer))
    with mock.patch.object(pieces, "LONGEST", longest), mock.patch.object(encoding, "CHARACTERS", characters):
        found = [list(ids) for ids in encode(texts)]
    assert found == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_a_text_is_cut_after_newlines_alone(tokenizer):
    with mock.patch.object(pieces, "LONGEST", 4):
        assert pieces.pieces("ab\ncd\nefghijk\nl\n") == ["ab\n", "cd\n", "efghijk\n", "l\n"]
        assert pieces.pieces("abcdefgh") == ["abcdefgh"]
        assert pieces.pieces("") == [""]


def test_groups_hold_so_many_characters_or_one_text():
    assert list(in_groups(["a", "bc", "defgh", "i", "j"], 3)) == [["a", "bc"], ["defgh"], ["i", "j"]]


@pytest.mark.parametrize(
    ("model", "is_cut"),
    [
        (models.BPE(FALLBACK, [], byte_fallback=True), True),
        (models.BPE({"\n": 0, "a": 1, "a\n": 2}, [("a", "\n")]), True),
        (models.BPE({"\n": 0, "a": 1, "\na": 2}, [("\n", "a")]), False),
        (models.BPE({"\n": 0, "\n\n": 1}, [("\n", "\n")]), False),
        (models.BPE({"a": 0}, []), False),
        (models.BPE(FALLBACK, []), False),
        (models.BPE({"\n": 0}, [], dropout=0.1), False),
        (models.BPE({"\n": 0}, [], ignore_merges=True), False),
        (models.BPE({"\n": 0}, [], end_of_word_suffix="</w>"), False),
        (models.Unigram([("\n", 0.0)]), False),
    ],
    ids=range(10),
)
def test_what_could_join_pieces_is_not_given_any(model, is_cut):
    assert is_cut_after_newlines(Tokenizer(model)) == is_cut
