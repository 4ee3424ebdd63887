"""How dataset paths are written."""

import pytest

from megatron_patch.data.paths import Source, parse_blend, split_words


@pytest.mark.parametrize(
    ("words", "sources"),
    [
        (["a"], [Source("a")]),
        (["a", "b"], [Source("a"), Source("b")]),
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
        (["0.5", "p", "q"], "'0.5' stands where a prefix is expected"),
        (["p", "0.5"], "'0.5' stands where a prefix is expected"),
    ],
)
def test_half_a_blend_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_blend(words)


def test_a_dataset_may_be_named_by_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7.idx").touch()
    assert parse_blend(["7", "a", "b"]) == [Source("7"), Source("a"), Source("b")]


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


def test_a_file_may_hold_the_words(tmp_path):
    (tmp_path / "blend.txt").write_text("# two\n0.3 a\n0.7 'b c'  # the larger\n")
    assert split_words(f"{tmp_path}/blend.txt") == ("0.3", "a", "0.7", "b c")


def test_a_json_file_has_words_of_its_own_for_each_split(tmp_path):
    (tmp_path / "splits.json").write_text('{"train": [0.3, "a b", 0.7, "c"], "valid": ["d"]}')
    assert split_words(f"{tmp_path}/splits.json") == ("0.3", "a b", "0.7", "c")
    assert split_words(f"{tmp_path}/splits.json", "valid") == ("d",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: Expecting property name"),
        (b'{"valid": ["a"]}', "'train' must be a list of prefixes"),
        (b'{"train": "a"}', "'train' must be a list of prefixes"),
        (b"# nothing\n", "is empty"),
        (b"\xff\xfe", "is neither a prefix nor a file of prefixes"),
    ],
)
def test_a_file_of_something_else_is_refused(content, message, tmp_path):
    (tmp_path / "paths").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        split_words(str(tmp_path / "paths"))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_prefix_is_written_without_its_suffix(suffix, tmp_path):
    for name in ("a.bin", "a.idx"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"write the prefix alone, '{tmp_path}/a'"):
        split_words(f"{tmp_path}/a{suffix}")
