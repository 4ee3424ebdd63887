"""Tokenizer directories: loading them offline, and holding their vocabulary against a model's."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast


def load_tokenizer(directory: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The fast tokenizer saved in `directory`. Nothing is downloaded; its Python code runs only if trusted.

    Raises FileNotFoundError when there is no such directory and ValueError when it holds no usable tokenizer.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"tokenizer directory {os.fspath(directory)!r} does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.fspath(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{os.fspath(directory)!r} holds no tokenizer that can be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{os.fspath(directory)!r} holds a slow tokenizer; convert it to tokenizer.json first")
    # A tokenizer.json may carry the settings of whoever saved it; every caller here wants whole texts.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Embedding rows that the tokenizer needs: its highest id + 1, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Raise ValueError unless every id of the tokenizer is a row of a model with `vocab_size` rows."""
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer.name_or_path!r} has ids up to {needed - 1}, but the model has vocab_size "
            f"{vocab_size}; use the tokenizer that belongs to the checkpoint, or enlarge the embedding"
        )
