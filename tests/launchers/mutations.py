"""Command lines with something wrong in them, drawn from a seed, each with what must be said about it."""

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

# What a text can be read as; any text is one of `path` that is not empty and no option. `lines` are paths, one on each
# line, and `maybe` stands before what may also be empty. What can only be one of certain names is of its own kind.
COUNT, WHOLE, RATE, SWITCH, PATH, ANYTHING = "count", "whole", "rate", "switch", "path", "anything"
PRECISION, RECOMPUTATION, OFFLOADING, PLACE, SIZE = "precision", "recomputation", "offloading", "place", "size"
LINES, ABOVE_ZERO, MAYBE = "lines", "above zero", "maybe "
KINDS = {
    "ENV": PLACE, "MODEL_SIZE": SIZE, "MEGATRON_PATCH_PATH": ANYTHING, "LR": RATE, "MIN_LR": RATE, "PR": PRECISION,
    "AC": RECOMPUTATION, "OPTIMIZER_OFFLOAD": OFFLOADING, "EXTRA_VOCAB_SIZE": WHOLE,
    **dict.fromkeys(("BATCH_SIZE", "GLOBAL_BATCH_SIZE", "SEQ_LEN", "PAD_LEN", "TP", "PP", "CP", "EP"), COUNT),
    **dict.fromkeys(("SAVE_INTERVAL", "TRAIN_TOKENS_OR_ITERS", "TRAIN_TOKENS", "TRAIN_ITERS", "EPOCH"), COUNT),
    **dict.fromkeys(("WARMUP_TOKENS_OR_ITERS", "WARMUP_TOKENS", "WARMUP_ITERS"), WHOLE),
    **dict.fromkeys(("SP", "DO", "FL", "SFT", "TE", "MOE"), SWITCH),
    **dict.fromkeys(("DATASET_PATH", "VALID_DATASET_PATH", "TRAIN_DATASET_PATH"), PATH),
    **dict.fromkeys(("PRETRAIN_CHECKPOINT_PATH", "OUTPUT_BASEPATH"), PATH),
}  # fmt: skip
OF_CONVERTERS = {
    **dict.fromkeys(("MODEL_SIZE", "MN"), SIZE), "MEGATRON_PATH": ANYTHING, "HG_CKPT_PATH": MAYBE + PATH,
    "PR": PRECISION, **dict.fromkeys(("SOURCE_CKPT_PATH", "TARGET_CKPT_PATH"), PATH),
    **dict.fromkeys(("TP", "PP", "NUM_SPLITS", "MOE_FFN"), COUNT), **dict.fromkeys(("USE_TE", "mg2hf"), SWITCH),
    **dict.fromkeys(("EXTRA_VOCAB_SIZE", "NUM_EXPERTS", "EXPERTS_TOPK", "EP", "NUM_EXPERT_SPLITS", "WS"), WHOLE),
}  # fmt: skip
OF_PREPROCESSING = {
    **dict.fromkeys(("INPUT_DATA_PATH", "OUTPUT_DATA_DIR", "OUTPUT_PREFIX", "LOAD_DIR", "JSON_KEYS"), PATH),
    "TOKENIZER": SIZE, "SEQ_LEN": COUNT, "DATASET_NAME": ANYTHING, "PACKING": SWITCH,
}  # fmt: skip
OF_SCRIPTS = {
    **dict.fromkeys(("--nproc-per-node", "--nnodes", "--master-port", "--seq-length", "--train-iters"), COUNT),
    **dict.fromkeys(("--tensor-model-parallel-size", "--pipeline-model-parallel-size"), COUNT),
    **dict.fromkeys(("--expert-model-parallel-size", "--micro-batch-size", "--global-batch-size"), COUNT),
    **dict.fromkeys(("--save-interval", "--evaluation-batch-size"), COUNT),
    **dict.fromkeys(("--node-rank", "--lr-warmup-iters", "--num-fewshot"), WHOLE),
    **dict.fromkeys(("--lr", "--min-lr", "--lr-warmup-fraction"), RATE), "--data-path": LINES,
    **dict.fromkeys(("--load", "--save", "--master-addr", "--task-data-path"), PATH),
    "--tokenizer-name-or-path": MAYBE + PATH,
    **dict.fromkeys(("--sequence-parallel", "--use-distributed-optimizer", "--use-flash-attn", "--bf16"), SWITCH),
    "--finetune": SWITCH, "--top-p": MAYBE + RATE, "--temperature": MAYBE + ABOVE_ZERO,
    **dict.fromkeys(("--max-length", "--max-new-tokens", "--top-k"), MAYBE + WHOLE),
}  # fmt: skip
OF_CHECKPOINTS = {
    **dict.fromkeys(("--target-tensor-parallel-size", "--target-pipeline-parallel-size"), WHOLE),
    **dict.fromkeys(("--target-expert-parallel-size", "--tensor-parallel-size", "--pipeline-parallel-size"), WHOLE),
    **dict.fromkeys(("--load-dir", "--save-dir", "--megatron-checkpoint-path"), PATH),
    **dict.fromkeys(("--huggingface-config-path", "--huggingface-checkpoint-path"), PATH),
    "--tokenizer-model": MAYBE + PATH,
}  # fmt: skip
OF_DATASETS = {
    "--input": MAYBE + LINES, "--output-prefix": PATH, "--json_keys": MAYBE + PATH, "--workers": COUNT,
    **dict.fromkeys(("--tokenizer-name-or-path", "--tokenizer-model"), MAYBE + PATH), "--log-interval": WHOLE,
    **dict.fromkeys(("--append-eod", "--tokenizer-not-use-fast"), SWITCH),
}  # fmt: skip
OPEN = (PATH, ANYTHING)
TEXTS = {  # text → what it can be read as
    "": (ANYTHING,), " ": (ANYTHING,), "\t\n": (ANYTHING,), "-x": (ANYTHING,), "-inf": (ANYTHING,),
    **dict.fromkeys(("abc", "../..", "ünïcode", "数据", "e5", "1.5.2", "1,000", "0x10", "nan", "inf"), OPEN),
    **dict.fromkeys(("１２", "٣", "1e400", "9" * 400, "yes", "None\n", "true;false", "~", "*", "$HOME"), OPEN),
    **dict.fromkeys(("it's", 'a "b" c', "a\\", "$(touch ran)", "`touch ran`", "; touch ran", "| touch ran"), OPEN),
    **dict.fromkeys(("&& touch ran", "x\n touch ran", "${IFS}", "a[$(touch ran)]", "%s%n", "{PAD_LEN}"), OPEN),
    "0": (WHOLE, RATE, OFFLOADING, *OPEN), "1": (COUNT, WHOLE, RATE, OFFLOADING, *OPEN),
    "1e-3": (RATE, OFFLOADING, *OPEN), "0.5": (RATE, OFFLOADING, *OPEN),
    **dict.fromkeys(("7", "64", "1e3", "10_000"), (COUNT, WHOLE, *OPEN)), "-1": (ANYTHING,), "-1e-5": (ANYTHING,),
    **dict.fromkeys(("TRUE", "True", "true"), (SWITCH, *OPEN)), "False": (SWITCH, RECOMPUTATION, OFFLOADING, *OPEN),
    **dict.fromkeys(("BF16", "fp32"), (PRECISION, *OPEN)), "full": (RECOMPUTATION, *OPEN),
    "1.5": (ABOVE_ZERO, *OPEN), "static": (OFFLOADING, *OPEN), "None": (RECOMPUTATION, *OPEN), "DSW": (PLACE, *OPEN),
    "AUTO": (SIZE, OFFLOADING, *OPEN),
}  # fmt: skip


