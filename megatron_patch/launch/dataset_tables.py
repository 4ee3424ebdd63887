"""The flags of the dataset tools: ModelLink's and Mixtral-Train's `preprocess_data.py`, and `merge_datasets.py`."""

from megatron_patch.launch.launcher import Launcher
from megatron_patch.launch.positional import Arg, Several, Switch, Table
from megatron_patch.launch.values import (
    COUNT,
    SWITCH,
    WHOLE,
    count,
    keys,
    lines,
    one_of,
    optional,
    switch,
    whole,
    words,
)

PRETRAIN_HANDLER = "GeneralPretrainHandler"
HANDLERS = (
    PRETRAIN_HANDLER,
    *("AlpacaPretrainHandler", "StackOverflowPythonPretrainHandler", "GeneralInstructionHandler"),
    *("BelleMultiTurnInstructionHandler", "MOSSMultiTurnHandler", "MOSSInstructionHandler"),
    *("LeetcodePythonInstructionHandler", "AlpacaStyleInstructionHandler", "SharegptStyleInstructionHandler"),
)


def ignored(*names: str) -> Table:
    """Flags of other programs that change nothing here."""
    return tuple(Arg(name, optional(words), "anything: accepted and ignored", default="") for name in names)


def switches(*names: str) -> Table:
    """Flags that stand alone."""
    return tuple(Switch(name, switch, SWITCH, default="false") for name in names)


PREPROCESS_DATA: Table = (
    Several(
        "--input",
        optional(lines),
        "files, directories or patterns of .jsonl, .json, .txt, .csv, .parquet, .arrow",
        default="",
    ),
    Arg(
        "--output-prefix",
        words,
        "what the datasets' names begin with; _<key>_document or _packed_<field>_document follows",
    ),
    Several("--json-keys", keys, "the keys to tokenize", default="text"),
    Several("--json_keys", optional(keys), "the same, as Mixtral-Train spells it", default=""),
    Arg(
        "--tokenizer-type",
        one_of("PretrainedFromHF", "PretrainedTokenizerFromHF", "HuggingFaceTokenizer"),
        "PretrainedFromHF, PretrainedTokenizerFromHF or HuggingFaceTokenizer",
        default="PretrainedFromHF",
    ),
    Arg("--tokenizer-name-or-path", optional(words), "the tokenizer's directory", default=""),
    Arg("--tokenizer-model", optional(words), "the tokenizer's directory, or its tokenizer.model", default=""),
    *switches("--append-eod", "--tokenizer-not-use-fast", "--skip-bad-lines", "--recursive", "--trust-remote-code"),
    Arg("--seq-length", whole, f"{WHOLE}: records with as many tokens or more are left out; 0: none is", default="0"),
    Arg("--workers", count, f"{COUNT}: tokenising threads", default="1"),
    Arg("--handler-name", one_of(*HANDLERS), ", ".join(HANDLERS), default=PRETRAIN_HANDLER),
    *switches("--pack", "--split-sentences", "--keep-newlines"),
    Arg("--prompt-type", optional(words), "the template of instructions", default=""),
    Arg("--map-keys", optional(words), "a JSON object of columns with other names", default=""),
    Arg("--hf-datasets-params", optional(words), "a JSON file that names local files for datasets", default=""),
    Arg("--log-interval", whole, f"{WHOLE}: records between two lines of progress; 0: no lines", default="1000"),
    Arg("--dataset-impl", one_of("mmap", "cached", "lazy"), "mmap, cached or lazy: all are the same", default="mmap"),
    *ignored("--cache-dir", "--datasets", "--lang", "--partitions"),
    *ignored("--make-vocab-size-divisible-by", "--pad-vocab-size-to"),
    *switches("--streaming", "--keep-sequential-samples"),
)
MERGE_DATASETS: Table = (
    Arg("--input", words, "a directory of .bin/.idx pairs"),
    Arg("--output-prefix", words, "the merged dataset without its suffix"),
)

DATASET_TOOLS = {
    "preprocess-data": Launcher("preprocess_data", PREPROCESS_DATA, is_flags=True),
    "merge-datasets": Launcher("merge_datasets", MERGE_DATASETS, is_flags=True),
}
