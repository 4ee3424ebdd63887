"""From a question to the tokens that a model goes on from: through the template that training had, or none."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.data.chat_template import resolve_renderer
from megatron_patch.data.json_lines import parse_line
from megatron_patch.data.prompts import PROMPTS, Conversation, Renderer, Turn
from megatron_patch.data.records import conversation, text_of
from megatron_patch.inference.text import encode

PLAIN = "none"  # no template
ANSWER = "\ue010"  # stands where the model will write: a character that no template has


@dataclass(frozen=True)
class Asking:
    """How questions are asked: rendered, or as they stand where there is no `renderer`. `end` is after an answer."""

    tokenizer: Any
    renderer: Renderer | None
    end: str

    def tokens(self, asked: Conversation) -> list[int]:
        """The ids up to where the answer to the last question begins; one BOS, where the tokenizer has it."""
        if self.renderer is None:
            told = [asked.system] if asked.system else []
            for turn in asked.turns[:-1]:
                told += [turn.question, turn.answer]
            return encode(self.tokenizer, "\n".join([*told, asked.turns[-1].question]))
        rendered = self.renderer.render(asked)
        text = rendered.text[: rendered.learned[-1][0]]
        return encode(self.tokenizer, text, adds_special_tokens=self.renderer.adds_special_tokens)

    def stops(self, stop_ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """`stop_ids` and the template's end of an answer: the ids, and the text where it is no token."""
        if not self.end:
            return stop_ids, ()
        number = self.tokenizer.get_vocab().get(self.end)
        return (stop_ids, (self.end,)) if number is None else (tuple(dict.fromkeys([*stop_ids, number])), ())


def resolve_asking(tokenizer: Any, name: str | None, family_prompt: str, *, wants_own: bool) -> Asking:
    """The template `name`, else the tokenizer's own (`wants_own`: that or none), else the family's.

    Raises ValueError for an unknown name and for a template that the tokenizer cannot spell.
    """
    if wants_own and not tokenizer.chat_template:
        raise ValueError(f"--hf-chat-template: the tokenizer in {tokenizer.name_or_path!r} has no chat template")
    if name == PLAIN:
        return Asking(tokenizer, None, "")
    if name is not None and name not in PROMPTS:
        known = ", ".join((*PROMPTS, PLAIN))
        raise ValueError(f"--inference-prompt-type is {name!r}; there are {known}")
    renderer = resolve_renderer(name, tokenizer, family_prompt)
    rendered = renderer.render(asked_alone("question"))
    learned = rendered.text[slice(*rendered.learned[-1])]
    return Asking(tokenizer, renderer, learned.partition(ANSWER)[2].strip())


def asked_alone(question: str, system: str | None = None) -> Conversation:
    """A conversation of one question."""
    return Conversation(system, (Turn(question, "", ANSWER),))


def read_questions(path: Path, system: str | None) -> Iterator[Conversation]:
    """The questions of a JSON-lines file. Raises ValueError with the line for what is none, OSError for no file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            record = parse_line(line, path, number)
            try:
                yield _question(record, system)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def _question(record: dict[str, Any], system: str | None) -> Conversation:
    if isinstance(record.get("messages"), list):
        asked = conversation({"messages": [*record["messages"], {"role": "assistant", "content": ANSWER}]})
        return asked if asked.system is not None else asked._replace(system=system)
    told = text_of(record, ("system",)) if record.get("system") is not None else system
    return asked_alone(text_of(record, ("prompt",)), told)
