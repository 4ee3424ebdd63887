"""Many texts to token ids at once: the tokenizer's own batches, with the spaces of Llama-style texts put in before."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from megatron_patch.data.pieces import in_groups, is_cut_after_newlines, pieces
from megatron_patch.data.tokenizer import SPACE

CHARACTERS = 1 << 20  # of a long text's pieces that are encoded at once
MARK = 3  # of an added token's first characters: how few there are of these decides what looking for them costs

Encode = Callable[[Sequence[str]], Iterable[list[int]]]  # texts → the ids of each
Spell = Callable[[str], str]


def batch_encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """What encodes texts as `tokenizer` does without special tokens; what it returns can be read once.

    The tokenizers library writes ▁ for every space of a Llama-style text by a regular expression and keeps account of
    each byte, a fifth to a third of its time [tokenizers 0.23]. The same is done here before it is asked, for
    texts in which no added token occurs, since it treats what lies between those as texts of their own.
    """
    if not tokenizer.is_fast:
        return lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    backend = tokenizer.backend_tokenizer
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    spell = _spelling(backend)
    if spell is None or any(SPACE in content or content.split() != [content] for content in added):
        return lambda texts: _ids(backend, texts)
    bare = Tokenizer.from_str(backend.to_str())
    bare.normalizer = bare.pre_tokenizer = None
    is_cut = is_cut_after_newlines(bare)
    marks = {content[:MARK] for content in added}

    def has_added(text: str) -> bool:
        return any(mark in text for mark in marks) and any(content in text for content in added)

    def encode(texts: Sequence[str]) -> Iterable[list[int]]:
        is_whole = [has_added(text) for text in texts]
        spelt = [spell(text) for text, whole in zip(texts, is_whole, strict=True) if not whole]
        plain = _ids_of_pieces(bare, [pieces(text) for text in spelt]) if is_cut else _ids(bare, spelt)
        others = _ids(backend, [text for text, whole in zip(texts, is_whole, strict=True) if whole])
        return (next(others if whole else plain) for whole in is_whole)

    return encode


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterable[list[int]]:
    """Encoded now, by all threads; made lists when they are asked for, which takes the interpreter's lock."""
    return (encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))


def _ids_of_pieces(tokenizer: Tokenizer, texts: Sequence[Sequence[str]]) -> Iterable[list[int]]:
    """The same of texts in pieces. Of a long text only what was made of a few pieces is ever held beside their ids."""
    every, is_long = chain.from_iterable(texts), any(len(text) > 1 for text in texts)
    if not is_long:
        return _ids(tokenizer, list(every))
    made = [array("I", ids) for group in in_groups(every, CHARACTERS) for ids in _ids(tokenizer, group)]
    ids = iter(made)
    return (list(chain.from_iterable(islice(ids, len(text)))) for text in texts)


def _spelling(tokenizer: Tokenizer) -> Spell | None:
    """What the tokenizer does to a text before its model sees it, where that is spaces alone; None where it is not."""
    replace = normalizers.Replace(" ", SPACE)
    before = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    known: list[tuple[object, object, Spell]] = [(before, None, _after_space), (replace, None, _as_it_is)]
    for scheme, spell in (("always", _after_a_space), ("first", _after_a_space), ("never", _as_it_is)):
        known.append((None, pre_tokenizers.Metaspace(SPACE, scheme, split=False), spell))
    steps = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    return next((spell for *parts, spell in known if tuple(map(_state, parts)) == steps), None)


def _state(part: normalizers.Normalizer | pre_tokenizers.PreTokenizer | None) -> bytes | None:
    return None if part is None else part.__getstate__()


def _as_it_is(text: str) -> str:
    return text.replace(" ", SPACE)


def _after_space(text: str) -> str:
    return SPACE + text.replace(" ", SPACE) if text else text


def _after_a_space(text: str) -> str:
    spelt = text.replace(" ", SPACE)
    return SPACE + spelt if text and not spelt.startswith(SPACE) else spelt
