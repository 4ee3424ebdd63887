"""Text to tokens and back: one BOS, whole characters, nothing of what ends an answer."""

import pytest

from megatron_patch.data.tokenizer import load_tokenizer
from megatron_patch.inference.text import TextStream, decode, encode, holds_stop


@pytest.fixture
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


@pytest.mark.parametrize("text", ["def f(x):", "<s>def f(x):", "<s><s>def f(x):"])
def test_a_prompt_begins_with_exactly_one_bos(tokenizer, text):
    ids = encode(tokenizer, text)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert encode(tokenizer, "<s>def", adds_special_tokens=False).count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_ends_texts_does_not_end_a_prompt(tokenizer):
    tokenizer.add_eos_token = True
    tokenizer.update_post_processor()
    assert tokenizer("def").input_ids[-1] == tokenizer.eos_token_id, "the case has lost its point"
    assert encode(tokenizer, "def")[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["def f(x): return  x", "naïve 世界 😀!", "  two\n\nlines "])
def test_streamed_text_is_the_decoded_one_in_whole_characters(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    stream = TextStream(tokenizer)
    pieces = [*(stream.add(token) for token in tokens), stream.finish()]
    assert "".join(pieces) == decode(tokenizer, tokens)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(not piece for piece in pieces) >= sum(len(c.encode()) - 1 for c in text if ord(c) > 0x3000), "held back"


def test_bytes_that_never_become_a_character_are_told_at_the_end(tokenizer):
    (first, *_) = (token for token in tokenizer("世", add_special_tokens=False).input_ids[-3:])
    stream = TextStream(tokenizer)
    assert (stream.add(first), stream.finish()) == ("", "\ufffd")


def test_nothing_of_a_stop_string_is_streamed(tokenizer):
    tokens = tokenizer("return value, end of it", add_special_tokens=False).input_ids
    stream = TextStream(tokenizer, (", end",))
    pieces = [*(stream.add(token) for token in tokens), stream.finish()]
    assert "".join(pieces) == "return value" == decode(tokenizer, tokens, (", end",))
    almost = TextStream(tokenizer, (", ending",))
    assert "".join([*(almost.add(token) for token in tokens), almost.finish()]) == "return value, end of it"


def test_a_stop_string_is_found_when_its_last_token_has_come(tokenizer):
    tokens = tokenizer("a long beginning 世界 and then", add_special_tokens=False).input_ids
    found = [count for count in range(1, len(tokens) + 1) if holds_stop(tokenizer, tokens[:count], ("世界",))]
    assert found and decode(tokenizer, tokens[: found[0]]).endswith("世界")
