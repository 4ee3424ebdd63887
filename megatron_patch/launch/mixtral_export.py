"""Mixtral-Train's export to Hugging Face: its flags as one `megatron_patch.convert` command."""

from pathlib import Path
from typing import Any

from megatron_patch.launch.conversion import OPTIONS, Conversion, architecture, checkpoint_root, finish
from megatron_patch.launch.options import check_options
from megatron_patch.launch.positional import Request, UsageError

SIZES = {
    "--tp": "--tensor-parallel-size",
    "--pp": "--pipeline-parallel-size",
    "--ep": "--expert-parallel-size",
}


def plan(request: Request) -> dict[str, Any]:
    """What will be written, and by which command. Raises ValueError or OSError for what stands in its way."""
    check_options(request.options, (*OPTIONS, *request.values))
    v = request.values
    config, target = v["--huggingface-config-path"], v["--huggingface-checkpoint-path"]
    if Path(config).resolve() == Path(target).resolve() and "--overwrite" not in request.options:
        raise UsageError(
            f"--huggingface-checkpoint-path is --huggingface-config-path {config!r}: the model there would be "
            "replaced; name another directory, or pass --overwrite"
        )
    job = Conversion(
        source=checkpoint_root(v["--megatron-checkpoint-path"]),
        target=target,
        format="hf",
        families=request.families,
        assets=config,
        layout={flag: v[name] for flag, name in SIZES.items()},
    )
    resolved, absent = architecture(request, job, config)
    return finish(request, job, resolved, absent, [], [])
