"""The tokenizer: llama-style BPE trained with sentencepiece, saved as a Hugging Face tokenizer directory."""

import argparse
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from tokenizers import normalizers
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

from examples.quickstart.corpus import read_jsonl

VOCABULARY = 4096
LONGEST_LINE = 4192  # bytes; sentencepiece skips longer "sentences"


def lines_of(texts: Iterable[str]) -> Iterator[str]:
    """The lines of `texts` that sentencepiece can train on."""
    return (line for text in texts for line in text.splitlines() if line and len(line.encode()) < LONGEST_LINE)


def train(lines: Iterable[str], model: Path, vocabulary: int = VOCABULARY) -> None:
    """Write a sentencepiece `model` of `vocabulary` pieces: byte fallback, single digits, text left as it is."""
    with model.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            character_coverage=0.9999,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=2,
            minloglevel=2,
        )


def fast_tokenizer(model: Path) -> PreTrainedTokenizerFast:
    """The same pieces and merges behind the `tokenizers` library."""
    pieces = LlamaTokenizerFast.from_pretrained(model.parent).backend_tokenizer
    # sentencepiece puts its space before every text. The converted tokenizer leaves it out where one stands already,
    # and then "  a" encodes differently.
    pieces.pre_tokenizer = None
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save(lines: Iterable[str], directory: Path, vocabulary: int = VOCABULARY) -> None:
    """Train, and let `directory` appear whole: tokenizer.model, tokenizer.json, tokenizer_config.json."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as unfinished:
        model = Path(unfinished) / "tokenizer.model"
        train(lines, model, vocabulary)
        saved = Path(unfinished) / "saved"
        fast_tokenizer(model).save_pretrained(saved)
        shutil.copy(model, saved)  # save_pretrained leaves the sentencepiece model behind
        saved.replace(directory)


def main() -> None:
    """Train on the documents of a jsonl file."""
    reader = argparse.ArgumentParser(prog="python3 -m examples.quickstart.tokenizer", description=__doc__)
    reader.add_argument("documents", type=Path, help="jsonl with a text per line")
    reader.add_argument("directory", type=Path, help="becomes a Hugging Face tokenizer directory")
    arguments = reader.parse_args()
    save(lines_of(row["text"] for row in read_jsonl(arguments.documents)), arguments.directory)
    print(f"{VOCABULARY} pieces in {arguments.directory}")


if __name__ == "__main__":
    main()
