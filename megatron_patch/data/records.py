"""What a fine-tuning record says, in any of the spellings in use: Alpaca, ShareGPT, OpenAI messages. Stdlib only."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megatron_patch.data.json_lines import Record, check_characters, parse_object
from megatron_patch.data.prompts import Conversation, Turn

QUESTION_KEYS = ("instruction", "query", "prompt", "question")
ANSWER_KEYS = ("output", "content", "response", "answer", "completion")
# list key → keys of a message's role and text
MESSAGE_LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLE_AND_TEXT = MESSAGE_LISTS["messages"]
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
}


class Names(NamedTuple):
    """Keys of a record's parts; of several, the first that is there counts."""

    question: tuple[str, ...] = QUESTION_KEYS
    input: tuple[str, ...] = ("input",)
    answer: tuple[str, ...] = ANSWER_KEYS
    system: tuple[str, ...] = ("system",)
    history: tuple[str, ...] = ("history",)
    lists: tuple[str, ...] = tuple(MESSAGE_LISTS)


NAMES = Names()
# How --map-keys calls the parts.
PARTS = {
    **{"prompt": "question", "query": "input", "response": "answer", "system": "system", "history": "history"},
    "messages": "lists",
}


def resolve_names(map_keys: str | None) -> Names:
    """The keys that `--map-keys` gives to parts: `{"prompt": "instruction", "query": "input", "response": "output"}`.

    Parts that it does not name keep their own; where it names one of a question's, no list of messages is looked for.
    An empty query, system or history is none. Raises ValueError for what is no JSON object of texts, for unknown parts,
    and for both kinds of record at once.
    """
    if map_keys is None:
        return NAMES
    given = parse_object(map_keys, f"--map-keys {map_keys!r}")
    if not given or not all(isinstance(key, str) for key in given.values()):
        raise ValueError(f'--map-keys {map_keys!r} is no JSON object of names such as {{"prompt": "instruction"}}')
    unknown = [part for part in given if part not in PARTS]
    if unknown:
        raise ValueError(f"--map-keys names {unknown[0]!r}, which is not one of {', '.join(PARTS)}")
    without = [part for part in ("prompt", "response", "messages") if given.get(part) == ""]
    if without:
        raise ValueError(f"--map-keys names nothing for {without[0]}, without which a record is none")
    of_questions = given.keys() & {"prompt", "query", "response"}
    if of_questions and "messages" in given:
        raise ValueError(f"--map-keys names messages and {min(of_questions)}; a record has one or the other")
    names = NAMES._replace(**{PARTS[part]: (key,) if key else () for part, key in given.items()})
    return names._replace(lists=()) if of_questions else names


def conversation(record: Record, names: Names = NAMES) -> Conversation:
    """The turns of a record. Raises ValueError for one that asks or answers nothing, or whose turns do not alternate.

    A question at the end that nobody answers is left out: there is nothing in it to learn.
    """
    for key in names.lists:
        if key in record:
            return _alternating(record, key, names)
    about = _optional(record, names.input)
    turn = Turn(text_of(record, names.question), about or "", text_of(record, names.answer))
    before = [turn for key in names.history for turn in turns_before(record, key)]
    return Conversation(_optional(record, names.system), (*before, turn))


def turns_before(record: Record, key: str) -> list[Turn]:
    """What was said before a record's own question: the pairs of a question and its answer under `key`, if any."""
    said = record.get(key) or []
    if not (isinstance(said, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in said)):
        raise ValueError(f"{key} is no list of pairs of a question and its answer")
    pairs = [dict(zip(("question", "answer"), pair, strict=True)) for pair in said]
    return [Turn(text_of(pair, ("question",)), "", text_of(pair, ("answer",))) for pair in pairs]


def _alternating(record: Record, key: str, names: Names) -> Conversation:
    messages = list(_messages(record[key], key))
    system = _optional(record, names.system)
    if messages and messages[0][0] == "system":
        system = messages.pop(0)[1]
    if messages and messages[-1][0] == "user":
        messages.pop()
    for number, (role, _) in enumerate(messages):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise ValueError(
                f"{key}: message {number + 1} after the system's is of the {role}, not of the {expected}; "
                "questions and answers must take turns, beginning with a question"
            )
    if not messages:
        raise ValueError(f"{key} holds no answer")
    texts = [text for _, text in messages]
    turns = zip(texts[::2], texts[1::2], strict=True)
    return Conversation(system, tuple(Turn(question, "", answer) for question, answer in turns))


def _messages(messages: Any, key: str) -> Iterator[tuple[str, str]]:
    """Role and text of each message."""
    if not isinstance(messages, list):
        raise ValueError(f"{key} is {type(messages).__name__}, not a list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"{key}: message {number} is {type(message).__name__}, not an object")
        names = next(
            (names for names in MESSAGE_LISTS.values() if names[0] in message), MESSAGE_LISTS.get(key, ROLE_AND_TEXT)
        )
        try:
            yield _role(message, names[0]), text_of(message, names[1:])
        except ValueError as error:
            raise ValueError(f"{key}: message {number}: {error}") from None


def _role(message: Mapping[str, Any], key: str) -> str:
    role = text_of(message, (key,))
    if role not in ROLES:
        raise ValueError(f"{key} is {role!r}, not one of {', '.join(ROLES)}")
    return ROLES[role]


def _optional(record: Record, keys: tuple[str, ...]) -> str | None:
    return text_of(record, keys) if any(record.get(key) is not None for key in keys) else None


def text_of(record: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The text under the first of `keys` that the record has. Raises ValueError for none, and for what is no text."""
    for key in keys:
        if key in record:
            if isinstance(record[key], str):
                check_characters(record[key])
                return record[key]
            raise ValueError(f"{key} is {type(record[key]).__name__}, not text")
    raise ValueError(f"no {' or '.join(keys)} among its keys ({', '.join(record) or 'none'})")
