"""How an instruction and its answer become one text, and where in it the answer begins. Standard library only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Instruction(NamedTuple):
    """One fine-tuning record; `input` may be empty."""

    instruction: str
    input: str
    answer: str


class Rendered(NamedTuple):
    """A text that ends with the answer's end-of-turn marker; from character `answer_start` on it is learned."""

    text: str
    answer_start: int


@dataclass(frozen=True)
class Prompt:
    """Text around a question. `before_answer` is written by the model, so it is learned with the answer."""

    with_input: str
    without_input: str
    before_answer: str = ""


PROMPTS = {
    "mistral": Prompt("[INST] {instruction}\n{input} [/INST]", "[INST] {instruction} [/INST]", before_answer=" "),
    # https://github.com/tatsu-lab/stanford_alpaca#data-release
    "alpaca": Prompt(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "empty": Prompt("{instruction}\n{input}\n", "{instruction}\n"),
}


@dataclass(frozen=True)
class Renderer:
    """Turns a record into text. `adds_special_tokens`: the tokenizer puts its own (BOS) around that text."""

    render: Callable[[Instruction], Rendered]
    adds_special_tokens: bool


def resolve_renderer(prompt_type: str | None, tokenizer: Any, family_prompt: str) -> Renderer:
    """The template named `prompt_type`; without a name the tokenizer's own chat template, else the family's.

    Raises ValueError for an unknown name, a tokenizer without EOS, or a chat template that cannot be used.
    """
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer in {tokenizer.name_or_path!r} has no EOS token, which ends every answer")
    if prompt_type is None and tokenizer.chat_template:
        return Renderer(_chat_renderer(tokenizer), adds_special_tokens=False)
    prompt = _prompt(prompt_type or family_prompt)
    return Renderer(lambda record: _fill(prompt, record, tokenizer.eos_token), adds_special_tokens=True)


def _prompt(name: str) -> Prompt:
    if name not in PROMPTS:
        raise ValueError(f"prompt type {name!r} is not one of {', '.join(PROMPTS)}")
    return PROMPTS[name]


def _fill(prompt: Prompt, record: Instruction, end: str) -> Rendered:
    template = prompt.with_input if record.input else prompt.without_input
    question = template.format(instruction=record.instruction, input=record.input)
    return Rendered(f"{question}{prompt.before_answer}{record.answer}{end}", len(question))


def _chat_renderer(tokenizer: Any) -> Callable[[Instruction], Rendered]:
    """A renderer over the tokenizer's chat template.

    One probe finds what stands between the generation prompt and an answer, what ends the answer, and whether the
    template trims it; records are then rendered once, and the answer's place is counted from the end.
    """

    def conversation(question: str, answer: str) -> str:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return tokenizer.apply_chat_template(turns, tokenize=False)

    probe = "\ue000probe\ue001"
    text = conversation(probe, f"\n{probe}\n")
    is_trimmed = f"\n{probe}\n" not in text
    start = text.rindex(probe)
    tail = text[start + len(probe) :] if is_trimmed else text[start + len(probe) + 1 :]
    before = _answer_lead(tokenizer, probe, text, start if is_trimmed else start - 1)
    end = tail.rstrip() or tokenizer.eos_token

    def render(record: Instruction) -> Rendered:
        question = f"{record.instruction}\n{record.input}" if record.input else record.instruction
        answer = record.answer.strip() if is_trimmed else record.answer
        body = conversation(question, record.answer).removesuffix(tail)
        if not body.endswith(answer):
            raise ValueError(f"the chat template rewrites the answer {answer[:60]!r}; name another with --prompt-type")
        return Rendered(body + end, len(body) - len(answer) - before)

    return render


def _answer_lead(tokenizer: Any, probe: str, text: str, answer_start: int) -> int:
    """Characters that the template puts between its generation prompt and the answer."""
    turns = [{"role": "user", "content": probe}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if not text.startswith(prompt) or len(prompt) > answer_start:
        raise ValueError(
            f"the chat template in {tokenizer.name_or_path!r} answers differently from how it asks: its generation "
            f"prompt does not begin the conversation; name a template with --prompt-type ({', '.join(PROMPTS)})"
        )
    return answer_start - len(prompt)
