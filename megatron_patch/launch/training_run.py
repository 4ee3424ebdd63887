"""A training launcher's values as one `RunConfig`, whichever of the tables they come from."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.config.checkpoint import CheckpointConfig
from megatron_patch.config.data import DataConfig
from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.data.paths import split_words
from megatron_patch.launch.mixture import Architecture, start_weights
from megatron_patch.launch.positional import Request
from megatron_patch.plan.schedule import iterations

NAMED_SIZES = ("PR", "TP", "PP", "CP", "EP", "AC", "DO", "SP", "MOE")


def run_config(request: Request, architecture: Architecture) -> RunConfig:
    """What the arguments mean, before options. Optimizer constants are the defaults of `OptimizerConfig`.

    What follows from the number of ranks or of records is not here yet: EP and GLOBAL_BATCH_SIZE are 1 and BATCH_SIZE
    where no argument says them, and of an EPOCH's iterations there is one.
    """
    v, resolved = request.values, architecture.resolved
    batch = v.get("GLOBAL_BATCH_SIZE", v["BATCH_SIZE"])
    train, warmup, decay = _iterations(v, batch * v["SEQ_LEN"])
    output = _output(request, resolved.family.name, train, warmup)
    return RunConfig(
        model=resolved.config,
        parallel=_parallel(v),
        data=_data(v),
        optimizer=OptimizerConfig(lr=v["LR"], min_lr=v["MIN_LR"], lr_warmup_iters=warmup, lr_decay_iters=decay),
        memory=_memory(v),
        checkpoint=CheckpointConfig(
            load=start_weights(v),
            upcycle=architecture.is_upcycled,
            save=output["save"],
            save_interval=v.get("SAVE_INTERVAL", 1),
        ),
        family=resolved.family.name,
        train_iters=train,
        micro_batch_size=v["BATCH_SIZE"],
        global_batch_size=batch,
        precision=v["PR"],
        use_flash_attn=v["FL"],
        tensorboard_dir=output.get("tensorboard"),
        log_file=output.get("log"),
    )


def _output(request: Request, family: str, train_iters: int, warmup_iters: int) -> dict[str, str]:
    """Where the run writes: a script says where its checkpoints go, and only that."""
    v = request.values
    if "CKPT_SAVE_DIR" in v:
        return {"save": v["CKPT_SAVE_DIR"]}
    base, name = Path(v["OUTPUT_BASEPATH"]), run_name(request, family, train_iters, warmup_iters)
    return {
        "save": str(base / "checkpoint" / name),
        "tensorboard": str(base / "tensorboard" / f"{name}_{time.strftime('%Y.%m.%d-%H.%M.%S')}"),
        "log": str(base / "log" / f"{name}.jsonl"),
    }


def run_name(request: Request, family: str, train_iters: int, warmup_iters: int) -> str:
    """The run's name in every output path: its arguments as typed, so that two different runs do not meet."""
    text = {name: value.strip() for name, value in request.texts.items()} | {"AC": request.values["AC"]}
    parts = [
        "finetune" if request.values["SFT"] else "pretrain",
        request.title or f"mcore-{family.replace('_', '-')}",
        *(text["MODEL_SIZE"], f"lr-{text['LR']}", f"minlr-{text['MIN_LR']}", f"bs-{text['BATCH_SIZE']}"),
        *([f"gbs-{text['GLOBAL_BATCH_SIZE']}"] if "GLOBAL_BATCH_SIZE" in text else []),
        f"seqlen-{text['SEQ_LEN']}",
        *(f"{name.lower()}-{text[name]}" for name in NAMED_SIZES if name in text),
        f"epochs-{text['EPOCH']}" if "EPOCH" in text else f"ti-{train_iters}-wi-{warmup_iters}",
    ]
    return "-".join(parts)


def _iterations(v: Mapping[str, Any], tokens_per_iteration: int) -> tuple[int, int, int]:
    """(train, warm-up, decay) iterations of whatever the table counts in."""
    if "EPOCH" in v:
        return v["EPOCH"], 0, v["EPOCH"]
    if "WARMUP_SHARE" in v:
        return v["TRAIN_ITERS"], v["WARMUP_ITERS"], v["TRAIN_ITERS"]
    for unit in ("TOKENS", "ITERS"):
        if f"TRAIN_{unit}" in v:
            amounts = v[f"TRAIN_{unit}"], v[f"WARMUP_{unit}"]
            return iterations(*amounts, tokens_per_iteration, is_fine_tuning=unit == "ITERS")
    amounts = v["TRAIN_TOKENS_OR_ITERS"], v["WARMUP_TOKENS_OR_ITERS"]
    return iterations(*amounts, tokens_per_iteration, is_fine_tuning=v["SFT"])


def _parallel(v: Mapping[str, Any]) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=v["TP"],
        pipeline_model_parallel_size=v["PP"],
        context_parallel_size=v["CP"],
        expert_model_parallel_size=v.get("EP", 1),
        num_layers_per_virtual_pipeline_stage=(v["MP_VP"] or None) if v["PP"] > 1 else None,
        decoder_first_pipeline_num_layers=(v["MP_PP0_LAYERS"] or None) if v["PP"] > 1 else None,
        sequence_parallel=v["SP"] and v["TP"] > 1,
        use_distributed_optimizer=v["DO"],
    )


def _data(v: Mapping[str, Any]) -> DataConfig:
    is_raw = v["MP_DATASET_TYPE"] == "raw"
    train = v.get("DATASET_PATH") or v["TRAIN_DATASET_PATH"]
    named = ((train, "train"), (v.get("VALID_DATASET_PATH", train), "valid"))
    train, valid = ((text,) if is_raw else split_words(text, split) for text, split in named)
    return DataConfig(
        train_data_path=train,
        valid_data_path=valid,
        dataset="JSON-SFT" if is_raw else "MMAP-SFT" if v["SFT"] else "MMAP",
        seq_length=v["SEQ_LEN"],
        max_padding_length=v["PAD_LEN"],
        sft_packing=v["MP_SFT_PACKING"] and v["SFT"],
        tokenizer_model=v.get("TOKENIZER"),
    )


def _memory(v: Mapping[str, Any]) -> MemoryConfig:
    together, offload = max(v["MP_AC_LAYERS"], 1), v["OPTIMIZER_OFFLOAD"]
    return MemoryConfig(
        recompute_granularity={"sel": "selective", "full": "full"}.get(v["AC"], "none"),
        recompute_num_layers=together if v["AC"] == "full" else 1,
        cpu_offloading_num_layers=together if v["AC"] == "offload" else 0,
        optimizer_offload_policy={"false": "none", "auto": "auto"}.get(offload, "static"),
        optimizer_offload_fraction=offload if isinstance(offload, float) else 1.0,
    )
