"""What a `.bin/.idx` pair says about itself in `<prefix>.json`: who made its tokens, from what, and how many there are.

Standard library only, so that a plan can afford it. Datasets of other programs have no such file and are accepted.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_patch.data.index_header import IndexHeader

FORMAT_VERSION = 1
FINE_TUNING = "fine-tuning"  # the `kind` of samples; documents for pre-training have none, or the other
OF_DOCUMENTS = (None, "text")
READ_AT_ONCE = 1 << 20


def tokenizer_identity(name: str, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """What a tokenizer is known by: its directory, its ids (added tokens included), and a hash of token → id."""
    ordered = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    digest = hashlib.sha256(json.dumps(ordered, ensure_ascii=True).encode()).hexdigest()
    return {"name": name, "vocabulary": ordered[-1][1] + 1 if ordered else 0, "sha256": digest}


def describe_source(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A source file's path, size in bytes and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with Path(path).open("rb") as file:
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
            size += len(block)
    return {"path": os.fspath(path), "bytes": size, "sha256": digest.hexdigest()}


def describe(
    tokenizer: Mapping[str, Any],
    dtype: str,
    counts: Mapping[str, int],
    sources: Iterable[Mapping[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """The content of a sidecar. `counts` are documents, tokens and whatever else was counted; `more` is told as it is.

    Nothing in it depends on when, where or by how many workers the dataset was made.
    """
    head = {"format_version": FORMAT_VERSION, "tokenizer": dict(tokenizer), "dtype": dtype, **counts}
    return {**head, **more, "sources": list(sources)}


def read_sidecar(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The sidecar of a pair; None where there is none. Raises ValueError for one that cannot be understood."""
    path = Path(f"{os.fspath(prefix)}.json")
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        version = content["format_version"]
        if version == FORMAT_VERSION:
            _ = [content["tokenizer"][key] for key in ("name", "sha256", "vocabulary")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a dataset ({error}); remove it or preprocess again") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; version {FORMAT_VERSION} is read here")
    return content


def check_sidecar(header: IndexHeader, tokenizer: Mapping[str, Any]) -> str | None:
    """Hold a pair's sidecar against the pair and the tokenizer of a run; returns a note where there is no sidecar.

    Raises ValueError naming both tokenizers when their vocabularies differ, or both counts when the files do.
    """
    content = read_sidecar(header.prefix)
    if content is None:
        return f"{header.prefix} has no {Path(header.prefix).name}.json: which tokenizer made it cannot be verified"
    for name in ("dtype", "documents", "sequences", "tokens"):
        told, found = content.get(name), getattr(header, name)
        if told is not None and told != found:
            raise ValueError(
                f"{header.prefix}.json says {name} {told}, but the dataset has {found}; "
                "the files come from two different runs, preprocess again"
            )
    made_by = content["tokenizer"]
    if made_by["sha256"] != tokenizer["sha256"]:
        names = [f"{one['name']!r} ({one['vocabulary']} ids)" for one in (made_by, tokenizer)]
        raise ValueError(
            f"{header.prefix} was made with the tokenizer {names[0]}, but this run has {names[1]}, and their tokens "
            "differ; preprocess again, or name the dataset's tokenizer with --tokenizer-model"
        )
    return None


def check_made_for(prefix: str | os.PathLike[str], sample_length: int | None) -> None:
    """Hold a pair's sidecar, if there is one, against what a run reads: fine-tuning samples of `sample_length` tokens,
    or (None) documents for pre-training. Raises ValueError where it says something else."""
    content = read_sidecar(prefix)
    if content is None:
        return
    kind, made_with = content.get("kind"), content.get("seq_length")
    if sample_length is None and kind not in OF_DOCUMENTS:
        raise ValueError(
            f"{os.fspath(prefix)} holds {kind} samples, not documents for pre-training; fine-tune on it (SFT true), or "
            "name a dataset of documents"
        )
    if sample_length is not None and kind != FINE_TUNING:
        raise ValueError(
            f"{os.fspath(prefix)} holds {kind or 'pre-training'} data, not fine-tuning samples; "
            "build it with toolkits/sft_data_preprocessing"
        )
    if sample_length is not None and made_with not in (None, sample_length):
        raise ValueError(
            f"{os.fspath(prefix)} was made with SEQ_LEN {made_with}, and this run has SEQ_LEN {sample_length}; "
            "train with its own, or build it again"
        )
