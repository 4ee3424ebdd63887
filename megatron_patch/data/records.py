"""What a fine-tuning record says, in any of the spellings in use: Alpaca, ShareGPT, OpenAI messages. Stdlib only."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_patch.data.json_lines import Record, check_characters
from megatron_patch.data.prompts import Conversation, Turn

QUESTION_KEYS = ("instruction", "query", "prompt", "question")
ANSWER_KEYS = ("output", "content", "response", "answer", "completion")
# list key → keys of a message's role and text
MESSAGE_LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
}


def conversation(record: Record) -> Conversation:
    """The turns of a record. Raises ValueError for one that asks or answers nothing, or whose turns do not alternate.

    A question at the end that nobody answers is left out: there is nothing in it to learn.
    """
    for key in MESSAGE_LISTS:
        if key in record:
            return _alternating(record, key)
    has_input = record.get("input") is not None
    turn = Turn(
        text_of(record, QUESTION_KEYS), text_of(record, ("input",)) if has_input else "", text_of(record, ANSWER_KEYS)
    )
    return Conversation(_system(record), (turn,))


def _alternating(record: Record, key: str) -> Conversation:
    messages = list(_messages(record[key], key))
    system = _system(record)
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
        names = next((names for names in MESSAGE_LISTS.values() if names[0] in message), MESSAGE_LISTS[key])
        try:
            yield _role(message, names[0]), text_of(message, names[1:])
        except ValueError as error:
            raise ValueError(f"{key}: message {number}: {error}") from None


def _role(message: Mapping[str, Any], key: str) -> str:
    role = text_of(message, (key,))
    if role not in ROLES:
        raise ValueError(f"{key} is {role!r}, not one of {', '.join(ROLES)}")
    return ROLES[role]


def _system(record: Record) -> str | None:
    return text_of(record, ("system",)) if record.get("system") is not None else None


def text_of(record: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The text under the first of `keys` that the record has. Raises ValueError for none, and for what is no text."""
    for key in keys:
        if key in record:
            if isinstance(record[key], str):
                check_characters(record[key])
                return record[key]
            raise ValueError(f"{key} is {type(record[key]).__name__}, not text")
    raise ValueError(f"no {' or '.join(keys)} among its keys ({', '.join(record) or 'none'})")
