"""The flags of the training scripts that people edit: ModelLink's and Mixtral-Train's, with values in the script.

A flag that the trainer has too, with the same meaning, is in no table: it follows what the table makes of the others.
"""

from megatron_patch.launch.launcher import Launcher
from megatron_patch.launch.positional import IGNORED, Arg, Several, Switch, Table
from megatron_patch.launch.values import (
    COUNT,
    RATE,
    SWITCH,
    WHOLE,
    count,
    lines,
    nothing,
    one_of,
    optional,
    rate,
    switch,
    whole,
    words,
)

# Flags that the trainer spells otherwise.
RENAMED = {"--sliding-window": "--window-size"}


def ignored(*names: str) -> Table:
    """Flags whose work is always, never or differently done here, with a value or without."""
    return tuple(Switch(name, str, "anything: accepted and ignored", default="", means=IGNORED) for name in names)


CLUSTER: Table = (
    Arg("--nproc-per-node", count, f"{COUNT}: ranks of a node", default="1", means="GPUS_PER_NODE"),
    Arg("--nnodes", count, f"{COUNT}: nodes", default="1", means="NNODES"),
    Arg("--node-rank", whole, f"{WHOLE}: this node's number", default="0", means="NODE_RANK"),
    Arg("--master-addr", words, "the first node's name or address", default="localhost", means="MASTER_ADDR"),
    Arg("--master-port", count, f"{COUNT}: a port of the first node", default="6000", means="MASTER_PORT"),
)
MODEL_PARALLEL: Table = (
    Arg("--tensor-model-parallel-size", count, f"{COUNT}: tensor-parallel ranks", default="1", means="TP"),
    Arg("--pipeline-model-parallel-size", count, f"{COUNT}: pipeline stages", default="1", means="PP"),
    Arg("--expert-model-parallel-size", count, f"{COUNT}: expert-parallel ranks", default="1", means="EP"),
)
SIZES: Table = (
    *MODEL_PARALLEL,
    Arg("--context-parallel-size", count, f"{COUNT}: context-parallel ranks", default="1", means="CP"),
    Switch("--sequence-parallel", switch, SWITCH, default="false", means="SP"),
    Switch("--use-distributed-optimizer", switch, SWITCH, default="false", means="DO"),
    Switch("--use-flash-attn", switch, SWITCH, default="false", means="FL"),
)
SCHEDULE: Table = (
    Arg("--micro-batch-size", count, f"{COUNT}: samples per forward pass", default="1", means="BATCH_SIZE"),
    Arg("--global-batch-size", count, f"{COUNT}: samples per optimizer step", default="32", means="GLOBAL_BATCH_SIZE"),
    Arg("--seq-length", count, f"{COUNT}: tokens per sample", means="SEQ_LEN"),
    Arg("--train-iters", count, f"{COUNT}: iterations", means="TRAIN_ITERS"),
    Arg("--lr", rate, f"{RATE}: peak learning rate", means="LR"),
    Arg("--min-lr", rate, f"{RATE}: final learning rate", default="0", means="MIN_LR"),
    Arg("--lr-warmup-fraction", rate, f"{RATE}: warm-up's share of the iterations", default="0", means="WARMUP_SHARE"),
    Arg("--lr-warmup-iters", whole, f"{WHOLE}: iterations of warm-up", default="0", means="WARMUP_ITERS"),
    Arg("--save-interval", count, f"{COUNT}: iterations between checkpoints", default="1000", means="SAVE_INTERVAL"),
    Switch("--bf16", switch, SWITCH, default="false", means="BF16"),
    Switch("--fp16", switch, SWITCH, default="false", means="FP16"),
)
TOKENIZER: Table = tuple(
    Arg(name, optional(words), "the tokenizer's directory, or its tokenizer.model", default="", means=means)
    for name, means in (("--tokenizer-name-or-path", "TOKENIZER_PATH"), ("--tokenizer-model", "TOKENIZER_MODEL"))
)
PATHS: Table = (
    Several("--data-path", lines, "a .bin/.idx prefix, or weights and prefixes", means="DATASET_PATH"),
    Arg("--save", words, "the directory for checkpoints", means="CKPT_SAVE_DIR"),
    Arg("--load", words, "a checkpoint directory, or none", default="none", means="PRETRAIN_CHECKPOINT_PATH"),
    *TOKENIZER,
)
SAME_HERE: Table = (
    Switch("--finetune", switch, f"{SWITCH}: start from the first iteration, as --load always does", default="true"),
    Arg("--position-embedding-type", one_of("rope"), "rope", default="rope"),
    Arg("--normalization", one_of("RMSNorm"), "RMSNorm", default="RMSNorm"),
    *(
        Arg(name, nothing, "0: this package has no dropout", default="0")
        for name in ("--attention-dropout", "--hidden-dropout")
    ),
    *ignored("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--group-query-attention"),
    *ignored("--use-mcore-models", "--transformer-impl", "--tokenizer-type", "--tokenizer-not-use-fast"),
    *ignored("--make-vocab-size-divisible-by", "--distributed-backend", "--no-masked-softmax-fusion"),
    *ignored("--no-gradient-accumulation-fusion", "--attention-softmax-in-fp32", "--initial-loss-scale"),
    *ignored("--overlap-grad-reduce", "--overlap-param-gather", "--log-throughput", "--no-load-optim"),
    *ignored("--no-load-rng", "--no-save-optim", "--no-save-rng", "--moe-grouped-gemm", "--moe-type"),
    *ignored("--moe-token-dispatcher-type", "--no-shared-storage", "--no-position-embedding", "--no-bias-gelu-fusion"),
    *ignored("--use-fused-rmsnorm", "--use-fused-swiglu", "--use-fused-rotary-pos-emb", "--use-mc2"),
    *ignored("--pre-tockens", "--next-tockens", "--shape-order", "--use-deter-comp"),
    *ignored("--profile", "--profile-level", "--profile-with-cpu", "--profile-with-stack", "--profile-with-memory"),
    *ignored("--profile-record-shapes", "--profile-save-path", "--profile-step-start", "--profile-step-end"),
    *ignored("--profile-ranks"),
)
NOT_SAID = {
    "ENV": "dsw", "SFT": False, "AC": "none", "OPTIMIZER_OFFLOAD": "false", "MP_DATASET_TYPE": "idxmap",
    "MP_SFT_PACKING": False, "MP_VP": 0, "MP_AC_LAYERS": 0, "MP_PP0_LAYERS": 0,
}  # fmt: skip


def script(families: tuple[str, ...], size: str, *others: str) -> Launcher:
    """A script for models of `size`, unless --model-size names one of `others` or auto."""
    sizes = (size, *others, "auto")
    model = Arg(
        "--model-size", one_of(*sizes), f"{', '.join(sizes)} (from config.json)", default=size, means="MODEL_SIZE"
    )
    table = (*CLUSTER, model, *SIZES, *SCHEDULE, *PATHS, *SAME_HERE)
    return Launcher("scripts", table, families=families, implied=NOT_SAID, is_flags=True)


SCRIPTS = {
    "mistral-script": script(("mistral",), "7B-v0.2", "7B", "7B-v0.3"),
    "mixtral-script": script(("mixtral",), "4x7B", "8x7B", "8x22B"),
}
