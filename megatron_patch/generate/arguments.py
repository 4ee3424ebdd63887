"""The command line of generation. Standard library only: a wrong one is refused before torch is loaded."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

TASKS = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "return_output_log_probs", "chat")
LARGEST = 2**63 - 1


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Checked values. A usage error ends the process with status 2."""
    reader = _reader()
    given = reader.parse_args(argv)
    if given.chat:
        given.task = [*given.task, "chat"] if given.task else ["chat"]
    given.task = list(dict.fromkeys(given.task or ["greedy"]))
    if given.prompt is None and given.prompts is None and given.task != ["chat"]:
        reader.error("nothing to answer: give --prompt TEXT, --prompts FILE, or --chat")
    if given.hf_chat_template and given.inference_prompt_type is not None:
        reader.error("--hf-chat-template and --inference-prompt-type name two templates; leave one out")
    if not given.max_new_tokens and not given.max_length:
        reader.error("--max-new-tokens is 0 and --max-length too; one of them must allow a token")
    return given


def _reader() -> argparse.ArgumentParser:
    reader = argparse.ArgumentParser(
        prog="python3 -m megatron_patch.generate",
        usage="%(prog)s --checkpoint DIR (--prompt TEXT | --prompts FILE | --chat) [options, which --help lists]",
        description=__doc__,
        allow_abbrev=False,
    )
    reader.add_argument("--checkpoint", required=True, type=Path, help="a directory of any format that convert reads")
    reader.add_argument("--tokenizer", type=Path, help="its directory or tokenizer.model; default: the checkpoint's")
    for name, what in (("tp", "tensor-parallel ranks"), ("pp", "pipeline stages"), ("ep", "expert-parallel ranks")):
        reader.add_argument(f"--{name}", type=_least(int, 1), default=1, help=what)
    reader.add_argument("--precision", choices=("fp32", "bf16"), help="computed in; default: bf16, fp32 on a CPU")
    asked = reader.add_mutually_exclusive_group()
    asked.add_argument("--prompt", action="append", help="a question; may be given again")
    asked.add_argument("--prompts", type=Path, help='JSON lines: {"prompt": …} with or without "system", or "messages"')
    reader.add_argument("--chat", action="store_true", help="a conversation on the terminal, as --task chat")
    reader.add_argument("--task", nargs="+", choices=TASKS, default=[], help="ways to answer, one after the other")
    reader.add_argument("--system", help="what the model is told before the first question")
    reader.add_argument("--inference-prompt-type", help="a template's name, or none: text goes on as it stands")
    reader.add_argument("--hf-chat-template", action="store_true", help="insist on the tokenizer's own chat template")
    reader.add_argument("--max-new-tokens", type=_least(int, 0), default=128, help="longest answer; 0: by --max-length")
    reader.add_argument("--max-length", type=_least(int, 0), default=256, help="longest prompt and answer together")
    reader.add_argument("--temperature", type=_above_zero, default=0.7, help="of sampling")
    reader.add_argument("--top-k", type=_least(int, 0), default=50, help="sample among so many tokens; 0: all")
    reader.add_argument("--top-p", type=_share, default=0.95, help="sample among the likeliest that hold this share")
    reader.add_argument("--num-beams", type=_least(int, 2), default=2, help="of the beam search tasks")
    reader.add_argument("--length-penalty", type=float, default=1.0, help="beams: sum / length^PENALTY is compared")
    reader.add_argument("--num-return-sequences", type=_least(int, 1), default=1, help="answers that are not greedy")
    reader.add_argument("--stop", nargs="+", default=[], help="texts that end an answer")
    reader.add_argument("--batch-size", type=_least(int, 1), default=8, help="prompts that are answered together")
    reader.add_argument("--seed", type=_least(int, 0), default=1234, help="of sampling")
    reader.add_argument("--json", action="store_true", help="one JSON object per answer on standard output")
    return reader


def _least(kind: type, least: float) -> Callable[[str], float]:
    return _checked(kind, lambda value: least <= value <= LARGEST, f"a number of at least {least}, in 64 bits")


def _checked(kind: type, holds: Callable[[float], bool], allowed: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text) if text.isascii() else None
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


_above_zero = _checked(
    float, lambda value: 0 < value < float("inf"), "a number above 0; the likeliest token is --task greedy"
)
_share = _checked(float, lambda value: 0 < value <= 1, "a number above 0, at most 1")
