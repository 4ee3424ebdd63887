"""The tables of the converters: what each document calls its arguments, in its order."""

from megatron_patch.launch.launcher import PP0_LAYERS, Launcher, size
from megatron_patch.launch.positional import Arg, Switch, Table
from megatron_patch.launch.values import (
    COUNT,
    SWITCH,
    WHOLE,
    count,
    named,
    one_of,
    optional,
    switch,
    whole,
    words,
)

QWEN_SIZES = ("0.5B", "1.8B", "4B", "7B", "14B", "32B", "72B")
LLAMA_SIZES = (
    *("7B", "13B", "70B", "llama1-7B", "llama1-13B", "30B", "65B"),
    *("llama3-8B", "llama3-70B", "llama3.1-8B", "llama3.1-70B"),
)
LLAMA_NAMES = {
    "llama-7b": "llama1-7B",
    "llama-13b": "llama1-13B",
    "llama-30b": "30B",
    "llama-65b": "65B",
    "llama2-7b": "7B",
    "llama2-13b": "13B",
    "llama2-70b": "70B",
    # LLaMA's architecture in sizes of their own.
    **dict.fromkeys(("codellama*", "yi*", "deepseek-llm*", "vicuna*", "auto"), "auto"),
}
MISTRAL_NAMES = {"mistral-7b": "7B", "auto": "auto"}
QWEN_NAMES = {f"qwen1.5-{name.lower()}": name for name in QWEN_SIZES} | {"auto": "auto"}

HUGGING_FACE = Arg("HG_CKPT_PATH", words, "the Hugging Face directory with config and tokenizer files")
MAYBE_HUGGING_FACE = Arg("HG_CKPT_PATH", optional(words), f"{HUGGING_FACE.allowed}; default: the source's", default="")
MEGATRON = Arg("MEGATRON_PATH", str, "anything: accepted and ignored")
SOURCE = Arg("SOURCE_CKPT_PATH", words, "the directory to read")
TARGET = Arg("TARGET_CKPT_PATH", words, "the directory to write")
TP = Arg("TP", count, f"{COUNT}: tensor-parallel ranks")
PP = Arg("PP", count, f"{COUNT}: pipeline stages")
EP = Arg("EP", whole, f"{WHOLE}: expert-parallel ranks; 0: not used")
EXTRA = Arg("EXTRA_VOCAB_SIZE", whole, f"{WHOLE}: the config's vocab_size less the tokenizer's; 0: not used")
EXPERTS = Arg("NUM_EXPERTS", whole, f"{WHOLE}: experts; of a dense model, how many copies it becomes; 0: not used")
TOPK = Arg("EXPERTS_TOPK", whole, f"{WHOLE}: experts each token is sent to; 0: not used")
BACK = Arg("mg2hf", switch, f"{SWITCH}: convert back to Hugging Face")
PRECISION = Arg("PR", one_of("fp32", "fp16", "bf16"), "fp32, fp16 or bf16: type of what is written")

MISTRAL: Table = (
    size("7B", "7B-v0.2", "7B-v0.3", "8x7B", "8x22B", "4x7B"),
    *(HUGGING_FACE, MEGATRON, SOURCE, TARGET, TP, PP, EXTRA, EXPERTS, TOPK, EP, BACK),
    Arg("WS", whole, f"{WHOLE}: world size of a model with experts, TP × PP × EP; 0: not used", default="0"),
)
LLAMA: Table = (
    size(*LLAMA_SIZES),
    *(HUGGING_FACE, MEGATRON, SOURCE, TARGET, TP, PP, EXTRA, EXPERTS, TOPK, EP),
    Arg("NUM_EXPERT_SPLITS", whole, f"{WHOLE}: parts the dense MLP is split into for experts; 0: not used"),
    BACK,
)
DEEPSEEK_SIZE = size("A2.4B", "A21B")
DEEPSEEK: Table = (
    *(DEEPSEEK_SIZE, SOURCE, TARGET, TP, PP, EP, PRECISION),
    Arg("USE_TE", switch, f"{SWITCH}: parameter names of Transformer Engine, or Megatron-Core's own"),
    *(BACK, MAYBE_HUGGING_FACE),
)
DEEPSEEK_LATER: Table = (DEEPSEEK_SIZE, SOURCE, TARGET, TP, PP, EP, PRECISION, BACK, HUGGING_FACE)
MEGABLOCKS: Table = (
    size(*QWEN_SIZES),
    *(HUGGING_FACE, MEGATRON, SOURCE, TARGET, TP, PP, EXTRA, EXPERTS, TOPK, EP, BACK),
)
MEGABLOCKS_SHORT: Table = (HUGGING_FACE, MEGATRON, SOURCE, TARGET, TP, PP, EXTRA, EXPERTS, EP, BACK)
QWEN_DENSE: Table = (size(*QWEN_SIZES), SOURCE, TARGET, TP, PP, BACK, MAYBE_HUGGING_FACE)
QWEN_MOE: Table = (size("A2.7B"), SOURCE, TARGET, TP, PP, EP, BACK, MAYBE_HUGGING_FACE)
QWEN_UPCYCLED: Table = (
    *(size(*QWEN_SIZES), SOURCE, TARGET, TP, PP, EP),
    Arg("NUM_EXPERTS", count, f"{COUNT}: experts"),
    Arg("NUM_SPLITS", count, f"{COUNT}: parts that the dense MLP is split into"),
    Arg("MOE_FFN", count, f"{COUNT}: width of one expert, at least that of one part"),
)