class Mutation(NamedTuple):
    """A changed command line; each of `told` must be said of it. Where that is nothing, the run may be planned.

    `texts` are what then has been said: argument or flag → text.
    """

    arguments: list[str]
    told: tuple[str, ...] = ()
    texts: Mapping[str, str] = {}


class Line(NamedTuple):
    """A good command line of positionals: their names, what each can be, and the texts."""

    names: list[str]
    kinds: Mapping[str, str]
    arguments: list[str]


class Flags(NamedTuple):
    """A good command line of flags: each with its values, what each can be, and how its launcher takes it.

    `once`: may not be said again; `needed`: may not be left out; `alone`: may stand without a value; `several`: with
    more than one. Flags that are in none and of no kind are for what the launcher starts.
    """

    given: list[tuple[str, list[str]]]
    kinds: Mapping[str, str]
    known: frozenset[str]
    once: frozenset[str]
    needed: frozenset[str]
    alone: frozenset[str]
    several: frozenset[str]


def mutations(line: Line | Flags, seed: int, number: int) -> Iterator[Mutation]:
    """`number` of them, of a good command line."""
    names = line.names if isinstance(line, Line) else [name for name, _ in line.given]
    draw = random.Random(f"{seed} {names}")
    of_positionals = (replaced, swapped, slipped, miscounted)
    of_flags = (replaced_value, swapped_values, left_out, emptied, said_again, misspelt, crowded, moved)
    for _ in range(number):
        if isinstance(line, Line):
            yield draw.choices(of_positionals, (6, 1, 2, 1))[0](draw, line)
        else:
            yield draw.choices(of_flags, (10, 2, 1, 2, 2, 2, 2, 1))[0](draw, line)


