"""The flags of ModelLink's generation script. What a table does not name goes to the generator as it stands."""

from megatron_patch.launch.launcher import Launcher
from megatron_patch.launch.positional import Arg, Switch, Table
from megatron_patch.launch.script_tables import CLUSTER, SAME_HERE
from megatron_patch.launch.values import COUNT, SWITCH, count, optional, switch, words

GENERATION: Table = (
    *CLUSTER,
    Arg("--tensor-model-parallel-size", count, f"{COUNT}: tensor-parallel ranks", default="1", means="TP"),
    Arg("--pipeline-model-parallel-size", count, f"{COUNT}: pipeline stages", default="1", means="PP"),
    Arg("--expert-model-parallel-size", count, f"{COUNT}: expert-parallel ranks", default="1", means="EP"),
    Arg("--load", words, "a checkpoint directory of any format and layout", means="CHECKPOINT"),
    *(
        Arg(name, optional(words), "the tokenizer's directory, or its tokenizer.model", default="", means=means)
        for name, means in (("--tokenizer-name-or-path", "TOKENIZER_PATH"), ("--tokenizer-model", "TOKENIZER_MODEL"))
    ),
    Switch("--bf16", switch, f"{SWITCH}: compute in bfloat16, else in float32", default="false", means="BF16"),
    *SAME_HERE,
)
FAMILIES = ("mistral", "mixtral", "llama", "qwen1_5", "qwen1_5_moe", "deepseek_v2")
GENERATORS = {"mistral-generate": Launcher("generation", GENERATION, families=FAMILIES, is_flags=True)}