def megatron_lm(names: dict[str, str]) -> Table:
    """The eight arguments of hf2megatron converters, whose MN is one of `names`."""
    return (
        *(MEGATRON, SOURCE, TARGET, TP, PP),
        Arg("MN", named(names), ", ".join(names).replace("*", "…")),
        *(EXTRA, BACK),
    )


TYPES = optional(one_of("fp32", "fp16", "bf16"))
NOT_SAID = f"{WHOLE}; 0: not said"
CKPT: Table = (
    Arg("--model-type", one_of("GPT"), "GPT"),
    Arg(
        "--loader",
        one_of("llama2_hf", "mistral_hf", "mixtral_hf", "megatron", "mixtral_mg"),
        "llama2_hf, mistral_hf, mixtral_hf, megatron or mixtral_mg",
        default="megatron",
    ),
    Arg("--saver", one_of("megatron", "mixtral"), "megatron or mixtral", default="megatron"),
    Arg("--load-dir", words, SOURCE.allowed),
    Arg("--save-dir", words, "the directory to write; to Hugging Face, the original model's, in which mg2hg appears"),
    Arg(
        "--save-model-type",
        one_of("megatron", "save_huggingface_llama", "save_huggingface_qwen", "huggingface", "hf"),
        "megatron, save_huggingface_llama, save_huggingface_qwen, huggingface or hf",
        default="megatron",
    ),
    Arg("--target-tensor-parallel-size", whole, f"{NOT_SAID}: as the source; of a Mixtral, 1", default="0"),
    Arg("--target-pipeline-parallel-size", whole, f"{NOT_SAID}: as the source; of a Mixtral, 1", default="0"),
    Arg("--target-expert-parallel-size", whole, f"{NOT_SAID}: as the source; of a Mixtral, 1", default="0"),
    Arg("--params-dtype", TYPES, "fp32, fp16 or bf16; default: as stored", default=""),
    Arg("--true-vocab-size", whole, f"{NOT_SAID}: the vocab_size of config.json", default="0"),
    Switch("--add-qkv-bias", switch, SWITCH, default="false"),
    Switch("--add-dense-bias", switch, SWITCH, default="false"),
    Arg("--w-pack", switch, SWITCH, default="false"),
    Arg(
        "--tokenizer-model", optional(words), "a tokenizer file: checked, for the directory's files travel", default=""
    ),
    *(
        Arg(name, optional(words), "anything: accepted and ignored", default="")
        for name in ("--make-vocab-size-divisible-by", "--max-queue-size", "--megatron-path", "--vocab-file")
    ),
    Switch("--no-checking", switch, f"{SWITCH}: accepted and ignored", default="false"),
)
MIXTRAL_EXPORT: Table = (
    Arg("--megatron-checkpoint-path", words, SOURCE.allowed),
    Arg("--huggingface-config-path", words, HUGGING_FACE.allowed),
    Arg("--huggingface-checkpoint-path", words, TARGET.allowed),
    Arg("--tensor-parallel-size", whole, f"{NOT_SAID}; must be the checkpoint's", default="0"),
    Arg("--pipeline-parallel-size", whole, f"{NOT_SAID}; must be the checkpoint's", default="0"),
    Arg("--expert-parallel-size", whole, f"{NOT_SAID}; must be the checkpoint's", default="0"),
)

STAGES: Table = (PP0_LAYERS,)
CONVERTERS = {
    "mistral-convert": Launcher(
        "conversion", MISTRAL, variables=STAGES, families=("mistral", "mixtral"), format="mcore"
    ),
    "mistral-megatron": Launcher("conversion", megatron_lm(MISTRAL_NAMES), families=("mistral",), format="megatron"),
    "deepseek-convert": Launcher(
        "conversion", DEEPSEEK, DEEPSEEK_LATER, variables=STAGES, families=("deepseek_v2",), format="mcore"
    ),
    "qwen-megablocks": Launcher("conversion", MEGABLOCKS, MEGABLOCKS_SHORT, families=("qwen1_5",), format="megablocks"),
    "qwen-dense": Launcher("conversion", QWEN_DENSE, variables=STAGES, families=("qwen1_5",), format="mcore"),
    "qwen-dense-to-moe": Launcher("conversion", QWEN_UPCYCLED, variables=STAGES, families=("qwen1_5",), format="mcore"),
    "qwen-moe": Launcher("conversion", QWEN_MOE, variables=STAGES, families=("qwen1_5_moe",), format="mcore"),
    "qwen-megatron": Launcher("conversion", megatron_lm(QWEN_NAMES), families=("qwen1_5",), format="megatron"),
    "llama-convert": Launcher("conversion", LLAMA, variables=STAGES, families=("llama",), format="mcore"),
    "llama-megatron": Launcher("conversion", megatron_lm(LLAMA_NAMES), families=("llama",), format="megatron"),
    "convert-ckpt": Launcher("modellink", CKPT, format="modellink", is_flags=True),
    "checkpoint-util": Launcher("modellink", CKPT, format="mixtral_train", is_flags=True),
    "mixtral-export": Launcher("mixtral_export", MIXTRAL_EXPORT, families=("mixtral",), format="hf", is_flags=True),
}
