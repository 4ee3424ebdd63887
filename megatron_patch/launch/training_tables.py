"""The tables of the training launchers: what each document calls its arguments, in its order, and what none says.

A value that a launcher has no argument for is `implied`, under the name that other launchers have for it.
"""

from megatron_patch.launch.conversion_tables import LLAMA_SIZES, QWEN_SIZES
from megatron_patch.launch.launcher import PP0_LAYERS, Launcher, size
from megatron_patch.launch.positional import Arg, Table
from megatron_patch.launch.values import (
    COUNT,
    RATE,
    SWITCH,
    WHOLE,
    count,
    offloading,
    one_of,
    rate,
    recomputation,
    switch,
    whole,
    words,
)

ENV = Arg("ENV", one_of("dsw", "dlc"), "dsw (this machine) or dlc (several nodes)")
PATCH = Arg("MEGATRON_PATCH_PATH", str, "anything: accepted and ignored")
BATCH = Arg("BATCH_SIZE", count, f"{COUNT}: samples per forward pass and data-parallel rank")
GLOBAL_BATCH = Arg("GLOBAL_BATCH_SIZE", count, f"{COUNT}: samples per optimizer step")
RATES: Table = (
    Arg("LR", rate, f"{RATE}: peak learning rate"),
    Arg("MIN_LR", rate, f"{RATE}: final learning rate"),
)
SEQ_LEN = Arg("SEQ_LEN", count, f"{COUNT}: tokens per sample")
PAD_LEN = Arg("PAD_LEN", count, f"{COUNT}: tokens per raw fine-tuning record, padding included")
LONGEST = Arg("PAD_LEN", count, f"{COUNT}: the most tokens a sample of the model may have")
EXTRA = Arg("EXTRA_VOCAB_SIZE", whole, f"{WHOLE}: the config's vocab_size less the tokenizer's; 0: not used")
PRECISION = Arg("PR", one_of("fp32", "bf16", "fp16", "fp8"), "fp32, bf16, fp16 or fp8")
TP = Arg("TP", count, f"{COUNT}: tensor-parallel ranks")
PP = Arg("PP", count, f"{COUNT}: pipeline stages")
CP = Arg("CP", count, f"{COUNT}: context-parallel ranks")
EP = Arg("EP", count, f"{COUNT}: expert-parallel ranks")
AC = Arg("AC", recomputation, "sel, full, offload, none or false (= none)")
SP = Arg("SP", switch, f"{SWITCH}: sequence parallelism")
DO = Arg("DO", switch, f"{SWITCH}: shard master weights and optimizer state over data-parallel ranks")
FL = Arg("FL", switch, f"{SWITCH}: the fastest attention kernel available")
TE = Arg("TE", switch, f"{SWITCH}: accepted; layers are PyTorch's either way")
MOE = Arg("MOE", switch, f"{SWITCH}: a mixture of experts, made of the dense model's MLP unless it is one already")
SAVE = Arg("SAVE_INTERVAL", count, f"{COUNT}: iterations between checkpoints")
DATASET = Arg("DATASET_PATH", words, "a .bin/.idx prefix, 'weight prefix weight prefix …', or a JSON file (raw)")
PREFIX = Arg("DATASET_PATH", words, "a .bin/.idx prefix, or 'weight prefix weight prefix …'")
RECORDS = Arg("TRAIN_DATASET_PATH", words, "a JSON file of records")
VALIDATION = Arg("VALID_DATASET_PATH", words, "the same for validation")
START = Arg("PRETRAIN_CHECKPOINT_PATH", words, "a checkpoint directory, or none")
TOKENS: Table = (
    Arg("TRAIN_TOKENS", count, f"{COUNT}: tokens"),
    Arg("WARMUP_TOKENS", whole, f"{WHOLE}: tokens"),
)
ITERATIONS: Table = (
    Arg("TRAIN_ITERS", count, f"{COUNT}: iterations"),
    Arg("WARMUP_ITERS", whole, f"{WHOLE}: iterations"),
)
EITHER: Table = (
    Arg("TRAIN_TOKENS_OR_ITERS", count, f"{COUNT}: tokens, or iterations when SFT=true"),
    Arg("WARMUP_TOKENS_OR_ITERS", whole, f"{WHOLE}: tokens, or iterations when SFT=true"),
)
EPOCH = Arg("EPOCH", count, f"{COUNT}: passes over the training records")
OUTPUT = Arg("OUTPUT_BASEPATH", words, "the directory for checkpoints and logs")


