"""A training launcher's arguments as a plan, whose command starts the run that they describe."""

import importlib.util
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_patch.config.checks import problems
from megatron_patch.config.flags import flag, to_flags
from megatron_patch.config.run import RunConfig
from megatron_patch.families.resolve import preset
from megatron_patch.launch import cluster
from megatron_patch.launch.conversion_rules import vocabulary
from megatron_patch.launch.data_options import with_data_options
from megatron_patch.launch.epochs import in_epochs, samples_per_epoch
from megatron_patch.launch.mixture import Architecture, resolve_architecture
from megatron_patch.launch.options import check_options, names, overridden, settings
from megatron_patch.launch.positional import Request, UsageError
from megatron_patch.launch.training_run import run_config
from megatron_patch.parallel.grid import resolve_grid, smallest_world
from megatron_patch.plan.disk import look

# Settings that a message names, as the user typed them.
CAPITALS = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
    "sequence_parallel": "SP",
    "micro_batch_size": "BATCH_SIZE",
    "global_batch_size": "GLOBAL_BATCH_SIZE",
    "lr": "LR",
    "min_lr": "MIN_LR",
    "seq_length": "SEQ_LEN",
    "max_padding_length": "PAD_LEN",
    "save_interval": "SAVE_INTERVAL",
    "precision": "PR",
    "num_layers_per_virtual_pipeline_stage": "MP_VP",
    "decoder_first_pipeline_num_layers": "MP_PP0_LAYERS",
    "recompute_num_layers": "MP_AC_LAYERS",
    "cpu_offloading_num_layers": "MP_AC_LAYERS",
}
# Settings besides, that an argument or a variable decides where a launcher has it.
DECIDED = {
    "use_distributed_optimizer": "DO",
    "use_flash_attn": "FL",
    "recompute_granularity": "AC",
    "optimizer_offload_policy": "OPTIMIZER_OFFLOAD",
    "optimizer_offload_fraction": "OPTIMIZER_OFFLOAD",
    "dataset": "MP_DATASET_TYPE",
    "load": "PRETRAIN_CHECKPOINT_PATH",
    "lr_warmup_iters": "WARMUP_TOKENS_OR_ITERS",
    "sft_packing": "MP_SFT_PACKING",
    "upcycle": "MOE",
}
# Arguments from which the iterations of a schedule follow, and the options that say them otherwise.
AMOUNT = re.compile(r"(TRAIN|WARMUP)_(TOKENS|ITERS|TOKENS_OR_ITERS|SHARE)")
OF_SCHEDULE = {"--train-iters", "--lr-warmup-iters", "--lr-decay-iters"}
UNCOUNTED = ("train_iters", "lr_decay_iters", "samples", "tokens", "epochs", "save_interval")


def plan(request: Request) -> dict[str, Any]:
    """The plan of one run. Raises UsageError (or ValueError, OSError) for everything that stands in its way at once."""
    _check_data_kind(request)
    request, data_notes = with_data_options(request)
    check_options(request.options, settings())
    architecture, contradiction = _architecture(request)
    derived = overridden(run_config(request, architecture), _launcher_flags(request), {})
    elsewhere = {
        "--load": request.where("PRETRAIN_CHECKPOINT_PATH"),
        "--family": request.where("MODEL_SIZE"),
        **dict.fromkeys(("--upcycle", "--no-upcycle"), _where_moe(request)),
    }
    run = overridden(derived, request.options, elsewhere)
    ranks = _ranks(request, run)
    run, uncounted = _settled(request, run, ranks.world)
    obstacles = _check(request, run, ranks.world, architecture.absent, contradiction)
    warnings = [*architecture.resolved.warnings, *obstacles]
    grid = resolve_grid(run.parallel, ranks.world)
    from megatron_patch.plan.describe import cautions, describe  # a refused command does not wait for them
    from megatron_patch.plan.machine import resolve_machine

    machine = resolve_machine(ranks.ranks_per_node, has_accelerator=cluster.accelerators(request.environ)[0] > 0)
    sections = describe(run, architecture.resolved.family, grid, machine, _typed(request))
    sections["parallel"]["counted"] = ranks.counted
    sections["schedule"] |= dict.fromkeys(UNCOUNTED) if uncounted else {}
    return {
        "arguments": request.arguments(),
        **sections,
        "environment": cluster.threads(request.environ, ranks),
        "command": [
            *(sys.executable, "-m", "megatron_patch.train.agent"),
            *ranks.options,
            *("-m", "megatron_patch.train", *to_flags(run)),
        ],
        "warnings": [
            *(*warnings, *uncounted, *_notes(request, run, architecture), *data_notes, *_without_effect(request)),
            *(*_overridden_model(derived, run), *cautions(sections)),
        ],
    }


