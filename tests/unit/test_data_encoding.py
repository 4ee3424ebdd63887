"""Texts encoded in batches: what is done to them beforehand changes no token. The witness is the tokenizer itself."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from megatron_patch.data.encoding import SPACE, batch_encoder
from megatron_patch.data.tokenizer import load_tokenizer

REPLACE = normalizers.Replace(" ", SPACE)
ADDED = AddedToken("[x]"), AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False), AddedToken("one word")
STEPS = {
    "prepended": (normalizers.Sequence([normalizers.Prepend(SPACE), REPLACE]), None),
    "replaced": (REPLACE, None),
    "always": (None, pre_tokenizers.Metaspace(SPACE, "always", split=False)),
    "first": (None, pre_tokenizers.Metaspace(SPACE, "first", split=False)),
    "never": (None, pre_tokenizers.Metaspace(SPACE, "never", split=False)),
    "cut into words": (None, pre_tokenizers.Metaspace(SPACE, "first", split=True)),
    "composed": (normalizers.Sequence([normalizers.NFC(), REPLACE]), None),
    "of bytes": (None, pre_tokenizers.ByteLevel()),
    "nothing": (None, None),
}
PIECES = (
    " ",
    "  ",
    SPACE,
    "a",
    "def ",
    "\n",
    "\t",
    "<s>",
    "</s",
    "[x]",
    "[x",
    "<tool>",
    "one word",
    "e\u0301",
    "世",
    "😀",
)
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(st.characters(codec="utf-8"), max_size=4)), max_size=12)


@pytest.fixture(scope="module")
def backend(tokenizer_directory):
    return load_tokenizer(tokenizer_directory).backend_tokenizer.to_str()


def spelt(backend, steps, added=()):
    made = Tokenizer.from_str(backend)
    made.normalizer, made.pre_tokenizer = STEPS[steps]
    made.add_tokens(list(added))
    return made, batch_encoder(SimpleNamespace(is_fast=True, backend_tokenizer=made))


@pytest.mark.parametrize("added", [ADDED[:2], ADDED])
@pytest.mark.parametrize("steps", STEPS)
def test_every_text_has_the_tokens_that_the_tokenizer_gives_it(steps, added, backend):
    whole, encode = spelt(backend, steps, added)

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(TEXTS.map("".join), max_size=4))
    def check(texts):
        assert list(encode(texts)) == [whole.encode(text, add_special_tokens=False).ids for text in texts]

    check()


@pytest.mark.parametrize("steps", list(STEPS)[:5])
def test_spaces_are_put_in_before_the_tokenizer_is_asked(steps, backend):
    whole, encode = spelt(backend, steps)
    wanted = whole.encode("a b", add_special_tokens=False).ids
    whole.normalizer, whole.pre_tokenizer = normalizers.Replace("a b", "c"), None  # asked now, it would say so
    assert list(encode(["a b", "a b</s>"])) == [wanted, whole.encode("c</s>", add_special_tokens=False).ids]


def test_the_tokenizers_of_this_house_are_among_them(tokenizer_directory, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_directory / "tokenizer.model").read_bytes())
    for directory in (tokenizer_directory, tmp_path):
        tokenizer = load_tokenizer(directory)
        wanted = tokenizer.encode(" a b", add_special_tokens=False)
        encode = batch_encoder(tokenizer)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a b", "c")
        assert list(encode([" a b"])) == [wanted]