def replaced(draw: random.Random, line: Line) -> Mutation:
    """One or two arguments are another text."""
    changed = list(line.arguments)
    for place in draw.sample(range(len(changed)), draw.choice((1, 1, 1, 2))):
        changed[place] = draw.choice(list(TEXTS))
    return judged(line, changed)


def swapped(draw: random.Random, line: Line) -> Mutation:
    """Two neighbours stand in each other's place."""
    changed, place = list(line.arguments), draw.randrange(len(line.arguments) - 1)
    changed[place : place + 2] = reversed(changed[place : place + 2])
    return judged(line, changed)


def slipped(draw: random.Random, line: Line) -> Mutation:
    """One is missing and one is said twice, so that those between stand one place off."""
    changed = list(line.arguments)
    missing, twice = draw.sample(range(len(changed)), 2)
    text = changed[twice]
    del changed[missing]
    changed.insert(twice, text)
    return judged(line, changed)


def miscounted(draw: random.Random, line: Line) -> Mutation:
    """Three or four are missing, or three to five too many: one or two are another table of some launchers."""
    changed = list(line.arguments)
    for _ in range(draw.randint(3, 4)):
        del changed[draw.randrange(len(changed))]
    if draw.random() < 0.5:
        more = draw.sample([text for text in TEXTS if not text.startswith("-")], draw.randint(3, 5))
        changed = [*line.arguments, *more]
    return Mutation(changed, ("arguments are needed",))


def judged(line: Line, changed: list[str]) -> Mutation:
    """What is wrong with arguments in number as good ones: texts that cannot be read as their place wants it."""
    readings = _readings(zip(line.names, line.arguments, strict=False), line.kinds)
    told = [
        f"argument {number} ({name}) is {text!r}; allowed: "
        for number, (name, text) in enumerate(zip(line.names, changed, strict=False), 1)
        if not _is_read(text, line.kinds[name], readings)
    ]
    return Mutation(changed, tuple(told), dict(zip(line.names, changed, strict=False)))


def replaced_value(draw: random.Random, line: Flags) -> Mutation:
    """One or two flags have another text, behind them or after `=`."""
    given = list(line.given)
    for place in draw.sample(range(len(given)), draw.choice((1, 1, 1, 2))):
        name, text = given[place][0], draw.choice(list(TEXTS))
        given[place] = (f"{name}={text}", []) if draw.random() < 0.2 else (name, [text])
    return judged_flags(line, given)


def swapped_values(draw: random.Random, line: Flags) -> Mutation:
    """Two neighbours that have values have each other's."""
    places = [place for place, (_, values) in enumerate(line.given) if values]
    given, number = list(line.given), draw.randrange(len(places) - 1)
    (one, its), (other, others) = given[places[number]], given[places[number + 1]]
    given[places[number]], given[places[number + 1]] = (one, others), (other, its)
    return judged_flags(line, given)


def left_out(draw: random.Random, line: Flags) -> Mutation:
    """A flag is missing, with its values."""
    given = list(line.given)
    name, _ = given.pop(draw.randrange(len(given)))
    return judged_flags(line, given, *([f"{name} is missing; allowed: "] if name in line.needed else []))


