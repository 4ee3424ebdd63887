"""Fine-tuning preprocessing's arguments as one `megatron_patch.data.preprocess_sft` command."""

import sys
from typing import Any

from megatron_patch.data.inputs import check_readable, resolve_inputs
from megatron_patch.data.records import resolve_names
from megatron_patch.launch.cluster import cores
from megatron_patch.launch.options import check_options, option_value
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.launch.preprocessing import MOST_WORKERS, check_tokenizer
from megatron_patch.plan.disk import check_writable, present_obstacles

OPTIONS = (
    *("--map-keys", "--prompt-type", "--recursive", "--show-samples", "--skip-bad-lines", "--trust-remote-code"),
    "--workers",
)


def plan(request: Request) -> dict[str, Any]:
    """What will be written, and by which command. Raises UsageError for what stands in its way."""
    check_options(request.options, OPTIONS)
    v = request.values
    resolve_names(option_value(request.options, "--map-keys"))
    document = f"{v['OUTPUT_PREFIX']}_text_document"
    obstacles = present_obstacles(
        lambda: check_readable(resolve_inputs([v["INPUT_DATA_PATH"]], "--recursive" in request.options)),
        lambda: check_tokenizer(v["LOAD_DIR"]),
        lambda: check_writable(document),
    )
    if obstacles and not request.is_dry:
        raise UsageError("\n".join(obstacles))
    return {
        "arguments": request.arguments(),
        "output": {"text_document": document},
        "environment": {},
        "command": [
            *(sys.executable, "-m", "megatron_patch.data.preprocess_sft", "--input", v["INPUT_DATA_PATH"]),
            *("--output-prefix", v["OUTPUT_PREFIX"], "--tokenizer-model", v["LOAD_DIR"]),
            *("--seq-length", str(v["SEQ_LEN"]), *(["--pack"] if v["PACKING"] else [])),
            *("--family-prompt", "mistral" if v["TOKENIZER"] in ("MistralTokenizer", "MixtralTokenizer") else "alpaca"),
            *("--workers", str(min(cores(), MOST_WORKERS)), *request.options),
        ],
        "warnings": obstacles,
    }
