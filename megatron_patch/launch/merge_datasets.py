"""The flags of `merge_datasets.py` as one `megatron_patch.data.merge` command."""

import sys
from pathlib import Path
from typing import Any

from megatron_patch.launch.options import check_options
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.plan.disk import check_writable, present_obstacles


def plan(request: Request) -> dict[str, Any]:
    """What will be written, and by which command. Raises UsageError for what stands in its way."""
    check_options(request.options, [arg.name for arg in request.table])
    source, prefix = request.values["--input"], request.values["--output-prefix"]
    obstacles = present_obstacles(lambda: _check_directory(source), lambda: check_writable(prefix))
    if obstacles and not request.is_dry:
        raise UsageError("\n".join(obstacles))
    return {
        "arguments": request.arguments(),
        "output": {"merged": prefix},
        "environment": {},
        "command": [*(sys.executable, "-m", "megatron_patch.data.merge", "--input", source, "--output-prefix", prefix)],
        "warnings": obstacles,
    }


def _check_directory(path: str) -> None:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"input {path!r} is no directory")
