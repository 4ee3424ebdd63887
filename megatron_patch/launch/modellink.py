"""ModelLink's and Mixtral-Train's conversion programs: their flags as one `megatron_patch.convert` command."""

import re
from pathlib import Path
from typing import Any

from megatron_patch.config.checkpoint import TRACKER
from megatron_patch.config.model import ModelConfig
from megatron_patch.families import ALL
from megatron_patch.launch.conversion import OPTIONS, Conversion, architecture, checkpoint_root, finish
from megatron_patch.launch.options import check_options, option_value
from megatron_patch.launch.positional import Request, UsageError

EXPORT = "mg2hg"  # the directory that appears inside --save-dir
LOADERS = {  # the families whose Hugging Face directories each reads; none: a Megatron checkpoint
    "llama2_hf": ("llama", "mistral", "qwen1_5"),
    "mistral_hf": ("mistral",),
    "mixtral_hf": ("mixtral",),
    "megatron": (),
    "mixtral_mg": (),
}
SIZES = {
    "--tp": "--target-tensor-parallel-size",
    "--pp": "--target-pipeline-parallel-size",
    "--ep": "--target-expert-parallel-size",
}
IGNORED = ("--make-vocab-size-divisible-by", "--max-queue-size", "--megatron-path", "--vocab-file")


def plan(request: Request) -> dict[str, Any]:
    """What will be written, and by which command. Raises ValueError or OSError for what stands in its way."""
    check_options(request.options, (*OPTIONS, *request.values))
    v, families = request.values, LOADERS[request.values["--loader"]]
    is_export = v["--save-model-type"] != "megatron"
    source = v["--load-dir"] if families else checkpoint_root(v["--load-dir"])
    job = Conversion(
        source=source,
        target=str(Path(v["--save-dir"]) / EXPORT) if is_export else v["--save-dir"],
        format=_format(request, is_export=is_export),
        families=families or tuple(ALL),
        assets=v["--save-dir"] if is_export else None,
        layout=_layout(request, source, is_export=is_export),
        dtype=v["--params-dtype"],
    )
    described = option_value(request.options, "--assets") or job.assets or source
    resolved, absent = architecture(request, job, described)
    problems = _problems(request, resolved and resolved.config)
    return finish(request, job, resolved, absent + _absent(v["--tokenizer-model"]), problems, _ignored(request))


def _format(request: Request, *, is_export: bool) -> str:
    if is_export:
        return "hf"
    return request.format if request.values["--saver"] == "mixtral" else "modellink"


def _layout(request: Request, source: str, *, is_export: bool) -> dict[str, int]:
    """The sizes that were said; else, as ModelLink has it, the source's own where experts do not blur their names."""
    said = {flag: request.values[name] for flag, name in SIZES.items()}
    if is_export:
        cut = {flag: size for flag, size in said.items() if size > 1}
        if cut:
            names = ", ".join(f"{SIZES[flag]} {size}" for flag, size in cut.items())
            raise UsageError(f"{names}: a Hugging Face directory is not cut; use 1")
        return {}
    is_plain = not LOADERS[request.values["--loader"]] and request.values["--saver"] == "megatron"
    found = rank_sizes(Path(source)) if is_plain else {}
    return {flag: size or found.get(flag, 1) for flag, size in said.items() if size or flag in found}


def rank_sizes(root: Path) -> dict[str, int]:
    """Sizes by flag, as far as the names `mp_rank_TT[_PPP[_EEE]]` tell; two numbers are TT and PPP."""
    names = [path.name for path in root.glob("*/mp_rank_*")]
    ranks = [tuple(map(int, re.findall(r"\d+", name))) for name in names]
    longest = max(map(len, ranks), default=0)
    return {flag: 1 + max(rank[i] for rank in ranks) for i, flag in enumerate(("--tp", "--pp", "--ep")[:longest])}


def _problems(request: Request, config: ModelConfig | None) -> list[str]:
    """Sentences about flags that contradict the model, or the directory that is loaded."""
    v, is_mixtral = request.values, request.values["--saver"] == "mixtral"
    directory = Path(v["--load-dir"])
    is_megatron, wants = (directory / TRACKER).is_file(), not LOADERS[v["--loader"]]
    rules = [
        (v["--w-pack"], "--w-pack is true: no supported model packs query, key and value in its Hugging Face files"),
        (v["--add-dense-bias"], "--add-dense-bias: no supported model has that bias"),
        (
            directory.is_dir() and is_megatron != wants,
            f"--loader is {v['--loader']}, but {directory} holds {_kind(is_megatron)}",
        ),
    ]
    if config is not None:
        vocabulary, experts = v["--true-vocab-size"], config.num_moe_experts
        rules += [
            (v["--add-qkv-bias"] and not config.add_qkv_bias, "--add-qkv-bias: config.json describes no such bias"),
            (
                vocabulary not in (0, config.vocab_size),
                f"--true-vocab-size is {vocabulary}, and config.json's vocab_size {config.vocab_size}; leave it out",
            ),
            (is_mixtral and not experts, "--saver is mixtral, but config.json describes no experts; use megatron"),
            (
                not is_mixtral and experts and v["--save-model-type"] == "megatron",
                "--saver is megatron, but config.json describes experts; use mixtral",
            ),
        ]
    return [sentence for is_broken, sentence in rules if is_broken]


def _kind(is_megatron: bool) -> str:
    return f"a Megatron checkpoint ({TRACKER})" if is_megatron else f"none: there is no {TRACKER}"


def _absent(tokenizer: str | None) -> list[str]:
    return [f"--tokenizer-model {tokenizer!r} does not exist"] if tokenizer and not Path(tokenizer).exists() else []


def _ignored(request: Request) -> list[str]:
    return [f"{name} has no effect" for name in (*IGNORED, "--no-checking") if request.values[name]]
