"""A rule that cuts text into sentences, for languages that end them with . ! ? … ؟ । or 。！？. Standard library only.

A mark and the quotes or brackets closed after it end a sentence where white space follows and no lower-case letter
after that; after 。！？ nothing need follow. A blank line ends one, too. A full stop does not after an initial (`J.`,
`U.S.`), an abbreviation of the lists below, or the number of a list's item at the beginning of a line.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

MARKS = ".!?…؟۔।॥"
CLOSING = "\"'”’)\\]}»"
OPENING = "\"'“‘([{«¿¡—–*_-"
_BLANK = r"\n[^\S\n]*\n\s*"
# Marks are tried at the first of a run and space is read once, so that time grows with the text and no faster.
_END = re.compile(rf"(?<![{MARKS}])[{MARKS}]+[{CLOSING}]*\s+|[。！？]+[”’」』）》]*\s*|{_BLANK}")
LONGEST_WORD = 20
ABBREVIATIONS = frozenset(
    (
        *("mr", "mrs", "ms", "messrs", "mme", "mlle", "dr", "prof", "rev", "hon", "st", "mt", "vs", "cf", "viz"),
        *("gen", "col", "maj", "capt", "lt", "sgt", "gov", "sen", "rep", "approx", "ca", "e.g", "i.e", "z.b", "d.h"),
    )
)
BEFORE_NUMBERS = frozenset(
    ("no", "nos", "nr", "p", "pp", "ch", "chap", "sec", "vol", "fig", "figs", "eq", "eqs", "art")
)


def split_sentences(text: str, *, keep_space: bool = False) -> list[str]:
    """The sentences of a text, without the white space around them; what holds nothing else is none.

    `keep_space`: each sentence keeps what follows it, so that together they are the text.
    """
    cuts = [0, *_starts(text), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(cuts)]
    if not keep_space:
        pieces = [piece.strip() for piece in pieces]
    return [piece for piece in pieces if piece]


def _starts(text: str) -> Iterator[int]:
    """Where every sentence but the first begins."""
    for match in _END.finditer(text):
        if match.end() < len(text) and _ends_there(text, match):
            yield match.end()


def _ends_there(text: str, match: re.Match[str]) -> bool:
    if match[0][0] in "。！？\n" or re.search(_BLANK, match[0]):
        return True
    following = text[match.end() : match.end() + LONGEST_WORD].lstrip(OPENING)[:1]
    if following.islower():
        return False
    return match[0][0] != "." or not _is_abbreviated(text, match.start(), following)


def _is_abbreviated(text: str, stop: int, following: str) -> bool:
    """Whether the word before a full stop is shortened, or numbers an item."""
    before = text[max(0, stop - LONGEST_WORD) : stop]
    word = before[-1:].strip() and before.split()[-1].lstrip(OPENING)
    if word.isdecimal():
        is_whole = stop <= LONGEST_WORD or "\n" in before  # the line's beginning is in sight
        return is_whole and before.rpartition("\n")[2].strip() == word
    last = word.rpartition(".")[2]
    is_initial = len(last) == 1 and last.isalpha() and (last.isupper() or "." in word)
    plain = word.lower()
    return is_initial or plain in ABBREVIATIONS or (plain in BEFORE_NUMBERS and following.isdecimal())
