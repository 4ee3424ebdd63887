"""Tokenizer directories."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from megatron_patch.data.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size


def test_added_tokens_count(tokenizer_directory):
    tokenizer = load_tokenizer(tokenizer_directory)
    assert vocabulary_size(tokenizer) == 600
    tokenizer.add_tokens(["<one>", "<two>"])
    assert vocabulary_size(tokenizer) == 602
    check_vocabulary(tokenizer, 602)
    with pytest.raises(ValueError, match="ids up to 601, but the model has vocab_size 601"):
        check_vocabulary(tokenizer, 601)


def test_settings_of_whoever_saved_it_do_not_cut_texts(tokenizer_directory, tmp_path):
    directory = Path(shutil.copytree(tokenizer_directory, tmp_path / "t"))
    saved = json.loads((directory / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(saved))
    assert len(load_tokenizer(directory).backend_tokenizer.encode("a b c d e f g h i j").ids) > 4


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent' does not exist"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_a_directory_without_usable_tokenizer_is_named(content, tmp_path):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)


def test_python_in_the_directory_runs_only_when_trusted(tokenizer_directory, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", sys.path.copy())
    directory = Path(shutil.copytree(tokenizer_directory, tmp_path / "t"))
    witness = tmp_path / "ran"
    (directory / "own.py").write_text(
        f"open({str(witness)!r}, 'w').close()\nfrom transformers import LlamaTokenizer\nOwn = LlamaTokenizer\n"
    )
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(directory)
    except ValueError as error:
        assert "holds no tokenizer" in str(error)
    assert not witness.exists()
    load_tokenizer(directory, trust_remote_code=True)
    assert witness.exists()
