"""How dataset paths are written."""

import pytest

from megatron_patch.data.paths import Source, parse_blend, split_words


@pytest.mark.parametrize(
    ("words", "sources"),
    [
        (["a"], [Source("a")]),
        (["a", "b"], [Source("a"), Source("b")]),
        (["0.5", "a", "0.5"], [Source("0.5"), Source("a"), Source("0.5")]),
        (["30", "a", "7e1", "b"], [Source("a", 30.0), Source("b", 70.0)]),
        (["1", "a"], [Source("a", 1.0)]),
    ],
)
def test_paths_are_prefixes_or_weights_and_prefixes(words, sources):
    assert parse_blend(words) == sources


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1", "p", "q", "r"], "'q' stands where a weight is expected"),
        (["p", "q", "1", "r"], "'p' stands where a weight is expected"),
        (["0", "p", "1", "q"], "weight 0 of"),
        (["-1", "p"], "weight -1 of"),
        (["nan", "p"], "weight nan of"),
    ],
)
def test_half_a_blend_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_blend(words)


def test_an_existing_prefix_with_spaces_is_one_word(tmp_path):
    prefix = f"{tmp_path}/my data"
    assert split_words(f"{prefix} 2") == (f"{tmp_path}/my", "data", "2")
    (tmp_path / "my data.idx").touch()
    assert split_words(prefix) == (prefix,)
    assert split_words(f"0.5 '{prefix}' 0.5 b") == ("0.5", prefix, "0.5", "b")


@pytest.mark.parametrize(("argument", "message"), [(" ", "is empty"), ("'a", "No closing quotation")])
def test_words_that_cannot_be_split_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        split_words(argument)
