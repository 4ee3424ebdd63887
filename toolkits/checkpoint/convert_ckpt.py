"""Convert between Hugging Face and ModelLink's Megatron checkpoints; `--help` lists the flags.

`--save-model-type save_huggingface_llama` (or `huggingface`) writes to `mg2hg` inside --save-dir, which holds the
original model's config and tokenizer. --overwrite replaces a checkpoint there. MP_DRY_RUN=1 prints the plan.
"""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    os.execv(sys.executable, [sys.executable, "-m", "megatron_patch.launch", "convert-ckpt", *sys.argv[1:]])
