"""Long texts in pieces that are encoded each by itself, where that cannot change a token."""

import json
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer

LONGEST = 1 << 16  # characters of a text that is left whole
NEWLINE, NEWLINE_BYTE = "\n", "<0x0A>"
_CHANGES_WORDS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")


def is_cut_after_newlines(tokenizer: Tokenizer) -> bool:
    """Whether a text may be cut after its newlines; `tokenizer` neither normalises nor splits it.

    Byte-pair encoding makes tokens of its vocabulary out of neighbours. Where none of them goes on after a newline,
    none ever reaches across such a cut, and what is on one side of it has no say in the other.
    """
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "BPE" or any(model.get(name) for name in _CHANGES_WORDS):
        return False
    vocabulary = model["vocab"]
    is_known = NEWLINE in vocabulary or (model.get("byte_fallback", False) and NEWLINE_BYTE in vocabulary)
    return is_known and not any(NEWLINE in token[:-1] for token in vocabulary)


def pieces(text: str) -> list[str]:
    """The text in pieces of at most `LONGEST` characters, or up to the first newline after as many."""
    found, begin = [], 0
    while len(text) - begin > LONGEST:
        end = text.rfind(NEWLINE, begin, begin + LONGEST) + 1 or text.find(NEWLINE, begin + LONGEST) + 1
        if end in (0, len(text)):
            break
        found.append(text[begin:end])
        begin = end
    return [*found, text[begin:]]


def in_groups(texts: Iterable[str], characters: int) -> Iterator[Sequence[str]]:
    """Consecutive texts, together of so many characters, or one that is longer."""
    group, size = [], 0
    for text in texts:
        if group and size + len(text) > characters:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group
