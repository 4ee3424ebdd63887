"""ModelLink's and Mixtral-Train's preprocessing flags as one command: of documents, or of instructions."""

import sys
from typing import Any, NamedTuple

from megatron_patch.data.handlers import check_recipe, resolve_handler
from megatron_patch.data.index_header import instruction_prefixes
from megatron_patch.data.inputs import check_readable, resolve_inputs
from megatron_patch.data.prompts import PROMPTS
from megatron_patch.launch.dataset_tables import PRETRAIN_HANDLER
from megatron_patch.launch.datasets_params import resolve_params
from megatron_patch.launch.options import check_options
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.launch.preprocessing import check_tokenizer
from megatron_patch.plan.disk import check_writable, present_obstacles

PASSED_ON = ("--append-eod", "--recursive", "--skip-bad-lines", "--tokenizer-not-use-fast", "--trust-remote-code")
OF_DOCUMENTS = ("--keep-newlines", "--split-sentences")
OF_INSTRUCTIONS = ("--map-keys", "--pack", "--prompt-type")


class Made(NamedTuple):
    """What a command makes: its module, its outputs by name, the arguments that it alone takes, and warnings."""

    module: str
    output: dict[str, str]
    own: list[str]
    warnings: list[str]


def plan(request: Request) -> dict[str, Any]:
    """What will be written, and by which command. Documents begin with BOS as the tokenizer's own texts do: that is
    how these programs tokenise. Raises UsageError for what stands in its way."""
    check_options(request.options, [arg.name for arg in request.table])
    v = request.values
    prefix, inputs, tokenizer = v["--output-prefix"], _inputs(v), _tokenizer(v)
    is_general = v["--handler-name"] == PRETRAIN_HANDLER
    module, output, own, warnings = (_documents if is_general else _instructions)(v, prefix)
    obstacles = present_obstacles(
        lambda: check_readable(resolve_inputs(inputs, v["--recursive"])),
        lambda: check_tokenizer(tokenizer),
        lambda: check_writable(prefix),
    )
    if obstacles and not request.is_dry:
        raise UsageError("\n".join(obstacles))
    length = ["--seq-length", str(v["--seq-length"])] if v["--seq-length"] else []
    return {
        "arguments": request.arguments(),
        "output": output,
        "environment": {},
        "command": [
            *(sys.executable, "-m", f"megatron_patch.data.{module}", "--input", *inputs),
            *("--output-prefix", prefix, "--tokenizer-model", tokenizer, *own),
            *("--workers", str(v["--workers"]), *length),
            *(name for name in PASSED_ON if v[name]),
        ],
        "warnings": [*obstacles, *warnings],
    }


def _documents(v: dict[str, Any], prefix: str) -> Made:
    """General text: a pair of files for each key."""
    for name in OF_INSTRUCTIONS:
        if v[name]:
            raise UsageError(f"{name} is of instruction handlers; name one with --handler-name, or leave it out")
    json_keys, level = _keys(v), "sentence" if v["--split-sentences"] else "document"
    own = ["--json-keys", *json_keys, "--prepend-bos"]
    own += [name for name in OF_DOCUMENTS if v[name]]
    warnings = []
    if v["--keep-newlines"] and not v["--split-sentences"]:
        warnings.append("--keep-newlines has no effect without --split-sentences: documents keep their text as it is")
    return Made("preprocess", {f"{key}_{level}": f"{prefix}_{key}_{level}" for key in json_keys}, own, warnings)


def _instructions(v: dict[str, Any], prefix: str) -> Made:
    """Records that a handler reads: three pairs of files, or one of texts."""
    name = v["--handler-name"]
    handler = resolve_handler(name, v["--map-keys"])
    if v["--split-sentences"]:
        raise UsageError(f"--split-sentences is of {PRETRAIN_HANDLER}, not of {name}; leave it out")
    check_recipe(name, pack=v["--pack"], seq_length=v["--seq-length"], prompt_type=v["--prompt-type"])
    if v["--prompt-type"] and v["--prompt-type"] not in PROMPTS:
        raise UsageError(f"--prompt-type {v['--prompt-type']!r} is not one of {', '.join(PROMPTS)}")
    names = (f"{prefix}_text_document",) if handler.is_text else instruction_prefixes(prefix)
    own = ["--handler", name, "--log-interval", str(v["--log-interval"]), *(["--pack"] if v["--pack"] else [])]
    for flag in ("--map-keys", "--prompt-type"):
        own += [flag, v[flag]] if v[flag] else []
    warnings = []
    if not v["--append-eod"] and not handler.is_text and handler.template and not v["--prompt-type"]:
        warnings.append(f"{name} ends answers with EOS only with --append-eod; without, models do not learn to stop")
    return Made("preprocess_instructions", {path.removeprefix(f"{prefix}_"): path for path in names}, own, warnings)


def _inputs(v: dict[str, Any]) -> list[str]:
    if v["--hf-datasets-params"]:
        return resolve_params(v["--hf-datasets-params"])
    if not v["--input"]:
        raise UsageError("--input is missing; name files, directories or patterns, or --hf-datasets-params")
    return v["--input"]


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
