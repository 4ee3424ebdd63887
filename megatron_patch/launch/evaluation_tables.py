"""The flags of ModelLink's evaluation script."""

from megatron_patch.launch.launcher import Launcher
from megatron_patch.launch.positional import Arg, Switch, Table
from megatron_patch.launch.script_tables import CLUSTER, MODEL_PARALLEL, SAME_HERE, TOKENIZER, ignored
from megatron_patch.launch.values import COUNT, SWITCH, WHOLE, count, one_of, optional, switch, whole, words

TASKS = {"mmlu": "mmlu_local", "ceval": "ceval-valid_local", "cmmlu": "cmmlu_local"}

EVALUATION: Table = (
    *CLUSTER,
    *MODEL_PARALLEL,
    Arg("--task", one_of(*TASKS), ", ".join(TASKS), default="mmlu", means="TASK"),
    Arg("--task-data-path", words, "the directory of the task's test files, beside dev", means="DATA_PATH"),
    Arg("--load", words, "a checkpoint directory", means="CHECKPOINT"),
    *TOKENIZER,
    Arg("--evaluation-batch-size", count, f"{COUNT}: texts scored together", default="1", means="BATCH_SIZE"),
    Arg("--num-fewshot", whole, f"{WHOLE}: examples before each question", default="5", means="NUM_FEWSHOT"),
    Arg("--limit", optional(whole), f"{WHOLE}: questions of each subject", default="", means="LIMIT"),
    Arg("--output-path", optional(words), "a directory for the results as JSON", default="", means="OUTPUT_PATH"),
    Switch("--apply-chat-template", switch, SWITCH, default="false", means="CHAT_TEMPLATE"),
    Switch("--bf16", switch, SWITCH, default="false", means="BF16"),
    *SAME_HERE,
    *ignored("--seq-length", "--max-new-tokens", "--micro-batch-size", "--use-flash-attn", "--seed"),
    *ignored("--exit-on-missing-checkpoint"),
)

EVALUATORS = {"evaluation-script": Launcher("evaluation", EVALUATION, is_flags=True)}
