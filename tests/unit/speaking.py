"""A tiny model with a tokenizer: a checkpoint directory that answers."""

import shutil
from pathlib import Path

from beside_transformers import peer

VOCABULARY = 600  # the tokenizer's of conftest.py


def write_speaker(directory: Path, tokenizer_directory: Path) -> Path:
    """A Mistral with a window of nine tokens, written by transformers, beside the tokenizer's files."""
    peer("mistral", vocab_size=VOCABULARY, sliding_window=9, max_position_embeddings=200).save_pretrained(directory)
    for path in tokenizer_directory.iterdir():
        shutil.copy(path, directory)
    return directory
