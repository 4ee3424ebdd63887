"""A sample as a person reads it: its tokens decoded, what is learned highlighted."""

from itertools import groupby

from transformers import PreTrainedTokenizerFast

from megatron_patch.data.instructions import Tokenised

PLAIN = ("⟦", "⟧")
GREEN = ("\x1b[32m", "\x1b[0m")


def shown(record: Tokenised, tokenizer: PreTrainedTokenizerFast, *, is_terminal: bool) -> str:
    """The text of a record's tokens, special ones too; the learned part in green, or in ⟦brackets⟧."""
    opening, closing = GREEN if is_terminal else PLAIN
    text, ids, before = "", [], ""
    for is_learned, group in groupby(zip(record.learned, record.ids, strict=True), key=lambda pair: bool(pair[0])):
        ids += [int(token) for _, token in group]
        # With what is before it, because a tokenizer drops the space at the beginning of what it decodes.
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        part, before = whole[len(before) :], whole
        text += f"{opening}{part}{closing}" if is_learned else part
    return text
