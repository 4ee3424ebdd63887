"""Tokenizer directories: loading them offline, what they are known by, and their vocabulary against a model's."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_patch.data.index_header import instruction_prefixes, read_header
from megatron_patch.data.sidecar import check_sidecar, tokenizer_identity

SENTENCEPIECE = "tokenizer.model"
SPACE = "\u2581"
PROBE = "  Two  spaces,\n\n\ta ﬁne Å é 世界 ½ "
# Any of these tells what a tokenizer.model beside it is.
HUGGING_FACE = ("tokenizer.json", "tokenizer_config.json", "config.json")


def load_tokenizer(
    path: str | os.PathLike[str], trust_remote_code: bool = False, *, use_fast: bool = True
) -> PreTrainedTokenizerFast:
    """The tokenizer saved in a directory, or a `tokenizer.model` file's; fast unless a slow one is asked for and there.

    A sentencepiece model without any Hugging Face file is read as Llama's. Nothing is downloaded; a directory's Python
    code runs only if trusted. Raises FileNotFoundError when there is no such path, ValueError for no usable tokenizer.
    """
    path = Path(path)
    directory = path.parent if path.name == SENTENCEPIECE and path.is_file() else path
    if not directory.is_dir():
        raise FileNotFoundError(f"tokenizer directory {os.fspath(path)!r} does not exist")
    try:
        tokenizer = _load(directory, trust_remote_code, use_fast)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{os.fspath(path)!r} holds no tokenizer that can be loaded: {reason}") from error
    if not tokenizer.is_fast:
        if use_fast:
            raise ValueError(f"{os.fspath(path)!r} holds a slow tokenizer; convert it to tokenizer.json first")
        return tokenizer
    # A tokenizer.json may carry the settings of whoever saved it; every caller here wants whole texts.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embedding rows that the tokenizer needs: its highest id + 1, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a sidecar says of the tokenizer that made its dataset."""
    return tokenizer_identity(tokenizer.name_or_path, tokenizer.get_vocab())


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its BOS in front of a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def ends_with_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its EOS behind a text."""
    return tokenizer.eos_token_id is not None and tokenizer("a").input_ids[-1] == tokenizer.eos_token_id


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ValueError unless every id of the tokenizer is a row of a model with `vocab_size` rows."""
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer.name_or_path!r} has ids up to {needed - 1}, but the model has vocab_size "
            f"{vocab_size}; use the tokenizer that belongs to the checkpoint, or enlarge the embedding"
        )


def check_datasets(words: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Hold the sidecars of all `.bin/.idx` prefixes among `words` against `tokenizer`; a note for each without one.

    Raises ValueError naming both tokenizers for a pair that another one made, and what `read_header` raises. Words that
    are no prefix of a pair, weights for one, are whoever opens them's.
    """
    known_by = identity(tokenizer)
    names = (name for word in dict.fromkeys(words) for name in (word, instruction_prefixes(word)[0]))
    prefixes = (name for name in names if Path(f"{name}.idx").is_file())
    notes = (check_sidecar(read_header(prefix), known_by) for prefix in prefixes)
    return [note for note in notes if note]


def _load(directory: Path, trust_remote_code: bool, use_fast: bool) -> PreTrainedTokenizerBase:
    name = os.fspath(directory)
    if (directory / SENTENCEPIECE).is_file() and not any((directory / file).is_file() for file in HUGGING_FACE):
        return _from_sentencepiece(directory)
    return AutoTokenizer.from_pretrained(
        name, trust_remote_code=trust_remote_code, use_fast=use_fast, local_files_only=True
    )


def _from_sentencepiece(directory: Path) -> PreTrainedTokenizerFast:
    """The model as Llama's fast tokenizer, which puts a space in front of texts that begin with one, as the model does.

    Raises ValueError for a model whose text rules are not Llama's: only its own files could tell them.
    """
    tokenizer = LlamaTokenizer.from_pretrained(os.fspath(directory), local_files_only=True)
    spaces = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    ids = SentencePieceProcessor(os.fspath(directory / SENTENCEPIECE)).encode(PROBE)
    if tokenizer.encode(PROBE, add_special_tokens=False) != ids:
        raise ValueError(
            f"{SENTENCEPIECE} alone does not say how it treats spaces and characters; save it with its "
            "tokenizer_config.json or tokenizer.json"
        )
    return tokenizer
