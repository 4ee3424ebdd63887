"""Merge the .bin/.idx pairs of a directory, in natural order, into one: --input DIR --output-prefix PREFIX.

MP_DRY_RUN=1 prints the plan and starts nothing.
"""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    os.execv(sys.executable, [sys.executable, "-m", "megatron_patch.launch", "merge-datasets", *sys.argv[1:]])
