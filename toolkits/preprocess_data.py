"""Turn text into .bin/.idx datasets with ModelLink's or Mixtral-Train's flags; `--help` lists them.

Reads files, directories (in natural order) and patterns. MP_DRY_RUN=1 prints the plan and starts nothing.
"""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    os.execv(sys.executable, [sys.executable, "-m", "megatron_patch.launch", "preprocess-data", *sys.argv[1:]])