def training(model: Arg) -> Table:
    """The 26 arguments of a launcher that pre-trains and fine-tunes."""
    return (
        *(ENV, model, BATCH, GLOBAL_BATCH, *RATES, SEQ_LEN, PAD_LEN, PRECISION, TP, PP, CP, EP, SP, DO, FL),
        Arg("SFT", switch, f"{SWITCH}: fine-tune on instructions, counted in iterations"),
        AC,
        Arg("OPTIMIZER_OFFLOAD", offloading, "false, static, auto, or the share of the layers to move, such as 0.5"),
        *(SAVE, DATASET, VALIDATION, START, *EITHER, OUTPUT),
    )


def patched(model: Arg, *rest: Arg, pad: Arg = PAD_LEN, batches: Table = (BATCH, GLOBAL_BATCH)) -> Table:
    """Arguments that begin as those of every launcher with a MEGATRON_PATCH_PATH do; `rest` follows TE."""
    return (
        *(ENV, PATCH, model, *batches, *RATES, SEQ_LEN, pad, EXTRA, PRECISION, TP, PP),
        *(AC, DO, FL, SP, TE, *rest),
    )


def megatron_pretraining(model: Arg) -> Table:
    """24 arguments."""
    return patched(model, SAVE, PREFIX, START, *TOKENS, OUTPUT)


def megatron_finetuning(model: Arg) -> Table:
    """22 arguments: the global batch is one micro-batch on every data-parallel rank, and a checkpoint ends an epoch."""
    return patched(model, RECORDS, VALIDATION, START, EPOCH, OUTPUT, batches=(BATCH,))


def accumulating_finetuning(model: Arg) -> Table:
    """25 arguments."""
    return patched(model, SAVE, RECORDS, VALIDATION, START, *ITERATIONS, OUTPUT)


def mixture_pretraining(model: Arg) -> Table:
    """25 arguments."""
    return patched(model, MOE, SAVE, PREFIX, START, *TOKENS, OUTPUT, pad=LONGEST)


def mixture_finetuning(model: Arg, *experts: Arg) -> Table:
    """26 arguments, or 27 with EP among the `experts`."""
    return patched(model, MOE, *experts, SAVE, RECORDS, VALIDATION, START, *ITERATIONS, OUTPUT)


STAGES: Table = (
    Arg("MP_VP", whole, f"{WHOLE}: layers per virtual pipeline stage; 0: none", default="0"),
    Arg("MP_AC_LAYERS", whole, f"{WHOLE}: layers recomputed or offloaded together", default="0"),
    PP0_LAYERS,
)


def data_variables(kind: str) -> Table:
    """The environment of a training launcher; `kind` is the dataset type of those who set none."""
    return (
        Arg("MP_DATASET_TYPE", one_of("idxmap", "raw"), "idxmap or raw", default=kind),
        Arg("MP_SFT_PACKING", switch, SWITCH, default="false"),
        *STAGES,
    )


LLAMA = ("llama",)
QWEN = ("qwen1_5", "qwen1_5_moe")
LLAMA_SIZE = size(*LLAMA_SIZES)
QWEN_SIZE, QWEN_OR_MOE_SIZE = (size(*QWEN_SIZES, *others, formerly={"13B": "14B"}) for others in ((), ("A2.7B",)))

