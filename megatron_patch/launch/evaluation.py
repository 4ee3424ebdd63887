"""ModelLink's evaluation script: its flags as one `megatron_patch.evaluate` command on all ranks."""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_patch.launch import cluster
from megatron_patch.launch.evaluation_tables import TASKS
from megatron_patch.launch.options import check_options
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.plan.disk import present_obstacles

SPLITS = ("dev", "val", "test")


def plan(request: Request) -> dict[str, Any]:
    """What will be scored, and by which command. Raises UsageError for what stands in its way."""
    v = request.values
    check_options(request.options, [arg.name for arg in request.table])
    ranks = cluster.said(v)
    if ranks.world % (v["TP"] * v["PP"]):
        raise UsageError(
            f"{ranks.world} ranks ({ranks.counted}) cannot be shared by models on {v['TP']} × {v['PP']} ranks (TP × PP)"
        )
    data = _data(v["DATA_PATH"])
    obstacles = present_obstacles(*(lambda path=path: _check_directory(path) for path in (v["CHECKPOINT"], str(data))))
    if obstacles and not request.is_dry:
        raise UsageError("\n".join(obstacles))
    return {
        "arguments": request.arguments(),
        "output": {"results": v["OUTPUT_PATH"] or None},
        "environment": {"MP_EVAL_DATA": str(data), **cluster.threads(request.environ, ranks)},
        "command": [
            *(sys.executable, "-m", "megatron_patch.train.agent", *ranks.options, "-m", "megatron_patch.evaluate"),
            *("--model_args", json.dumps(_model(v)), "--tasks", TASKS[v["TASK"]]),
            *("--batch_size", str(v["BATCH_SIZE"]), "--num_fewshot", str(v["NUM_FEWSHOT"])),
            *(["--limit", str(v["LIMIT"])] if v["LIMIT"] else []),
            *(["--output_path", v["OUTPUT_PATH"]] if v["OUTPUT_PATH"] else []),
            *(["--apply_chat_template"] if v["CHAT_TEMPLATE"] else []),
        ],
        "warnings": obstacles,
    }


def _model(v: dict[str, Any]) -> dict[str, Any]:
    tokenizer = v["TOKENIZER_PATH"] or v["TOKENIZER_MODEL"]
    named = {"tokenizer": tokenizer} if tokenizer else {}
    precision = "bf16" if v["BF16"] else "fp32"
    return {"checkpoint": v["CHECKPOINT"], **named, "tp": v["TP"], "pp": v["PP"], "ep": v["EP"], "precision": precision}


def _data(path: str) -> Path:
    """The directory that holds all splits; documents name that of one."""
    directory = Path(path).absolute()
    return directory.parent if directory.name in SPLITS else directory


def _check_directory(path: str) -> None:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"directory {path!r} does not exist")
