"""Pre-training preprocessing's arguments as one `megatron_patch.data.preprocess` command."""

import sys
from pathlib import Path
from typing import Any

from megatron_patch.data.inputs import check_readable, resolve_inputs
from megatron_patch.launch.cluster import cores
from megatron_patch.launch.options import check_options
from megatron_patch.launch.positional import Request, UsageError, place
from megatron_patch.launch.tables import PREFIXES
from megatron_patch.plan.disk import check_writable, present_obstacles

OPTIONS = (
    *("--prepend-bos", "--recursive", "--seq-length", "--skip-bad-lines"),
    *("--tokenizer-not-use-fast", "--trust-remote-code", "--workers"),
)
MOST_WORKERS = 16


def plan(request: Request) -> dict[str, Any]:
    """What will be written, and by which command. Raises UsageError for what stands in its way."""
    check_options(request.options, OPTIONS)
    v = request.values
    prefix = str(Path(v["OUTPUT_DATA_DIR"]) / _prefix(request))
    obstacles = present_obstacles(
        lambda: check_readable(resolve_inputs([v["INPUT_DATA_PATH"]], "--recursive" in request.options)),
        lambda: check_tokenizer(v["LOAD_DIR"]),
        lambda: check_writable(prefix),
    )
    if obstacles and not request.is_dry:
        raise UsageError("\n".join(obstacles))
    return {
        "arguments": request.arguments(),
        "output": {f"{key}_document": f"{prefix}_{key}_document" for key in v["JSON_KEYS"]},
        "environment": {},
        "command": [
            *(sys.executable, "-m", "megatron_patch.data.preprocess"),
            *("--input", v["INPUT_DATA_PATH"], "--output-prefix", prefix, "--tokenizer-model", v["LOAD_DIR"]),
            *(
                "--json-keys",
                *v["JSON_KEYS"],
                "--append-eod",
                "--workers",
                str(min(cores(), MOST_WORKERS)),
                *request.options,
            ),
        ],
        "warnings": [*obstacles, *_without_effect(request)],
    }


def _prefix(request: Request) -> str:
    tokenizer, dataset = request.values["TOKENIZER"], request.values["DATASET_NAME"]
    pattern = PREFIXES[tokenizer]
    if "{dataset}" in pattern and not dataset:
        raise UsageError(f"{place(request.table, 'DATASET_NAME')} is missing: {tokenizer} names its output with it")
    return pattern.format(dataset=dataset)


def check_tokenizer(path: str) -> None:
    """Raise FileNotFoundError unless `path` is a directory, or a sentencepiece model in one."""
    if not Path(path).is_dir() and not (Path(path).name == "tokenizer.model" and Path(path).is_file()):
        raise FileNotFoundError(f"tokenizer directory {path!r} does not exist")


def _without_effect(request: Request) -> list[str]:
    tokenizer, dataset = request.values["TOKENIZER"], request.values["DATASET_NAME"]
    if dataset and "{dataset}" not in PREFIXES[tokenizer]:
        return [f"{place(request.table, 'DATASET_NAME')} is {dataset!r}: no effect, {tokenizer} has its own name"]
    return []