PRETRAINING = {"CP": 1, "SFT": False, "OPTIMIZER_OFFLOAD": "false"}
FINETUNING = {"CP": 1, "SFT": True, "OPTIMIZER_OFFLOAD": "false"}
ONE_EP = {"EP": 1}  # without it EP is the largest that the data-parallel ranks and the experts have in common
TOP_1, TOP_2 = ({"NUM_EXPERTS": 8, "EXPERTS_TOPK": topk} for topk in (1, 2))

MEGATRON_FLAGS = ("--lr-decay-style", "linear", "--init-method-std", "0.006", "--split", "98,2,0")
LONGEST_FLAGS = ("--max-position-embeddings", "{PAD_LEN}")


def pretraining(table: Table, families: tuple[str, ...], title: str, implied: dict, flags: tuple[str, ...]) -> Launcher:
    """A launcher that only pre-trains."""
    return Launcher(
        *("training", table),
        variables=data_variables("idxmap"),
        families=families,
        title=title,
        implied=PRETRAINING | implied,
        flags=flags,
    )


def finetuning(tables: tuple[Table, ...], families: tuple[str, ...], title: str, implied: dict) -> Launcher:
    """A launcher that only fine-tunes, on raw records unless MP_DATASET_TYPE says otherwise."""
    return Launcher(
        *("training", *tables),
        variables=data_variables("raw"),
        families=families,
        title=title,
        implied=FINETUNING | implied,
    )


TRAINING = training(size("7B", "7B-v0.2", "7B-v0.3", "8x7B"))
TRAINERS = {
    "mistral": Launcher("training", TRAINING, variables=data_variables("idxmap"), families=("mistral", "mixtral")),
    "deepseek": Launcher(
        "training", training(size("A2.4B", "A21B")), variables=data_variables("idxmap"), families=("deepseek_v2",)
    ),
    "llama-pretrain": pretraining(megatron_pretraining(LLAMA_SIZE), LLAMA, "megatron-llama", ONE_EP, MEGATRON_FLAGS),
    "llama-finetune": finetuning((megatron_finetuning(LLAMA_SIZE),), LLAMA, "megatron-llama", ONE_EP),
    "llama-mcore-pretrain": pretraining(
        mixture_pretraining(LLAMA_SIZE), LLAMA, "mcore-llama", ONE_EP | TOP_2, LONGEST_FLAGS
    ),
    "llama-mcore-finetune": finetuning(
        (mixture_finetuning(LLAMA_SIZE), mixture_finetuning(LLAMA_SIZE, EP)), LLAMA, "mcore-llama", ONE_EP | TOP_2
    ),
    "qwen-pretrain": pretraining(megatron_pretraining(QWEN_SIZE), QWEN, "megatron-qwen1.5", ONE_EP, MEGATRON_FLAGS),
    "qwen-finetune": finetuning((megatron_finetuning(QWEN_SIZE),), QWEN, "megatron-qwen1.5", ONE_EP),
    "qwen-finetune-ga": finetuning((accumulating_finetuning(QWEN_SIZE),), QWEN, "megatron-qwen1.5", ONE_EP),
    "qwen-mcore-pretrain": pretraining(
        mixture_pretraining(QWEN_OR_MOE_SIZE), QWEN, "mcore-qwen1.5", ONE_EP | TOP_2, LONGEST_FLAGS
    ),
    "qwen-mcore-finetune": finetuning(
        (mixture_finetuning(QWEN_OR_MOE_SIZE), mixture_finetuning(QWEN_OR_MOE_SIZE, EP)),
        *(QWEN, "mcore-qwen1.5", ONE_EP | TOP_2),
    ),
    "qwen-megablocks-pretrain": pretraining(
        mixture_pretraining(QWEN_OR_MOE_SIZE), QWEN, "megablocks-qwen1.5", TOP_1, LONGEST_FLAGS
    ),
    "qwen-megablocks-finetune": finetuning((mixture_finetuning(QWEN_OR_MOE_SIZE),), QWEN, "megablocks-qwen1.5", TOP_1),
}
