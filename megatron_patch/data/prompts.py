"""How a conversation becomes one text, and which characters of it a model learns. Standard library only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """A question, what it is about (may be empty), and the answer."""

    question: str
    input: str
    answer: str


class Conversation(NamedTuple):
    """One fine-tuning record: at least one turn. `system` None leaves it to the template."""

    system: str | None
    turns: tuple[Turn, ...]


class Rendered(NamedTuple):
    """A text, and the half-open character ranges that the model has to write: each answer with its end marker."""

    text: str
    learned: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prompt:
    """Texts around questions and answers, with `{system}`, `{question}`, `{input}`, `{bos}`, `{eos}` to fill in.

    `system` is filled with the system text, if there is one, and takes the place of `{system}` in the first `user`.
    `user` ends where the model begins to write: it writes, and so learns, `before_answer`, the answer and `end`.
    `between` follows an answer that is not the last.
    """

    user: str
    system: str = "{system}\n\n"
    before_answer: str = ""
    end: str = "{eos}"
    between: str = ""
    default_system: str = ""
    user_with_input: str | None = None  # absent: the input is put on a line of its own below the question
    default_system_with_input: str | None = None


_MISTRAL = Prompt("[INST] {system}{question} [/INST]", before_answer=" ")
_CHATML = Prompt(
    "{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    system="<|im_start|>system\n{system}<|im_end|>\n",
    end="<|im_end|>",
    between="\n",
)
_THOROUGH = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. "
    "Please note that you need to think through your response logically and step by step."
)
PROMPTS = {
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL,
    # https://github.com/tatsu-lab/stanford_alpaca#data-release
    "alpaca": Prompt(
        "{system}### Instruction:\n{question}\n\n### Response:\n",
        between="\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        user_with_input="{system}### Instruction:\n{question}\n\n### Input:\n{input}\n\n### Response:\n",
        default_system_with_input="Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.",
    ),
    # What ModelLink's GeneralInstructionHandler writes: https://gitee.com/ascend/ModelLink
    "modellink": Prompt(
        "{system}### Instruction:\n{question}\n\n### Response:\n",
        system="\n{system}\n",
        end="\n{eos}",
        default_system=_THOROUGH,
        user_with_input="{system}### Instruction:\n{question}\n{input}\n### Response:\n",
        default_system_with_input=_THOROUGH,
    ),
    # https://huggingface.co/meta-llama/Llama-2-7b-chat-hf
    "llama2": Prompt(
        "[INST] {system}{question} [/INST]",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        before_answer=" ",
        end=" {eos}",
        between="{bos}",
    ),
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct
    "llama3": Prompt(
        "{system}<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        end="<|eot_id|>",
    ),
    "chatml": _CHATML,
    # https://huggingface.co/Qwen/Qwen1.5-7B-Chat
    "qwen": Prompt(_CHATML.user, _CHATML.system, "", _CHATML.end, "\n", default_system="You are a helpful assistant."),
    # https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite-Chat
    "deepseek2": Prompt("{system}User: {question}\n\nAssistant:", before_answer=" "),
    "empty": Prompt("{system}{question}\n", between="\n"),
}


@dataclass(frozen=True)
class Renderer:
    """Turns a conversation into text. `adds_special_tokens`: the tokenizer puts its own (BOS) around that text.

    `template` is all that the rendering depends on, as text: renderers of the same one render the same.
    """

    render: Callable[[Conversation], Rendered]
    adds_special_tokens: bool
    template: str


def resolve_prompt(name: str, tokenizer: Any, *, has_eos: bool = True) -> Renderer:
    """The template of this name, EOS left out of it if not `has_eos`.

    Raises ValueError for an unknown one, or one whose end marker is no token here.
    """
    if name not in PROMPTS:
        raise ValueError(f"prompt type {name!r} is not one of {', '.join(PROMPTS)}")
    prompt = PROMPTS[name]
    marks = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token if has_eos else ""}
    end = prompt.end.format(**marks).strip()
    if end and end not in tokenizer.get_vocab():
        raise ValueError(
            f"prompt type {name!r} ends answers with {end!r}, which is no token of the tokenizer in "
            f"{tokenizer.name_or_path!r}; choose another with --prompt-type, or add the token"
        )
    return Renderer(
        lambda conversation: _render(prompt, conversation, marks),
        adds_special_tokens=True,
        template=f"{prompt} {marks}",
    )


def ask(prompt: Prompt, question: str, input: str = "", system: str | None = None, bos: str = "") -> str:
    """The text up to where the model begins to write its first answer; the same in training and at inference."""
    pattern, default = prompt.user, prompt.default_system
    if input and prompt.user_with_input is not None:
        pattern, default = prompt.user_with_input, prompt.default_system_with_input or default
    elif input:
        question = f"{question}\n{input}"
    told = default if system is None else system
    told = prompt.system.format(system=told, bos=bos) if told else ""
    return pattern.format(system=told, question=question, input=input, bos=bos)


def _render(prompt: Prompt, conversation: Conversation, marks: dict[str, str]) -> Rendered:
    text, learned = "", []
    for number, turn in enumerate(conversation.turns):
        between, system = (prompt.between.format(**marks), "") if number else ("", conversation.system)
        text += between + ask(prompt, turn.question, turn.input, system, marks["bos"])
        begin = len(text)
        text += prompt.before_answer + turn.answer + prompt.end.format(**marks)
        learned.append((begin, len(text)))
    return Rendered(text, tuple(learned))
