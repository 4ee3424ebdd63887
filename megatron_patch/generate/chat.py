"""A conversation on the terminal: history, answers as they come, an end that is always clean."""

import sys
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_patch.data.prompts import Conversation, Turn
from megatron_patch.generate.asking import ANSWER, Asking
from megatron_patch.inference.decoding import Decoding
from megatron_patch.inference.engine import Engine
from megatron_patch.inference.text import TextStream

LEAVE, FORGET = ("quit", "q", "exit"), ("clear", "new")
LONGEST_PAUSE = timedelta(days=20)  # of a person, during which the other ranks wait


def chat(engine: Engine, asking: Asking, options: Decoding, system: str | None) -> None:
    """Until the end of the input or one of LEAVE; one of FORGET begins anew. The first rank reads and writes."""
    read_line, is_first = _line_reader(engine), engine.mesh.rank == 0
    if is_first:
        print(f"({' | '.join(LEAVE)} leaves, {' | '.join(FORGET)} begins anew)", flush=True)
    history: tuple[Turn, ...] = ()
    while (line := read_line()) is not None and line.lower() not in LEAVE:
        if line.lower() in FORGET:
            history = ()
        elif line:
            question = Turn(line, "", ANSWER)
            answer = _answer(engine, asking, options, Conversation(system, (*history, question)))
            history = (*history, question._replace(answer=answer)) if answer is not None else history
    if is_first:
        print(flush=True)


def _line_reader(engine: Engine) -> Callable[[], str | None]:
    """What reads the person's next line on every rank; None at the end of the input."""
    group = dist.new_group(backend="gloo", timeout=LONGEST_PAUSE) if engine.mesh.world.size > 1 else None

    def read_line() -> str | None:
        line = [_input() if engine.mesh.rank == 0 else None]
        if group is not None:
            dist.broadcast_object_list(line, src=0, group=group)
        return line[0]

    return read_line


def _input() -> str | None:
    print("You: ", end="", flush=True)
    line = sys.stdin.buffer.readline()
    return line.decode("utf-8", "replace").strip() if line else None


def _answer(engine: Engine, asking: Asking, options: Decoding, asked: Conversation) -> str | None:
    """Print the answer while it comes, and return it; None where the conversation has become too long."""
    stream, is_first = TextStream(engine.tokenizer, options.stop_strings), engine.mesh.rank == 0
    shown: list[str] = []

    def show(text: str) -> None:
        if text and is_first:
            text = text if shown else text.lstrip()
            shown.append(text)
            print(text, end="", flush=True)

    if is_first:
        print("Answer: ", end="", flush=True)
    try:
        (completion,) = engine.generate(
            [asking.tokens(asked)], options, on_token=lambda row, token: show(stream.add(token))
        )
    except ValueError as error:
        if is_first:
            print(f"({error}; {' or '.join(FORGET)} begins anew)", flush=True)
        return None
    show(stream.finish())
    if is_first:
        print(flush=True)
    return completion.text.strip()