def emptied(draw: random.Random, line: Flags) -> Mutation:
    """A flag has no value."""
    given, place = list(line.given), draw.randrange(len(line.given))
    name = given[place][0]
    given[place] = (name, [])
    is_wrong = name in line.known - line.alone
    return judged_flags(line, given, *([f"{name} is followed by 0 values, not one; allowed: "] if is_wrong else []))


def said_again(draw: random.Random, line: Flags) -> Mutation:
    """A flag is there twice, the second time at the end and with another text."""
    name = draw.choice(line.given)[0]
    if name in line.once:
        given = [*line.given, (name, [draw.choice(list(TEXTS))])]
        return Mutation(_flat(given), (f"{name} is given twice; allowed: ",))
    return judged_flags(line, [*line.given, (name, [draw.choice(list(TEXTS))])])


def misspelt(draw: random.Random, line: Flags) -> Mutation:
    """A flag that nobody has: in capitals, with a letter more, or with two that changed places."""
    given, place = list(line.given), draw.randrange(len(line.given))
    name, values = given[place]
    turned = f"--{name[3]}{name[2]}{name[4:]}"
    wrong = draw.choice([text for text in (name.upper(), name + "x", turned) if text != name])
    given[place] = (wrong, values)
    missing = f"{name} is missing; allowed: " if name in line.needed else f"unknown option {wrong!r}"
    return Mutation(_flat(given), (missing,))


def crowded(draw: random.Random, line: Flags) -> Mutation:
    """A text too many, behind a flag that has a value or before them all."""
    given, text = list(line.given), draw.choice(list(TEXTS))
    place = draw.randrange(len(given))
    name, values = given[place]
    if draw.random() < 0.2 or not values:
        return Mutation([text, *_flat(given)], (f"{text!r} follows no flag",))
    given[place] = (name, [*values, text])
    is_wrong = name in line.known - line.several
    return Mutation(
        _flat(given), (f"{name} is followed by {len(values) + 1} values, not one; allowed: ",) if is_wrong else ()
    )


def moved(draw: random.Random, line: Flags) -> Mutation:
    """All flags are there in another order."""
    return judged_flags(line, draw.sample(line.given, len(line.given)))


def judged_flags(line: Flags, given: list[tuple[str, list[str]]], *told: str) -> Mutation:
    """What is wrong with flags: `told`, or else texts that cannot be read as the last of their flag wants it."""
    readings = _readings(((name, values[0]) for name, values in line.given if values), line.kinds)
    texts = {}
    for name, values in given:
        flag, has_value, text = name.partition("=")
        texts[flag] = text if has_value else "\n".join(values) if values else "true"
    wrong = [
        f"{name} is {text!r}; allowed: "
        for name, text in texts.items()
        if name in line.known and not _is_read(text, line.kinds.get(name, name), readings)
    ]
    return Mutation(_flat(given), told or tuple(wrong), texts)


def _flat(given: Iterable[tuple[str, list[str]]]) -> list[str]:
    return [text for name, values in given for text in (name, *values)]


def _readings(good: Iterable[tuple[str, str]], kinds: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """What a text of TEXTS, or of a good command line, can be read as."""
    readings = dict(TEXTS)
    for name, text in good:
        kind = kinds.get(name, name).removeprefix(MAYBE)
        readings[text] = (*readings.get(text, OPEN), kind, *_also(text))
    return readings


def _is_read(text: str, kind: str, readings: Mapping[str, tuple[str, ...]]) -> bool:
    if kind.startswith(MAYBE) and not text:
        return True
    kind = kind.removeprefix(MAYBE)
    if kind == ABOVE_ZERO:
        return not {ABOVE_ZERO, RATE, COUNT}.isdisjoint(readings[text])
    return PATH in readings[text] and not text.endswith("\n") if kind == LINES else kind in readings[text]


def _also(text: str) -> tuple[str, ...]:
    """What a good argument can be read as in another's place."""
    if text.isdigit():
        return (WHOLE, *([COUNT] if int(text) else []), *([RATE, OFFLOADING] if int(text) <= 1 else []))
    if text == "false":
        return (SWITCH, RECOMPUTATION, OFFLOADING)
    if text == "megatron":
        return ("--loader", "--saver", "--save-model-type")
    is_share = text.startswith(("0.", "1e-", "1.25e-"))
    return (RATE, OFFLOADING) if is_share else (SIZE, OFFLOADING) if text == "auto" else ()
