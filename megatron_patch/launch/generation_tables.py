"""The flags of ModelLink's generation script. What a table does not name goes to the generator as it stands."""

from megatron_patch.launch.launcher import Launcher
from megatron_patch.launch.positional import Arg, Switch, Table
from megatron_patch.launch.script_tables import CLUSTER, MODEL_PARALLEL, SAME_HERE, TOKENIZER
from megatron_patch.launch.values import SWITCH, switch, words

GENERATION: Table = (
    *CLUSTER,
    *MODEL_PARALLEL,
    Arg("--load", words, "a checkpoint directory of any format and layout", means="CHECKPOINT"),
    *TOKENIZER,
    Switch("--bf16", switch, f"{SWITCH}: compute in bfloat16, else in float32", default="false", means="BF16"),
    *SAME_HERE,
)
GENERATORS = {"mistral-generate": Launcher("generation", GENERATION, is_flags=True)}
