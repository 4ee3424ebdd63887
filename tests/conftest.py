"""What every test shares: no hub, and the interpreter's own commands first on PATH."""

import os
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
