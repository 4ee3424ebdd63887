"""ModelLink's and Mixtral-Train's preprocessing flags as one `megatron_patch.data.preprocess` command."""

import sys
from typing import Any

from megatron_patch.data.inputs import check_readable, resolve_inputs
from megatron_patch.launch.options import check_options
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.launch.preprocessing import check_tokenizer
from megatron_patch.plan.disk import check_writable, present_obstacles

PASSED_ON = (
    *("--append-eod", "--keep-newlines", "--recursive", "--skip-bad-lines", "--split-sentences"),
    *("--tokenizer-not-use-fast", "--trust-remote-code"),
)


def plan(request: Request) -> dict[str, Any]:
    """What will be written, and by which command. Documents begin with BOS as the tokenizer's own texts do: that is
    how these programs tokenise. Raises UsageError for what stands in its way."""
    check_options(request.options, [arg.name for arg in request.table])
    v = request.values
    prefix, json_keys, tokenizer = v["--output-prefix"], _keys(v), _tokenizer(v)
    obstacles = present_obstacles(
        lambda: check_readable(resolve_inputs(v["--input"], v["--recursive"])),
        lambda: check_tokenizer(tokenizer),
        lambda: check_writable(prefix),
    )
    if obstacles and not request.is_dry:
        raise UsageError("\n".join(obstacles))
    level = "sentence" if v["--split-sentences"] else "document"
    length = ["--seq-length", str(v["--seq-length"])] if v["--seq-length"] else []
    return {
        "arguments": request.arguments(),
        "output": {f"{key}_{level}": f"{prefix}_{key}_{level}" for key in json_keys},
        "environment": {},
        "command": [
            *(sys.executable, "-m", "megatron_patch.data.preprocess", "--input", *v["--input"]),
            *("--output-prefix", prefix, "--tokenizer-model", tokenizer, "--json-keys", *json_keys),
            *("--workers", str(v["--workers"]), "--prepend-bos", *length),
            *(name for name in PASSED_ON if v[name]),
        ],
        "warnings": [*obstacles, *_without_effect(v)],
    }


def _keys(v: dict[str, Any]) -> list[str]:
    if v["--json_keys"] and v["--json-keys"] not in (["text"], v["--json_keys"]):
        raise UsageError("--json-keys and --json_keys are one flag in two spellings; give one of them")
    return v["--json_keys"] or v["--json-keys"]


def _tokenizer(v: dict[str, Any]) -> str:
    given = [name for name in ("--tokenizer-name-or-path", "--tokenizer-model") if v[name]]
    if not given:
        raise UsageError(
            "--tokenizer-name-or-path and --tokenizer-model are missing; name the tokenizer's directory with either"
        )
    if len({v[name] for name in given}) > 1:
        values = " and ".join(f"{name} {v[name]!r}" for name in given)
        raise UsageError(f"{values} name two tokenizers; give one of them")
    return v[given[0]]


def _without_effect(v: dict[str, Any]) -> list[str]:
    if v["--keep-newlines"] and not v["--split-sentences"]:
        return ["--keep-newlines has no effect without --split-sentences: documents keep their text as it is"]
    return []
