"""The tokenizer's own chat template as a renderer that knows which characters are the answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from megatron_patch.data.prompts import PROMPTS, Conversation, Rendered, Renderer, resolve_prompt

Message = dict[str, str]


class _Habits(NamedTuple):
    """How a template treats an answer, found once with a probe.

    `lead` is what it puts between its generation prompt and an answer, `end` what ends an answer (EOS where the
    template has nothing), `tail` all that follows the last answer.
    """

    is_trimmed: bool
    lead: str
    end: str
    tail: str


def resolve_renderer(prompt_type: str | None, tokenizer: Any, family_prompt: str) -> Renderer:
    """The template named `prompt_type`; without a name the tokenizer's own chat template, else the family's.

    Raises ValueError for an unknown name, a tokenizer without EOS, or a chat template that cannot be used.
    """
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer in {tokenizer.name_or_path!r} has no EOS token, which ends every answer")
    if prompt_type is not None or not tokenizer.chat_template:
        return resolve_prompt(prompt_type or family_prompt, tokenizer)
    habits = _find_habits(tokenizer)
    return Renderer(
        lambda conversation: _render(tokenizer, habits, conversation),
        adds_special_tokens=False,
        template=f"{tokenizer.chat_template} {tokenizer.special_tokens_map}",
    )


def _render(tokenizer: Any, habits: _Habits, conversation: Conversation) -> Rendered:
    """Rendered twice: as it is, and with a mark for each answer. The marks say where the answers stand in the first.

    So nothing is searched for that an answer or a question might hold itself.
    """
    answers = [turn.answer.strip() if habits.is_trimmed else turn.answer for turn in conversation.turns]
    marks = [_mark(number) for number in range(len(answers))]
    around = _split(_apply(tokenizer, _messages(conversation, marks)), marks)
    text = _apply(tokenizer, _messages(conversation, [turn.answer for turn in conversation.turns]))
    if text != "".join(part for pair in zip(around, [*answers, ""], strict=True) for part in pair):
        raise ValueError(
            f"the chat template rewrites the answer {conversation.turns[0].answer[:60]!r} or another of its "
            "conversation; name another template with --prompt-type"
        )
    around[-1] = around[-1].removesuffix(habits.tail) + habits.end
    return _place(around, answers, habits)


def _place(around: Sequence[str], answers: Sequence[str], habits: _Habits) -> Rendered:
    text, learned = around[0], []
    for answer, after in zip(answers, around[1:], strict=True):
        begin = len(text) - (len(habits.lead) if text.endswith(habits.lead) else 0)
        end = len(text) + len(answer) + (len(habits.end) if after.startswith(habits.end) else 0)
        text += answer + after
        learned.append((begin, end))
    return Rendered(text, tuple(learned))


def _find_habits(tokenizer: Any) -> _Habits:
    turns, probe = [{"role": "user", "content": "question"}], _mark(0)
    bare, spaced = (
        _split(_apply(tokenizer, [*turns, {"role": "assistant", "content": content}]), [probe])
        for content in (probe, f"\n{probe}\n")
    )
    before, after = bare
    prompt = _apply(tokenizer, turns, add_generation_prompt=True)
    if not before.startswith(prompt):
        raise ValueError(
            f"the chat template in {tokenizer.name_or_path!r} answers differently from how it asks: its generation "
            f"prompt does not begin the conversation; name a template with --prompt-type ({', '.join(PROMPTS)})"
        )
    return _Habits(spaced == bare, before[len(prompt) :], _end(tokenizer, after), after)


def _end(tokenizer: Any, tail: str) -> str:
    """Of what follows the last answer the part that ends it, without what some templates ask next in any case."""
    added = [tokenizer.eos_token] if tokenizer.eos_token in tail else [*tokenizer.get_added_vocab()]
    ends = [tail.index(token) + len(token) for token in added if token in tail]
    return tail[: min(ends)] if ends else tail.rstrip() or tokenizer.eos_token


def _mark(number: int) -> str:
    return f"\ue000answer {number}\ue001"


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and after the marks. Raises ValueError unless each stands in it once, in order."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError("the chat template does not render every answer once; name another with --prompt-type")
        before, text = text.split(mark)
        parts.append(before)
    return [*parts, text]


def _messages(conversation: Conversation, answers: Sequence[str]) -> list[Message]:
    messages = [{"role": "system", "content": conversation.system}] if conversation.system is not None else []
    for turn, answer in zip(conversation.turns, answers, strict=True):
        question = f"{turn.question}\n{turn.input}" if turn.input else turn.question
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _apply(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise ValueError(
            f"the chat template in {tokenizer.name_or_path!r} refuses the conversation ({error}); "
            "name another with --prompt-type"
        ) from None