def _where_moe(request: Request) -> str:
    return request.where("MOE") if "MOE" in request.values else "MOE, an argument of other launchers"


def _typed(request: Request) -> set[str]:
    """The flags of the settings that the user gave, as options or as arguments."""
    given = {arg.means for arg in request.table} | request.environ.keys()
    return {
        *names(request.options),
        *(flag(name) for name, capital in (CAPITALS | DECIDED).items() if capital in given),
    }


def _architecture(request: Request) -> tuple[Architecture, list[str]]:
    """What is trained; where a checkpoint contradicts MODEL_SIZE, what that says, and the contradiction."""
    try:
        return resolve_architecture(request), []
    except ValueError as error:
        size = request.values["MODEL_SIZE"]
        if isinstance(error, UsageError) or size == "auto" or request.values.get("MOE"):
            raise
        return Architecture(preset(request.families, size), []), [str(error)]


def _launcher_flags(request: Request) -> list[str]:
    """What this launcher sets otherwise than the trainer does."""
    return [text.format_map(request.values) for text in request.flags]


def _settled(request: Request, run: RunConfig, world: int) -> tuple[RunConfig, list[str]]:
    """`run` with what follows from the number of ranks and of records, and why the latter could not be counted."""
    v, said = request.values, names(request.options)
    parallel = run.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    dp = max(world // ranks, 1)
    if "EP" not in v and "--expert-model-parallel-size" not in said:
        ep = math.gcd(dp, run.model.num_moe_experts) if run.model.num_moe_experts else 1
        run = replace(run, parallel=replace(parallel, expert_model_parallel_size=ep))
    if "GLOBAL_BATCH_SIZE" not in v and "--global-batch-size" not in said:
        run = replace(run, global_batch_size=run.micro_batch_size * dp)
    if "EPOCH" not in v:
        return run, []
    try:
        return in_epochs(run, v["EPOCH"], samples_per_epoch(run.data), said), []
    except FileNotFoundError as error:
        return in_epochs(run, v["EPOCH"], 1, said), [
            f"{error}; how many iterations {request.where('EPOCH')} takes is unknown, and the command has one per epoch"
        ]


def _ranks(request: Request, run: RunConfig) -> cluster.Cluster:
    if "NNODES" in request.values:
        return cluster.said(request.values)
    if request.values["ENV"] == "dlc":
        return cluster.many_nodes(request.environ)
    return cluster.one_node(request.environ, smallest_world(**_axes(run)))


def _axes(run: RunConfig) -> dict[str, int | None]:
    sizes = run.parallel
    return {
        "tp": sizes.tensor_model_parallel_size,
        "cp": sizes.context_parallel_size,
        "ep": sizes.expert_model_parallel_size,
        "pp": sizes.pipeline_model_parallel_size,
        "etp": sizes.expert_tensor_parallel_size,
    }


def _check_data_kind(request: Request) -> None:
    if request.values["MP_DATASET_TYPE"] == "raw" and not request.values["SFT"]:
        has_choice = any(arg.name == "SFT" for arg in request.table)
        why = f"{request.where('SFT')} is false" if has_choice else "this launcher pre-trains"
        raise UsageError(f"{why}: MP_DATASET_TYPE=raw is for fine-tuning; {'use SFT true, or ' * has_choice}unset it")


def _check(request: Request, run: RunConfig, world: int, absent: list[str], contradiction: list[str]) -> list[str]:
    """Raise UsageError with all that is broken. A dry run only warns of paths that are missing or occupied now."""
    now, wrong = look(run)
    obstacles = [*absent, *now, *_lacking_for_float8(request, run)]
    broken = [*contradiction, *(in_capitals(sentence, request) for sentence in problems(run, world))]
    broken += [*wrong, *_vocabulary(request, run)[0], *([] if request.is_dry else obstacles)]
    if broken:
        raise UsageError("\n".join(broken))
    return obstacles


def _lacking_for_float8(request: Request, run: RunConfig) -> list[str]:
    """What fp8 needs and this machine does not show; the ranks look at the GPU itself."""
    lacking = []
    if run.precision == "fp8" and not cluster.accelerators(request.environ)[0]:
        lacking.append("a CUDA GPU of compute capability 8.9 or more")
    if run.precision == "fp8" and importlib.util.find_spec("torchao") is None:
        lacking.append("the package torchao (the extra `fp8`)")
    return (
        [f"{request.where('PR')} is fp8, which needs {' and '.join(lacking)}, not found here; use bf16"]
        if lacking
        else []
    )


def in_capitals(sentence: str, request: Request) -> str:
    """Field names replaced by the arguments they came from: `TP (argument 10)`; environment variables by theirs."""
    places = {arg.name: f"{arg.name} (argument {number})" for number, arg in enumerate(request.table, 1)}
    places |= {arg.means: arg.name for arg in request.table if arg.means != arg.name}
    places |= {name: f"{name} (environment)" for name in CAPITALS.values() if name.startswith("MP_")}
    told = re.sub(rf"\b({'|'.join(CAPITALS)})\b", lambda match: places.get(CAPITALS[match[0]], match[0]), sentence)
    amounts = [request.where(arg.name) for arg in request.table if AMOUNT.fullmatch(arg.means)]
    is_derived = "lr_decay_iters" in sentence and not OF_SCHEDULE & set(names(request.options))
    return f"{told} (from {' and '.join(amounts)})" if is_derived else told


def _vocabulary(request: Request, run: RunConfig) -> tuple[list[str], list[str]]:
    """Problems and warnings about EXTRA_VOCAB_SIZE."""
    tokenizer = run.data.tokenizer_model or run.checkpoint.load
    return vocabulary(request, run.model, Path(tokenizer)) if tokenizer else ([], [])


def _notes(request: Request, run: RunConfig, architecture: Architecture) -> list[str]:
    """What this launcher decides where its arguments do not say it."""
    v, model, notes = request.values, run.model, _vocabulary(request, run)[1]
    if architecture.is_upcycled:
        notes.append(
            f"{request.where('MOE')} is true and {run.checkpoint.load} is dense: each of {model.num_moe_experts} "
            f"experts starts as a copy of its MLP, and a new router sends a token to {model.moe_router_topk} of them"
        )
    if model.num_moe_experts and "EP" not in v:
        notes.append(f"EP is {run.parallel.expert_model_parallel_size}: what data-parallel ranks and experts can share")
    longest = architecture.resolved.config.max_position_embeddings
    if "{PAD_LEN}" in request.flags and v["PAD_LEN"] != longest:
        notes.append(f"{request.where('PAD_LEN')} is {v['PAD_LEN']}: max_position_embeddings, {longest} otherwise")
    if v.get("TE"):
        notes.append(f"{request.where('TE')} is true: accepted, but layers are PyTorch's; PR fp8 uses torchao")
    if "EPOCH" in v and "GLOBAL_BATCH_SIZE" not in v:
        each = f"{run.checkpoint.save_interval} iterations of {run.global_batch_size} samples"
        notes.append(
            f"an epoch is {each} (BATCH_SIZE × data-parallel ranks, or --global-batch-size), then a checkpoint"
        )
    if "DATASET_PATH" in v and "VALID_DATASET_PATH" not in v and run.eval_iters:
        notes.append(f"validation takes its share of DATASET_PATH: --split {run.data.split}")
    return notes


def _without_effect(request: Request) -> list[str]:
    v, is_raw = request.values, request.values["MP_DATASET_TYPE"] == "raw"
    pad, length, is_longest = v["PAD_LEN"], v["SEQ_LEN"], "{PAD_LEN}" in request.flags
    rules = (
        (
            v["SP"] and v["TP"] == 1,
            f"{_behind('SP', request)} is true: no effect without tensor parallelism (TP is 1)",
        ),
        (
            v["MP_AC_LAYERS"] > 0 and v["AC"] not in ("full", "offload"),
            f"MP_AC_LAYERS has no effect: AC is {v['AC']}, neither full nor offload",
        ),
        (v["PP"] == 1 and v["MP_VP"] > 0, "MP_VP has no effect without pipeline parallelism (PP is 1)"),
        (v["PP"] == 1 and v["MP_PP0_LAYERS"] > 0, "MP_PP0_LAYERS has no effect without pipeline parallelism (PP is 1)"),
        (v["MP_SFT_PACKING"] and not v["SFT"], "MP_SFT_PACKING is true: no effect in pre-training (SFT is false)"),
        (
            not is_raw and not is_longest and pad != length,
            f"{_behind('PAD_LEN', request)} is {pad}: no effect without MP_DATASET_TYPE=raw",
        ),
        (
            is_raw and pad != length,
            f"{_behind('SEQ_LEN', request)} is {length}: raw records are PAD_LEN = {pad} tokens long",
        ),
    )
    return [sentence for applies, sentence in rules if applies]


def _behind(name: str, request: Request) -> str:
    """`SP (argument 14)`."""
    return f"{name} ({request.where(name).partition(' (')[0]})"


def _overridden_model(derived: RunConfig, run: RunConfig) -> list[str]:
    return [
        f"{name} is {getattr(run.model, name)} by option, {value} by MODEL_SIZE or config.json"
        for name, value in vars(derived.model).items()
        if getattr(run.model, name) != value
    ]
