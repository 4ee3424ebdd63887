"""A generation script's flags as one `megatron_patch.generate` command, on as many ranks as it says."""

import sys
from pathlib import Path
from typing import Any

from megatron_patch.config.checks import check_layout
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.families import ALL
from megatron_patch.families.resolve import from_checkpoint
from megatron_patch.launch import cluster
from megatron_patch.launch.generation_tables import SETTINGS
from megatron_patch.launch.options import check_options
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.parallel.stages import resolve_stages

TASKS = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "return_output_log_probs", "chat")
QUESTION = "how are you?"
OPTIONS = (
    *("--task", "--prompt", "--prompts", "--chat", "--system", "--inference-prompt-type", "--hf-chat-template"),
    *("--num-beams", "--length-penalty", "--stop", "--json"),
)


def plan(request: Request) -> dict[str, Any]:
    """What will be started. Raises UsageError, with all that stands in its way, and ValueError for a bad config.json.

    Without a task it is every one, and without a prompt QUESTION, as in ModelLink.
    """
    check_options(request.options, (*OPTIONS, *(arg.name for arg in request.table)))
    v, ranks = request.values, cluster.said(request.values)
    said = {text.partition("=")[0] for text in request.options}
    tokenizer = v["TOKENIZER_PATH"] or v["TOKENIZER_MODEL"]
    obstacles = [f"the tokenizer {tokenizer!r} does not exist"] if tokenizer and not Path(tokenizer).exists() else []
    try:
        _check_layout(v, from_checkpoint(tuple(ALL), "auto", v["CHECKPOINT"]).config, ranks.world)
    except OSError as error:
        obstacles.append(f"--load: {error}")
    if obstacles and not request.is_dry:
        raise UsageError("\n".join(obstacles))
    generator = [
        *("-m", "megatron_patch.generate", "--checkpoint", v["CHECKPOINT"]),
        *(("--tokenizer", tokenizer) if tokenizer else ()),
        *("--tp", str(v["TP"]), "--pp", str(v["PP"]), "--ep", str(v["EP"])),
        *("--precision", "bf16" if v["BF16"] else "fp32"),
        *(() if said & {"--prompt", "--prompts", "--chat"} else ("--prompt", QUESTION)),
        *(() if said & {"--task", "--chat"} else ("--task", *TASKS)),
        *(text for arg in SETTINGS if v[arg.means] is not None for text in (arg.name, str(v[arg.means]))),
        *request.options,
    ]
    agent = ("-m", "megatron_patch.train.agent", *ranks.options) if ranks.world > 1 else ()
    return {
        "arguments": request.arguments(),
        "output": {"answers": "standard output"},
        "parallel": {"world": ranks.world, "tp": v["TP"], "pp": v["PP"], "ep": v["EP"], "counted": ranks.counted},
        "environment": cluster.threads(request.environ, ranks),
        "command": [sys.executable, *agent, *generator],
        "warnings": obstacles,
    }


def _check_layout(v: dict[str, Any], config: ModelConfig, world: int) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=v["TP"],
        pipeline_model_parallel_size=v["PP"],
        expert_model_parallel_size=v["EP"],
    )
    check_layout(config, parallel)
    resolve_stages(config.num_layers, parallel)
    resolve_grid(parallel, world)
