"""What the command line asks for, done: the model loaded, each task's answers told by the first rank."""

import json
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from megatron_patch.data.prompts import Conversation
from megatron_patch.generate.asking import Asking, asked_alone, read_questions, resolve_asking
from megatron_patch.generate.chat import chat
from megatron_patch.inference.decoding import Completion, Decoding
from megatron_patch.inference.engine import Engine, open_engine

LINE = 60  # characters of a rule between answers


def answer(given: Namespace) -> None:
    """Raises ValueError or OSError in one sentence for what the user can mend."""
    questions = list(_questions(given))
    sizes = {"tp": given.tp, "pp": given.pp, "ep": given.ep}
    precision = given.precision or ("bf16" if torch.accelerator.is_available() else "fp32")
    engine = open_engine(given.checkpoint, tokenizer=given.tokenizer, precision=precision, **sizes)
    if engine.tokenizer is None:
        raise ValueError(f"{given.checkpoint} holds no tokenizer; name its directory with --tokenizer")
    asking = resolve_asking(
        engine.tokenizer,
        given.inference_prompt_type,
        engine.default_prompt,
        wants_own=given.hf_chat_template,
    )
    for task in given.task:
        options = _decoding(given, task, engine, asking)
        if task == "chat":
            chat(engine, asking, options, given.system)
            continue
        for first in range(0, len(questions), given.batch_size):
            _answer_batch(engine, asking, task, options, questions[first : first + given.batch_size], given.json)


def _questions(given: Namespace) -> Iterator[Conversation]:
    if given.prompts is not None:
        yield from read_questions(given.prompts, given.system)
    for prompt in given.prompt or []:
        yield asked_alone(prompt, given.system)


def _decoding(given: Namespace, task: str, engine: Engine, asking: Asking) -> Decoding:
    stop_ids, stops = asking.stops(engine.stop_ids)
    plain = Decoding(
        max_new_tokens=given.max_new_tokens,
        max_length=given.max_length,
        seed=given.seed,
        stop_ids=stop_ids,
        stop_strings=(*stops, *given.stop),
    )
    drawn = {"do_sample": True, "temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p}
    beams = {"num_beams": given.num_beams, "length_penalty": given.length_penalty}
    several = {"num_return_sequences": given.num_return_sequences}
    changed = {
        "do_sample": drawn | several,
        "beam_search": beams | several,
        "beam_search_with_sampling": drawn | beams | several,
        "chat": drawn,
    }
    return replace(plain, **changed.get(task, {}))


def _answer_batch(
    engine: Engine, asking: Asking, task: str, options: Decoding, questions: Sequence[Conversation], is_json: bool
) -> None:
    prompts = [asking.tokens(question) for question in questions]
    begin = time.monotonic()
    completions = engine.generate(prompts, options)
    seconds = time.monotonic() - begin
    if engine.mesh.rank != 0:
        return
    for number, completion in enumerate(completions):
        question = questions[number // options.num_return_sequences].turns[-1].question
        if is_json:
            print(json.dumps(_record(task, question, completion), ensure_ascii=False), flush=True)
        else:
            print(f"{f'── {task} ':─<{LINE}}\nYou: {question}\nAnswer: {completion.text.strip()}", flush=True)
            for line in _numbers(engine, task, completion):
                print(line, flush=True)
    if not is_json:
        count = sum(len(completion.tokens) for completion in completions)
        print(f"Elapsed: {seconds:.2f} s, {count} tokens", flush=True)


def _record(task: str, question: str, completion: Completion) -> dict[str, object]:
    record: dict[str, object] = {"task": task, "prompt": question, "text": completion.text}
    record |= {"tokens": completion.tokens, "log_probs": completion.log_probs, "is_stopped": completion.is_stopped}
    return record if completion.score is None else record | {"score": completion.score}


def _numbers(engine: Engine, task: str, completion: Completion) -> Iterator[str]:
    """What a task tells beside the text: the score of beams, the log-probability of each token."""
    if completion.score is not None:
        yield f"Score: {completion.score:.4f}"
    if task == "return_output_log_probs":
        for token, log_prob in zip(completion.tokens, completion.log_probs, strict=True):
            yield f"  {log_prob:9.4f}  {token:6d}  {engine.tokenizer.decode([token])!r}"
        yield f"Sum of log-probabilities: {sum(completion.log_probs):.4f}"
