"""A converter's arguments as one `megatron_patch.convert` command."""

import sys
from pathlib import Path
from typing import Any

from megatron_patch.families.manifest import parameter_count
from megatron_patch.launch.options import check_options
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.launch.size import resolve_size
from megatron_patch.plan.disk import check_writable, present_obstacles

OPTIONS = ("--dtype", "--overwrite", "--transformer-impl")


def plan(request: Request) -> dict[str, Any]:
    """What will be written, and by which command. Raises ValueError or OSError for what stands in its way."""
    check_options(request.options, OPTIONS)
    v = request.values
    source, target, assets = v["SOURCE_CKPT_PATH"], v["TARGET_CKPT_PATH"], v["HG_CKPT_PATH"]
    has_assets = Path(assets).absolute() != Path(source).absolute()
    resolved, absent = resolve_size(request, assets if has_assets else source)
    is_replaced = "--overwrite" in request.options
    obstacles = absent + present_obstacles(
        lambda: _check_source(source), lambda: _check_target(target, is_replaced=is_replaced)
    )
    if obstacles and not request.is_dry:
        raise UsageError("\n".join(obstacles))
    return {
        "arguments": request.arguments(),
        "model": {"family": resolved.family.name, "parameters": parameter_count(resolved.family, resolved.config)},
        "output": {"checkpoint": target},
        "environment": {},
        "command": [
            *(sys.executable, "-m", "megatron_patch.convert", source, target),
            *("--format", "hf" if v["mg2hf"] else "mcore", "--tp", str(v["TP"]), "--pp", str(v["PP"])),
            *(["--assets", assets] if has_assets else []),
            *("--model-size", v["MODEL_SIZE"], *request.options),
        ],
        "warnings": [*resolved.warnings, *obstacles, *_without_effect(request)],
    }


def _check_source(source: str) -> None:
    if not Path(source).is_dir():
        raise FileNotFoundError(f"source directory {source!r} does not exist")


def _check_target(target: str, *, is_replaced: bool) -> None:
    check_writable(target)
    if not is_replaced and Path(target).is_dir() and any(Path(target).iterdir()):
        raise FileExistsError(f"target directory {target!r} is not empty; pass --overwrite, or name another")


def _without_effect(request: Request) -> list[str]:
    if request.values["WS"]:
        return [f"WS (argument 13) is {request.values['WS']}: no effect, one process converts"]
    return []
