"""ModelLink's dataset handlers: which columns a record has, and the conversation or the text that they make.

Standard library only. A handler is a row of `HANDLERS`; what differs is data, and a function where a column is a text
of many turns.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron_patch.data.json_lines import Record, parse_object
from megatron_patch.data.prompts import Conversation, Turn
from megatron_patch.data.records import conversation, text_of, turns_before

Columns = Mapping[str, str]  # what a text is → the column that holds it


class Handler(NamedTuple):
    """How one kind of record is read.

    `read` gives a conversation, whose answers are learned, or a text to pre-train on. `template` names the one that
    renders a conversation where nobody names another; None: the tokenizer's own. `is_text`: it reads texts.
    """

    columns: Columns
    read: Callable[[Record, Columns], Conversation | str]
    template: str | None = "modellink"
    is_text: bool = False


def resolve_handler(name: str, map_keys: str | None = None) -> Handler:
    """The handler of this name, its columns changed by the JSON object `map_keys`: `{"prompt": "question", …}`.

    Raises ValueError for an unknown handler, for anything but texts in an object, and for what it has no column of.
    """
    if name not in HANDLERS:
        raise ValueError(f"handler {name!r} is not one of {', '.join(HANDLERS)}")
    handler = HANDLERS[name]
    return handler if map_keys is None else handler._replace(columns=_mapped(handler.columns, name, map_keys))


def check_recipe(name: str, *, pack: bool, seq_length: int | None, prompt_type: str | None) -> None:
    """Raise ValueError where samples cannot be made like this of the records that the handler `name` reads."""
    if pack and not seq_length:
        raise ValueError("--pack needs --seq-length, the tokens of a sample")
    if HANDLERS[name].is_text and (pack or prompt_type):
        raise ValueError(f"{name} makes texts to pre-train on; --pack and --prompt-type are of instructions")


def _mapped(columns: Columns, name: str, map_keys: str) -> Columns:
    given = parse_object(map_keys, f"--map-keys {map_keys!r}")
    tags = given.pop("tags", {})
    given |= tags if isinstance(tags, dict) else {"tags": tags}
    for key, column in given.items():
        if key not in columns:
            raise ValueError(f"--map-keys: {name} has no {key!r}, only {', '.join(columns)}")
        if not isinstance(column, str):
            raise ValueError(f"--map-keys: {key} is {column!r}, not the name of a column")
    return {**columns, **given}


def _single(record: Record, columns: Columns) -> Conversation:
    """One question, what was said before it, and one answer."""
    history = turns_before(record, columns["history"]) if columns.get("history") else []
    question, answer = (text_of(record, (columns[key],)) for key in ("prompt", "response"))
    return Conversation(_optional(record, columns, "system") or None, (
        *history, Turn(question, _optional(record, columns, "query"), answer)
    ))  # fmt: skip


def _belle(record: Record, columns: Columns) -> Conversation:
    """Turns in one text, each on a line that begins with Human: or Assistant:; the last answer has its own column."""
    text = text_of(record, (columns["prompt"],))
    first, *parts = re.split(r"(?:\A|\n)\s*(Human|Assistant):", text)
    roles, texts = parts[::2], [part.strip() for part in parts[1::2]]
    if first.strip() or not parts:
        raise ValueError(f"{columns['prompt']} begins with {text[:20]!r}, not with Human:")
    if roles[-1] == "Assistant" and not texts[-1]:
        roles, texts = roles[:-1], texts[:-1]
    roles, texts = [*roles, "Assistant"], [*texts, text_of(record, (columns["response"],)).strip()]
    return _alternating(roles, texts, ("Human", "Assistant"), columns["prompt"])


def _leetcode(record: Record, columns: Columns) -> Conversation:
    """The problem in front of the code that repeats it, then the code and its explanation."""
    problem, code, explanation = (text_of(record, (columns[key],)) for key in ("prompt", "code", "response"))
    return Conversation(None, (Turn(problem.partition("```")[0].strip(), "", f"{code}\n{explanation}"),))


def _moss(record: Record, columns: Columns) -> Conversation:
    """An object of turns, in whose texts speakers are marked."""
    chat = record.get(columns["chat"])
    if not isinstance(chat, dict):
        raise ValueError(f"{columns['chat']} is {type(chat).__name__}, not an object of turns")
    turns = []
    for name, turn in chat.items():
        if not turn:
            continue
        if not isinstance(turn, dict):
            raise ValueError(f"{columns['chat']}: {name} is {type(turn).__name__}, not an object")
        question, answer = (_unmarked(text_of(turn, (key,))) for key in ("Human", "MOSS"))
        turns.append(Turn(question, "", answer))
    if not turns:
        raise ValueError(f"{columns['chat']} holds no turn")
    return Conversation(None, tuple(turns))


def _unmarked(text: str) -> str:
    return re.sub(r"\A\s*<\|(?:Human|MOSS)\|>:|<eo[hm]>\s*\Z", "", text).strip()


def _messages(record: Record, columns: Columns) -> Conversation:
    """A list of messages, whose roles and texts may have names of their own."""
    roles = {columns[f"{role}_tag"]: role for role in ("system", "user", "assistant")}
    spoken = [columns["role_tag"], columns["content_tag"]]

    def renamed(message: Any) -> Any:
        if not (isinstance(message, dict) and spoken[0] in message):
            return message  # whoever reads it knows other names, and what to say
        role = message[spoken[0]]
        return {"role": roles.get(role, role), "content": message.get(spoken[1])}

    messages = record.get(columns["messages"])
    if not isinstance(messages, list):
        raise ValueError(f"{columns['messages']} is {type(messages).__name__}, not a list of messages")
    system = _optional(record, columns, "system")
    return conversation({"messages": [*map(renamed, messages)]} | ({"system": system} if system else {}))


def _alternating(roles: list[str], texts: list[str], order: tuple[str, str], where: str) -> Conversation:
    if roles != [order[number % 2] for number in range(len(roles))]:
        raise ValueError(f"{where}: {order[0]} and {order[1]} do not take turns ({', '.join(roles)})")
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Conversation(None, tuple(Turn(question, "", answer) for question, answer in pairs))


def _alpaca_text(record: Record, columns: Columns) -> str:
    question, answer = (text_of(record, (columns[key],)) for key in ("prompt", "response"))
    about = _optional(record, columns, "query")
    return (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.USER: Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{question}\n\n"
        + (f"### Input:\n{about}\n\n" if about else "")
        + f"### Response: ASSISTANT: {answer}"
    )


def _stack_overflow_text(record: Record, columns: Columns) -> str:
    title, question, answer = (text_of(record, (columns[key],)) for key in ("title", "prompt", "response"))
    return f"In python, {title}\n### Question:\n{question}\n### Response:\n{answer}\n"


def _present(record: Record, columns: Columns, key: str) -> Any:
    """What stands in a column that may be missing; None where it does not, or no column is named for it."""
    return record.get(columns[key]) if columns.get(key) else None


def _optional(record: Record, columns: Columns, key: str) -> str:
    return "" if _present(record, columns, key) is None else text_of(record, (columns[key],))


_INSTRUCTION = {"prompt": "instruction", "query": "input", "response": "output"}
_SHAREGPT = {
    **{"messages": "conversations", "system": "system", "role_tag": "from", "content_tag": "value"},
    **{"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"},
}
HANDLERS = {
    "GeneralInstructionHandler": Handler(_INSTRUCTION, _single),
    "AlpacaStyleInstructionHandler": Handler({**_INSTRUCTION, "system": "system", "history": "history"}, _single, None),
    "SharegptStyleInstructionHandler": Handler(_SHAREGPT, _messages, None),
    "BelleMultiTurnInstructionHandler": Handler({"prompt": "instruction", "response": "output"}, _belle),
    "MOSSInstructionHandler": Handler({"chat": "chat"}, _moss),
    # ModelLink marks speakers with two ids of Baichuan's; every other tokenizer has its own marks in its template.
    "MOSSMultiTurnHandler": Handler({"chat": "chat"}, _moss, None),
    "LeetcodePythonInstructionHandler": Handler(
        {"prompt": "code_with_problem", "code": "code_only", "response": "explanation_only"}, _leetcode
    ),
    "AlpacaPretrainHandler": Handler(_INSTRUCTION, _alpaca_text, is_text=True),
    "StackOverflowPythonPretrainHandler": Handler(
        {"title": "title", "prompt": "question_body", "response": "answer_body"}, _stack_overflow_text, is_text=True
    ),
}
