"""A training launcher's arguments as a run, and the run as a plan whose command starts it."""

import importlib.util
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.config.checkpoint import CheckpointConfig
from megatron_patch.config.checks import problems
from megatron_patch.config.data import DataConfig
from megatron_patch.config.flags import to_flags
from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.data.paths import split_words
from megatron_patch.families.resolve import Resolved
from megatron_patch.launch import cluster
from megatron_patch.launch.options import check_options, overridden, settings
from megatron_patch.launch.positional import Request, UsageError, place
from megatron_patch.launch.size import resolve_size
from megatron_patch.parallel.grid import resolve_grid, smallest_world
from megatron_patch.plan.describe import describe
from megatron_patch.plan.disk import look
from megatron_patch.plan.schedule import iterations

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


def plan(request: Request) -> dict[str, Any]:
    """The plan of one run. Raises UsageError (or ValueError, OSError) for everything that stands in its way at once."""
    _check_data_kind(request)
    check_options(request.options, settings())
    size, where = request.values["MODEL_SIZE"], place(request.table, "MODEL_SIZE")
    resolved, absent = resolve_size(request.families, size, start_weights(request), where)
    elsewhere = {
        "--load": place(request.table, "PRETRAIN_CHECKPOINT_PATH"),
        "--family": place(request.table, "MODEL_SIZE"),
    }
    run = overridden(run_config(request, resolved), request.options, elsewhere)
    ranks = _ranks(request, run)
    warnings = [*resolved.warnings, *_check(request, run, ranks.world, absent)]
    grid = resolve_grid(run.parallel, ranks.world)
    sections = describe(run, resolved.family, grid)
    sections["parallel"]["counted"] = ranks.counted
    return {
        "arguments": request.arguments(),
        **sections,
        "environment": _environment(request, ranks),
        "command": [
            *(sys.executable, "-m", "megatron_patch.train.agent"),
            *ranks.options,
            *("-m", "megatron_patch.train", *to_flags(run)),
        ],
        "warnings": [*warnings, *_without_effect(request), *_overridden_model(resolved, run)],
    }


def run_config(request: Request, resolved: Resolved) -> RunConfig:
    """What the positionals mean, before options. Optimizer constants are the defaults of `OptimizerConfig`."""
    v = request.values
    train, warmup, decay = iterations(
        v["TRAIN_TOKENS_OR_ITERS"],
        v["WARMUP_TOKENS_OR_ITERS"],
        v["GLOBAL_BATCH_SIZE"] * v["SEQ_LEN"],
        is_fine_tuning=v["SFT"],
    )
    base, name = Path(v["OUTPUT_BASEPATH"]), run_name(request, resolved.family.name, train, warmup)
    return RunConfig(
        model=resolved.config,
        parallel=ParallelConfig(
            tensor_model_parallel_size=v["TP"],
            pipeline_model_parallel_size=v["PP"],
            context_parallel_size=v["CP"],
            expert_model_parallel_size=v["EP"],
            num_layers_per_virtual_pipeline_stage=(v["MP_VP"] or None) if v["PP"] > 1 else None,
            decoder_first_pipeline_num_layers=(v["MP_PP0_LAYERS"] or None) if v["PP"] > 1 else None,
            sequence_parallel=v["SP"] and v["TP"] > 1,
            use_distributed_optimizer=v["DO"],
        ),
        data=_data(v),
        optimizer=OptimizerConfig(lr=v["LR"], min_lr=v["MIN_LR"], lr_warmup_iters=warmup, lr_decay_iters=decay),
        memory=_memory(v),
        checkpoint=CheckpointConfig(
            load=start_weights(request),
            save=str(base / "checkpoint" / name),
            save_interval=v["SAVE_INTERVAL"],
        ),
        family=resolved.family.name,
        train_iters=train,
        micro_batch_size=v["BATCH_SIZE"],
        global_batch_size=v["GLOBAL_BATCH_SIZE"],
        precision=v["PR"],
        use_flash_attn=v["FL"],
        tensorboard_dir=str(base / "tensorboard" / f"{name}_{time.strftime('%Y.%m.%d-%H.%M.%S')}"),
        log_file=str(base / "log" / f"{name}.jsonl"),
    )


def run_name(request: Request, family: str, train_iters: int, warmup_iters: int) -> str:
    """The run's name in every output path: its arguments as typed, so that two different runs do not meet."""
    text = {name: value.strip() for name, value in request.texts.items()} | {"AC": request.values["AC"]}
    kind = "finetune" if request.values["SFT"] else "pretrain"
    shape = "-".join(f"{axis.lower()}-{text[axis]}" for axis in ("PR", "TP", "PP", "CP", "EP", "AC", "DO", "SP"))
    return (
        f"{kind}-mcore-{family}-{text['MODEL_SIZE']}-lr-{text['LR']}-minlr-{text['MIN_LR']}-bs-{text['BATCH_SIZE']}"
        f"-gbs-{text['GLOBAL_BATCH_SIZE']}-seqlen-{text['SEQ_LEN']}-{shape}-ti-{train_iters}-wi-{warmup_iters}"
    )


