"""The documented commands as data, and how tests run a launcher: in process, or through a shell."""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MISTRAL = ROOT / "examples/mistral/run_mcore_mistral.sh"
CONVERTER = ROOT / "toolkits/model_checkpoints_convertor/mistral/hf2mcore_convertor.sh"
PREPROCESSOR = ROOT / "toolkits/pretrain_data_preprocessing/run_make_pretraining_dataset_megatron.sh"
SFT_PREPROCESSOR = ROOT / "toolkits/sft_data_preprocessing/run_build_idxmap_sft_dataset.sh"

DATASET = "/mnt/mistral-datasets/wudao_mistralbpe_content_document"
CHECKPOINT = "/mnt/mistral-ckpts/Mistral-7B-v0.1-to-mcore-tp4-pp1"
PRETRAINING = [
    *("dsw", "7B", "1", "8", "1e-5", "1e-6", "128", "128", "bf16", "4", "1", "1", "1"),
    *("true", "true", "true", "false", "false", "false", "100000"),
    *(DATASET, DATASET, CHECKPOINT, "10000", "100", "/workspace/output_mcore_mistral_pretrain"),
]
RECORDS = "/mnt/mistral-datasets/alpaca_zh-mistral-{}.json"
RAW_FINE_TUNING = [
    *("dsw", "7B", "1", "8", "1e-5", "1e-6", "128", "128", "bf16", "1", "1", "1", "1"),
    *("true", "true", "true", "true", "false", "false", "100000"),
    *(RECORDS.format("train"), RECORDS.format("valid"), CHECKPOINT),
    *("10000", "100", "/workspace/output_mcore_mistral_finetune"),
]
HF_CHECKPOINT = "/mnt/mistral-ckpts/Mistral-7B-v0.1"
CONVERSION = ["7B", HF_CHECKPOINT, "../../../", HF_CHECKPOINT, CHECKPOINT, *("4", "1", "0", "0", "0", "0"), "false"]
PREPROCESSING = ["/mnt/corpus.jsonl", "MistralTokenizer", "text", "/mnt/mistral-datasets", HF_CHECKPOINT]
SFT_PREPROCESSING = ["/mnt/alpaca_zh.json", "MistralTokenizer", "128", "/mnt/datasets/alpaca", HF_CHECKPOINT, "true"]

NAMES = shlex.split(
    "ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP CP EP SP DO FL SFT AC "
    "OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_TOKENS_OR_ITERS "
    "WARMUP_TOKENS_OR_ITERS OUTPUT_BASEPATH"
)


class StartedError(Exception):
    """The launcher would have become this command."""


def changed(command: list[str], **values: str) -> list[str]:
    """A training command with some arguments, by name, replaced."""
    return [values.get(name, text) for name, text in zip(NAMES, command, strict=True)]


def clean_environment(**variables: str) -> dict[str, str]:
    """This environment without anything a launcher reads, and `variables`."""
    ours = ("MP_", "NPROC_", "OMP_", "MASTER_", "CUDA_VISIBLE", "WORLD_SIZE", "RANK", "KUBERNETES_CONTAINER")
    return {name: text for name, text in os.environ.items() if not name.startswith(ours)} | variables


def through_shell(shell: str, script: Path, arguments: list[str], cwd: Path, **variables: str) -> tuple[int, Any, str]:
    """(exit status, standard output as JSON or text, standard error) of `shell script arguments…`."""
    result = subprocess.run(
        [shell, str(script), *arguments], cwd=cwd, env=clean_environment(**variables), capture_output=True, text=True
    )
    is_json = result.stdout.startswith("{")
    return result.returncode, json.loads(result.stdout) if is_json else result.stdout, result.stderr
