"""Convert a Megatron checkpoint of a Mixtral to Hugging Face; `--help` lists the flags.

Where config path and checkpoint path are one directory, its weights are replaced only with --overwrite. MP_DRY_RUN=1
prints the plan.
"""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    os.execv(sys.executable, [sys.executable, "-m", "megatron_patch.launch", "mixtral-export", *sys.argv[1:]])
