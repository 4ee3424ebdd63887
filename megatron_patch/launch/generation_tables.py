"""The flags of ModelLink's generation script. What a table does not name goes to the generator as it stands."""

from megatron_patch.launch.launcher import Launcher
from megatron_patch.launch.positional import Arg, Switch, Table
from megatron_patch.launch.script_tables import CLUSTER, MODEL_PARALLEL, SAME_HERE, TOKENIZER
from megatron_patch.launch.values import COUNT, SWITCH, WHOLE, above_zero, count, optional, share, switch, whole, words

SETTINGS: Table = tuple(
    Arg(f"--{name}", optional(parse), allowed, default="", means=name.replace("-", "_").upper())
    for name, parse, allowed in (
        ("max-new-tokens", whole, f"{WHOLE}: longest answer; 0: by --max-length"),
        ("max-length", whole, f"{WHOLE}: longest prompt and answer together"),
        ("temperature", above_zero, "a number above 0, of sampling"),
        ("top-k", whole, f"{WHOLE}: sample among so many tokens; 0: all"),
        ("top-p", share, "a number above 0, at most 1: sample among the likeliest that hold this share"),
        ("num-return-sequences", count, f"{COUNT}: answers that are not greedy"),
        ("batch-size", count, f"{COUNT}: prompts that are answered together"),
        ("seed", whole, f"{WHOLE}, of sampling"),
    )
)
GENERATION: Table = (
    *CLUSTER,
    *MODEL_PARALLEL,
    Arg("--load", words, "a checkpoint directory of any format and layout", means="CHECKPOINT"),
    *TOKENIZER,
    Switch("--bf16", switch, f"{SWITCH}: compute in bfloat16, else in float32", default="false", means="BF16"),
    *SETTINGS,
    *SAME_HERE,
)
GENERATORS = {"mistral-generate": Launcher("generation", GENERATION, is_flags=True)}
