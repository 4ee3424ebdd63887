"""Command lines with something wrong in them, drawn from a seed, each with what must be said about it."""

import random
from collections.abc import Iterator
from typing import NamedTuple

# What a text can be read as; any text is one of `path` that is not empty and no option.
COUNT, WHOLE, RATE, SWITCH, PATH, ANYTHING = "count", "whole", "rate", "switch", "path", "anything"
PRECISION, RECOMPUTATION, OFFLOADING, PLACE, SIZE = "precision", "recomputation", "offloading", "place", "size"
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
OPEN = (PATH, ANYTHING)
TEXTS = {  # text → what it can be read as
    "": (ANYTHING,), " ": (ANYTHING,), "\t\n": (ANYTHING,), "-x": (ANYTHING,), "-inf": (ANYTHING,),
    **dict.fromkeys(("abc", "../..", "ünïcode", "数据", "e5", "1.5.2", "1,000", "0x10", "nan", "inf"), OPEN),
    **dict.fromkeys(("１２", "٣", "1e400", "9" * 400, "1.5", "yes", "None\n", "true;false", "~", "*", "$HOME"), OPEN),
    **dict.fromkeys(("it's", 'a "b" c', "a\\", "$(touch ran)", "`touch ran`", "; touch ran", "| touch ran"), OPEN),
    **dict.fromkeys(("&& touch ran", "x\n touch ran", "${IFS}", "a[$(touch ran)]", "%s%n", "{PAD_LEN}"), OPEN),
    "0": (WHOLE, RATE, OFFLOADING, *OPEN), "1": (COUNT, WHOLE, RATE, OFFLOADING, *OPEN),
    "1e-3": (RATE, OFFLOADING, *OPEN), "0.5": (RATE, OFFLOADING, *OPEN),
    **dict.fromkeys(("7", "64", "1e3", "10_000"), (COUNT, WHOLE, *OPEN)), "-1": (ANYTHING,), "-1e-5": (ANYTHING,),
    **dict.fromkeys(("TRUE", "True"), (SWITCH, *OPEN)), "False": (SWITCH, RECOMPUTATION, OFFLOADING, *OPEN),
    **dict.fromkeys(("BF16", "fp32"), (PRECISION, *OPEN)), "full": (RECOMPUTATION, *OPEN),
    "static": (OFFLOADING, *OPEN), "None": (RECOMPUTATION, *OPEN), "DSW": (PLACE, *OPEN),
    "AUTO": (SIZE, OFFLOADING, *OPEN),
}  # fmt: skip


class Mutation(NamedTuple):
    """A changed command line; `wrong` are the names of the arguments that must be refused as what they are.

    `count`: the number of arguments must be refused. Where neither is, the run may be planned.
    """

    arguments: list[str]
    wrong: tuple[str, ...] = ()
    is_count: bool = False


def mutations(names: list[str], arguments: list[str], seed: int, number: int) -> Iterator[Mutation]:
    """`number` of them, of a good command line."""
    draw = random.Random(f"{seed} {names}")
    for _ in range(number):
        change = draw.choices((replaced, swapped, slipped, miscounted), (6, 1, 2, 1))[0]
        yield change(draw, names, arguments)


def replaced(draw: random.Random, names: list[str], arguments: list[str]) -> Mutation:
    """One or two arguments are another text."""
    changed = list(arguments)
    for place in draw.sample(range(len(names)), draw.choice((1, 1, 1, 2))):
        changed[place] = draw.choice(list(TEXTS))
    return judged(names, changed, arguments)


def swapped(draw: random.Random, names: list[str], arguments: list[str]) -> Mutation:
    """Two neighbours stand in each other's place."""
    changed, place = list(arguments), draw.randrange(len(names) - 1)
    changed[place : place + 2] = reversed(changed[place : place + 2])
    return judged(names, changed, arguments)


def slipped(draw: random.Random, names: list[str], arguments: list[str]) -> Mutation:
    """One is missing and one is said twice, so that those between stand one place off."""
    changed = list(arguments)
    missing, twice = draw.sample(range(len(names)), 2)
    text = changed[twice]
    del changed[missing]
    changed.insert(twice, text)
    return judged(names, changed, arguments)


def miscounted(draw: random.Random, names: list[str], arguments: list[str]) -> Mutation:
    """Two to four are missing, or three to five too many: one more or less is another table of some launchers."""
    changed = list(arguments)
    for _ in range(draw.randint(2, 4)):
        del changed[draw.randrange(len(changed))]
    if draw.random() < 0.5:
        changed = [*arguments, *draw.sample([text for text in TEXTS if not text.startswith("-")], draw.randint(3, 5))]
    return Mutation(changed, is_count=True)


def judged(names: list[str], changed: list[str], good: list[str]) -> Mutation:
    """What is wrong with arguments in number as good ones: texts that cannot be read as their place wants it."""
    readings = dict(TEXTS)
    for name, text in zip(names, good, strict=True):
        readings[text] = (*readings.get(text, OPEN), KINDS[name], *_also(text))
    wrong = [name for name, text in zip(names, changed, strict=True) if KINDS[name] not in readings[text]]
    return Mutation(changed, tuple(wrong))


def _also(text: str) -> tuple[str, ...]:
    """What a good argument can be read as in another's place."""
    if text.isdigit():
        return (WHOLE, *([COUNT] if int(text) else []), *([RATE, OFFLOADING] if int(text) <= 1 else []))
    if text == "false":
        return (SWITCH, RECOMPUTATION, OFFLOADING)
    if text == "true":
        return (SWITCH,)
    return (RATE, OFFLOADING) if text.startswith("1e-") else (SIZE, OFFLOADING) if text == "auto" else ()
