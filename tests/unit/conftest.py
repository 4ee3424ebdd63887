"""Fixtures that several unit tests share."""

import inspect
import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

VOCABULARY = 600


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    """A llama-style tokenizer with byte fallback, trained from the text of a standard library module."""
    directory = tmp_path_factory.mktemp("tokenizer")
    lines = [line for line in inspect.getsource(inspect).splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True, "legacy": False}))
    AutoTokenizer.from_pretrained(directory, local_files_only=True).save_pretrained(directory)
    return directory
