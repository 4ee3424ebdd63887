"""The tables of training and preprocessing, the environment variables, and every launcher by name."""

from megatron_patch.launch.conversion_tables import CONVERTERS
from megatron_patch.launch.dataset_tables import DATASET_TOOLS
from megatron_patch.launch.launcher import PP0_LAYERS, Launcher, size
from megatron_patch.launch.positional import Arg, Table
from megatron_patch.launch.values import (
    COUNT,
    SWITCH,
    WHOLE,
    count,
    keys,
    number,
    offloading,
    on_or_off,
    one_of,
    recomputation,
    switch,
    whole,
    words,
)

TRAINING: Table = (
    Arg("ENV", one_of("dsw", "dlc"), "dsw (this machine) or dlc (several nodes)"),
    size("7B", "7B-v0.2", "7B-v0.3", "8x7B"),
    Arg("BATCH_SIZE", count, f"{COUNT}: samples per forward pass and data-parallel rank"),
    Arg("GLOBAL_BATCH_SIZE", count, f"{COUNT}: samples per optimizer step"),
    Arg("LR", number, "a number ≥ 0: peak learning rate"),
    Arg("MIN_LR", number, "a number ≥ 0: final learning rate"),
    Arg("SEQ_LEN", count, f"{COUNT}: tokens per sample"),
    Arg("PAD_LEN", count, f"{COUNT}: tokens per raw fine-tuning record, padding included"),
    Arg("PR", one_of("fp32", "bf16", "fp16", "fp8"), "fp32, bf16, fp16 or fp8"),
    Arg("TP", count, f"{COUNT}: tensor-parallel ranks"),
    Arg("PP", count, f"{COUNT}: pipeline stages"),
    Arg("CP", count, f"{COUNT}: context-parallel ranks"),
    Arg("EP", count, f"{COUNT}: expert-parallel ranks"),
    Arg("SP", switch, f"{SWITCH}: sequence parallelism"),
    Arg("DO", switch, f"{SWITCH}: shard master weights and optimizer state over data-parallel ranks"),
    Arg("FL", switch, f"{SWITCH}: the fastest attention kernel available"),
    Arg("SFT", switch, f"{SWITCH}: fine-tune on instructions, counted in iterations"),
    Arg("AC", recomputation, "sel, full, offload, none or false (= none)"),
    Arg("OPTIMIZER_OFFLOAD", offloading, "false, static, auto, or the share of the layers to move, such as 0.5"),
    Arg("SAVE_INTERVAL", count, f"{COUNT}: iterations between checkpoints"),
    Arg("DATASET_PATH", words, "a .bin/.idx prefix, 'weight prefix weight prefix …', or a JSON file (raw)"),
    Arg("VALID_DATASET_PATH", words, "the same for validation"),
    Arg("PRETRAIN_CHECKPOINT_PATH", words, "a checkpoint directory, or none"),
    Arg("TRAIN_TOKENS_OR_ITERS", count, f"{COUNT}: tokens, or iterations when SFT=true"),
    Arg("WARMUP_TOKENS_OR_ITERS", whole, f"{WHOLE}: tokens, or iterations when SFT=true"),
    Arg("OUTPUT_BASEPATH", words, "the directory for checkpoints and logs"),
)

# Tokenizer names that documents pass, and the output prefix each has always had.
PREFIXES = {
    "auto": "mmap_datasets",
    "MistralTokenizer": "mmap_mistral_datasets",
    "MixtralTokenizer": "mmap_mixtral_datasets",
    "LLamaTokenizer": "mmap_llama_datasets",
    "LLama2Tokenizer": "mmap_llama2_datasets",
    "LLama3Tokenizer": "mmap_llama3_datasets",
    "Qwen2Tokenizer": "mmap_qwen2_datasets",
    "Qwen3Tokenizer": "mmap_qwen3_datasets",
    "DeepSeekV2Tokenizer": "mmap_deepseekv2_datasets",
    "GPT2BPETokenizer": "mmap_{dataset}_datasets",
}

PREPROCESSING: Table = (
    Arg("INPUT_DATA_PATH", words, "a file, a directory or a pattern of .jsonl, .json, .txt, .csv, .parquet …"),
    Arg("TOKENIZER", one_of(*PREFIXES), ", ".join(PREFIXES)),
    Arg("JSON_KEYS", keys, "the keys to tokenize, separated by spaces or commas"),
    Arg("OUTPUT_DATA_DIR", words, "the directory to write"),
    Arg("LOAD_DIR", words, "the tokenizer's directory"),
    Arg("DATASET_NAME", str, "the name in the output prefix, for GPT2BPETokenizer only", default=""),
)

SFT_PREPROCESSING: Table = (
    Arg("INPUT_DATA_PATH", words, "a JSON or JSON-lines file of records"),
    Arg("TOKENIZER", one_of(*PREFIXES), ", ".join(PREFIXES)),
    Arg("SEQ_LEN", count, f"{COUNT}: tokens per sample"),
    Arg("OUTPUT_PREFIX", words, "what the dataset's name begins with; _text_document follows"),
    Arg("LOAD_DIR", words, "the tokenizer's directory"),
    Arg("PACKING", switch, f"{SWITCH}: several records per sample", default="false"),
)

DRY_RUN = Arg("MP_DRY_RUN", on_or_off, "1 (print the plan, start nothing) or 0", default="0")

VARIABLES: Table = (
    Arg("MP_DATASET_TYPE", one_of("idxmap", "raw"), "idxmap or raw", default="idxmap"),
    Arg("MP_SFT_PACKING", switch, SWITCH, default="false"),
    Arg("MP_VP", whole, f"{WHOLE}: layers per virtual pipeline stage; 0: none", default="0"),
    Arg("MP_AC_LAYERS", whole, f"{WHOLE}: layers recomputed or offloaded together", default="0"),
    PP0_LAYERS,
)


LAUNCHERS = {
    "mistral": Launcher("training", TRAINING, variables=VARIABLES, families=("mistral", "mixtral")),
    "pretraining-dataset": Launcher("preprocessing", PREPROCESSING),
    "sft-dataset": Launcher("sft_preprocessing", SFT_PREPROCESSING),
    **CONVERTERS,
    **DATASET_TOOLS,
}
