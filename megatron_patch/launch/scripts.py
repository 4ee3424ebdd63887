"""A training script's flags as the plan of one run: what they leave open, and then as every training launcher does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_patch.launch import training
from megatron_patch.launch.data_options import DATA_OPTIONS
from megatron_patch.launch.options import check_options, option_value, settings
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.launch.script_tables import RENAMED


def plan(request: Request) -> dict[str, Any]:
    """The plan of one run. Raises as `training.plan`, and UsageError for a renamed flag without a number."""
    for name in RENAMED.keys() & set(request.options):
        if (option_value(request.options, name) or "-").startswith("-"):
            raise UsageError(f"{name} is followed by no number; give one, or leave it out")
    options = list(_renamed(request.options))
    check_options(options, [*settings(), *DATA_OPTIONS, *(arg.name for arg in request.table)])
    return training.plan(request.changed({**request.values, **_derived(request.values)}, options))


def _derived(v: dict[str, Any]) -> dict[str, Any]:
    """The arguments that other launchers are given, from flags that say the same in another way."""
    tokenizer = v["TOKENIZER_PATH"] or v["TOKENIZER_MODEL"]
    if tokenizer and Path(tokenizer).name == "tokenizer.model":
        tokenizer = str(Path(tokenizer).parent)
    return {
        "DATASET_PATH": "\n".join(v["DATASET_PATH"]),
        "PAD_LEN": v["SEQ_LEN"],
        "PR": "fp16" if v["FP16"] else "bf16" if v["BF16"] else "fp32",
        "TOKENIZER": tokenizer,
        "WARMUP_ITERS": v["WARMUP_ITERS"] or int(v["WARMUP_SHARE"] * v["TRAIN_ITERS"]),
    }


def _renamed(options: list[str]) -> Iterator[str]:
    for text in options:
        name, has_value, value = text.partition("=")
        yield RENAMED.get(name, name) + has_value + value
