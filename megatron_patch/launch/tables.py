"""The tables of preprocessing, and every launcher by name."""

from megatron_patch.launch.conversion_tables import CONVERTERS
from megatron_patch.launch.dataset_tables import DATASET_TOOLS
from megatron_patch.launch.evaluation_tables import EVALUATORS
from megatron_patch.launch.generation_tables import GENERATORS
from megatron_patch.launch.launcher import Launcher
from megatron_patch.launch.positional import Arg, Table
from megatron_patch.launch.script_tables import SCRIPTS
from megatron_patch.launch.training_tables import TRAINERS
from megatron_patch.launch.values import COUNT, SWITCH, count, keys, on_or_off, one_of, switch, words

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

LAUNCHERS = {
    **TRAINERS,
    **SCRIPTS,
    **EVALUATORS,
    **GENERATORS,
    "pretraining-dataset": Launcher("preprocessing", PREPROCESSING),
    "sft-dataset": Launcher("sft_preprocessing", SFT_PREPROCESSING),
    **CONVERTERS,
    **DATASET_TOOLS,
}