def _data(v: Mapping[str, Any]) -> DataConfig:
    is_raw = v["MP_DATASET_TYPE"] == "raw"
    named = (("DATASET_PATH", "train"), ("VALID_DATASET_PATH", "valid"))
    train, valid = ((v[name],) if is_raw else split_words(v[name], split) for name, split in named)
    return DataConfig(
        train_data_path=train,
        valid_data_path=valid,
        dataset="JSON-SFT" if is_raw else "MMAP-SFT" if v["SFT"] else "MMAP",
        seq_length=v["SEQ_LEN"],
        max_padding_length=v["PAD_LEN"],
        sft_packing=v["MP_SFT_PACKING"] and v["SFT"],
    )


def _memory(v: Mapping[str, Any]) -> MemoryConfig:
    together = max(v["MP_AC_LAYERS"], 1)
    return MemoryConfig(
        recompute_granularity={"sel": "selective", "full": "full"}.get(v["AC"], "none"),
        recompute_num_layers=together if v["AC"] == "full" else 1,
        cpu_offloading_num_layers=together if v["AC"] == "offload" else 0,
        optimizer_offload_policy={"false": "none", "auto": "auto"}.get(v["OPTIMIZER_OFFLOAD"], "static"),
        optimizer_offload_fraction=v["OPTIMIZER_OFFLOAD"] if isinstance(v["OPTIMIZER_OFFLOAD"], float) else 1.0,
    )


def _ranks(request: Request, run: RunConfig) -> cluster.Cluster:
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
        where = place(request.table, "SFT")
        raise UsageError(f"{where} is false: MP_DATASET_TYPE=raw is for fine-tuning; use SFT true, or unset it")


def _check(request: Request, run: RunConfig, world: int, absent: list[str]) -> list[str]:
    """Raise UsageError with all that is broken. A dry run only warns of paths that are missing or occupied now."""
    now, wrong = look(run)
    obstacles = [*absent, *now, *_lacking_for_float8(request, run)]
    broken = [in_capitals(sentence, request) for sentence in problems(run, world)]
    broken += [*wrong, *([] if request.is_dry else obstacles)]
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
    where = place(request.table, "PR")
    return [f"{where} is fp8, which needs {' and '.join(lacking)}, not found here; use bf16"] if lacking else []


def in_capitals(sentence: str, request: Request) -> str:
    """Field names replaced by the arguments they came from: `TP (argument 10)`; environment variables by theirs."""
    numbers = {arg.name: f"argument {number}" for number, arg in enumerate(request.table, 1)}
    return re.sub(
        rf"\b({'|'.join(CAPITALS)})\b",
        lambda match: f"{CAPITALS[match[0]]} ({numbers.get(CAPITALS[match[0]], 'environment')})",
        sentence,
    )


def start_weights(request: Request) -> str | None:
    """The directory in PRETRAIN_CHECKPOINT_PATH; None for `none`: start from random weights."""
    path = request.values["PRETRAIN_CHECKPOINT_PATH"]
    return None if path.lower() == "none" else path


def _environment(request: Request, ranks: cluster.Cluster) -> dict[str, str]:
    """Variables set for the ranks: without accelerators, the cores are divided among them."""
    if "OMP_NUM_THREADS" in request.environ or cluster.accelerators(request.environ)[0]:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cluster.cores() // ranks.ranks_per_node))}


def _without_effect(request: Request) -> list[str]:
    v, is_raw = request.values, request.values["MP_DATASET_TYPE"] == "raw"
    pad, length = v["PAD_LEN"], v["SEQ_LEN"]
    rules = (
        (v["SP"] and v["TP"] == 1, "SP (argument 14) is true: no effect without tensor parallelism (TP is 1)"),
        (
            v["MP_AC_LAYERS"] > 0 and v["AC"] not in ("full", "offload"),
            f"MP_AC_LAYERS has no effect: AC is {v['AC']}, neither full nor offload",
        ),
        (v["PP"] == 1 and v["MP_VP"] > 0, "MP_VP has no effect without pipeline parallelism (PP is 1)"),
        (v["PP"] == 1 and v["MP_PP0_LAYERS"] > 0, "MP_PP0_LAYERS has no effect without pipeline parallelism (PP is 1)"),
        (v["MP_SFT_PACKING"] and not v["SFT"], "MP_SFT_PACKING is true: no effect in pre-training (SFT is false)"),
        (not is_raw and pad != length, f"PAD_LEN (argument 8) is {pad}: no effect without MP_DATASET_TYPE=raw"),
        (is_raw and pad != length, f"SEQ_LEN (argument 7) is {length}: raw records are PAD_LEN = {pad} tokens long"),
    )
    return [sentence for applies, sentence in rules if applies]


def _overridden_model(resolved: Resolved, run: RunConfig) -> list[str]:
    return [
        f"{name} is {getattr(run.model, name)} by option, {value} by MODEL_SIZE or config.json"
        for name, value in vars(resolved.config).items()
        if getattr(run.model, name) != value
    ]
