"""Convert between Hugging Face and Mixtral-Train's checkpoints; `--help` lists the flags.

The program of `convert_ckpt.py`, but `--saver mixtral` writes the grouped expert weights that Mixtral-Train reads.
--overwrite replaces a checkpoint in --save-dir. MP_DRY_RUN=1 prints the plan.
"""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    os.execv(sys.executable, [sys.executable, "-m", "megatron_patch.launch", "checkpoint-util", *sys.argv[1:]])
