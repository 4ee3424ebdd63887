"""Tokens and text: a prompt's ids with one BOS, an answer's text, and its characters as they become whole."""

from collections.abc import Sequence
from typing import Any

from megatron_patch.data.tokenizer import ends_with_eos

UNKNOWN = "\ufffd"  # what the first bytes of a character decode to
LONGEST_CHARACTER = 4  # bytes, each a token of its own in the worst case


def encode(tokenizer: Any, text: str, *, adds_special_tokens: bool = True) -> list[int]:
    """The ids of a text that goes on: a BOS in front where the tokenizer puts one, never two, and no EOS behind."""
    ids = list(tokenizer(text, add_special_tokens=adds_special_tokens).input_ids)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while len(ids) > 1 and ids[0] == ids[1] == bos and bos is not None:
        del ids[0]
    if adds_special_tokens and ids[-1:] == [eos] and ends_with_eos(tokenizer):
        del ids[-1]
    return ids


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of `tokens` without special tokens, and with every space that they hold."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode(tokenizer: Any, tokens: Sequence[int], stop_strings: Sequence[str] = ()) -> str:
    """The text of an answer, up to the first stop string in it."""
    text = text_of(tokenizer, tokens)
    ends = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def holds_stop(tokenizer: Any, tokens: Sequence[int], stop_strings: Sequence[str]) -> bool:
    """Whether one of `stop_strings` has just been completed: only the last tokens are read."""
    if not stop_strings:
        return False
    count = LONGEST_CHARACTER * (max(len(stop.encode()) for stop in stop_strings) + 1)
    tail = text_of(tokenizer, tokens[-count:])
    return any(stop in tail for stop in stop_strings)


class TextStream:
    """Text as its tokens come: what `add` returns is never changed by a later token, and holds whole characters.

    Nothing of a stop string is told, nor what may be the beginning of one, nor anything after it.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.tokens: list[int] = []
        self.begin = self.end = 0  # tokens[begin:end] are read; they stay for the spaces that depend on them
        self.held = ""  # read, and perhaps the beginning of a stop string
        self.is_over = False

    def add(self, token: int) -> str:
        """What there is to tell now; empty while a character is not complete."""
        self.tokens.append(token)
        new = self._unread()
        return "" if new.endswith(UNKNOWN) else self._read(new, is_last=False)

    def finish(self) -> str:
        """What was held back, whole or not."""
        return self._read(self._unread(), is_last=True)

    def _unread(self) -> str:
        before = text_of(self.tokenizer, self.tokens[self.begin : self.end])
        return text_of(self.tokenizer, self.tokens[self.begin :])[len(before) :]

    def _read(self, new: str, *, is_last: bool) -> str:
        if new:
            self.begin, self.end = self.end, len(self.tokens)
        text = "" if self.is_over else self.held + new
        ends = [place for stop in self.stop_strings if (place := text.find(stop)) >= 0]
        self.is_over = self.is_over or bool(ends)
        told = min(ends) if ends else len(text) if is_last else len(text) - self._doubtful(text)
        self.held = "" if ends else text[told:]
        return text[:told]

    def _doubtful(self, text: str) -> int:
        """Characters at the end of `text` that a stop string may begin with."""
        beginnings = (stop[:count] for stop in self.stop_strings for count in range(1, len(stop)))
        return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
