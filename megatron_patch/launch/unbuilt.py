"""Documented values whose capability is not built yet. The work that builds one deletes its line."""

from collections.abc import Callable, Mapping

from megatron_patch.launch.positional import UsageError

# argument, is this value beyond what is built?, the capability, what to use instead
Line = tuple[str, Callable[[Mapping[str, object]], bool], str, str]

TRAINING: tuple[Line, ...] = (
    ("MODEL_SIZE", lambda v: v["MODEL_SIZE"] == "8x7B", "training the Mixtral family", "7B or auto"),
    ("PR", lambda v: v["PR"] in ("fp16", "fp8"), "float16 and float8 training", "bf16 or fp32"),
    ("PP", lambda v: v["PP"] > 1, "pipeline parallelism", "1"),
    ("CP", lambda v: v["CP"] > 1, "context parallelism", "1"),
    ("EP", lambda v: v["EP"] > 1, "expert parallelism", "1"),
    ("AC", lambda v: v["AC"] != "none", "activation recomputation and offloading", "false"),
    ("OPTIMIZER_OFFLOAD", lambda v: v["OPTIMIZER_OFFLOAD"] != "false", "optimizer offloading", "false"),
    ("MP_VP", lambda v: v["MP_VP"] > 0, "interleaved pipelining", "no MP_VP"),
    ("MP_SFT_PACKING", lambda v: v["MP_SFT_PACKING"], "packed fine-tuning", "false"),
    (
        "SFT",
        lambda v: v["SFT"] and v["MP_DATASET_TYPE"] != "raw",
        "fine-tuning on .bin/.idx files",
        "MP_DATASET_TYPE=raw with JSON files",
    ),
)


def check_built(lines: tuple[Line, ...], values: Mapping[str, object], where: Callable[[str], str]) -> None:
    """Raise UsageError naming every value that a later version will accept; lines of absent names do not apply.

    `where` turns a name into how the user wrote it: `argument 11 (PP)`.
    """
    refused = [
        f"{where(name)} is {_spelled(values[name])}: {what} is not built yet; use {instead}"
        for name, is_beyond, what, instead in lines
        if name in values and is_beyond(values)
    ]
    if refused:
        raise UsageError("\n".join(refused))


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
