"""Where weights come from and go to."""

import json
from dataclasses import dataclass

from megatron_patch.config.setting import setting

TRACKER = "latest_checkpointed_iteration.txt"  # names the last iteration that is whole
RANK_FILE = "model_optim_rng.pt"  # what one rank of Megatron's classic format writes
RUN = "run.json"  # what training records beside its weights


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Start weights, output directory, how often to write, and whether to go on with an earlier run."""

    load: str | None = setting("checkpoint directory to start from; absent: random initialisation", None)
    upcycle: bool = setting("the checkpoint to start from is dense: every expert begins as a copy of its MLP", False)
    save: str = setting("directory that receives iter_NNNNNNN and the tracker file")
    save_interval: int = setting("iterations between checkpoints; one is also written at the end")
    ckpt_format: str = setting(
        "dcp: torch.distributed.checkpoint files that a run can continue from; torch: Megatron's classic mp_rank_XX "
        "files, weights only",
        "dcp",
        choices=("dcp", "torch"),
    )
    async_save: bool = setting("write dcp checkpoints while training goes on", True)
    keep_last: int = setting("checkpoints to keep, older ones are deleted; 0: all", 0)
    resume: str = setting(
        "auto: continue this run's own last checkpoint, if there is one; never: start anew; DIR: continue the run that "
        "wrote DIR, on any layout or length",
        "auto",
    )
    resume_previous: bool = setting("where the last checkpoint is damaged, continue from the one before it", False)
    overwrite: bool = setting("replace checkpoints in the output directory that are not continued", False)


def why_unreadable(error: Exception) -> str:
    """What is wrong with a `run.json` whose reading raised `error`, to complete a sentence that names the file."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, KeyError):
        return f"it does not say {error.args[0]!r}"
    return "it does not hold what a run records"
