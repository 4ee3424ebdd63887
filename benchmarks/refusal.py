"""How long a refused command takes, as a ratio to Python's own start-up: `python3 benchmarks/refusal.py`.

Each figure is the median of alternating runs, launcher and `python3 -c pass` in the same minute on the same machine.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples/mistral/run_mcore_mistral.sh"
COMMAND = [
    *("dsw", "7B", "1", "8", "1e-5", "1e-6", "128", "128", "bf16", "4", "1", "1", "1", "true", "true", "true", "false"),
    *("false", "false", "100000", "data", "data", "none", "10000", "100", "out", "--tokenizer-model", "tokenizer"),
]
CASES = {
    "wrong count": COMMAND[:10],
    "wrong value": [*COMMAND[:9], "four", *COMMAND[10:]],
    "wrong MODEL_SIZE": ["dsw", "9B", *COMMAND[2:]],
    "refused by the plan": [*COMMAND[:9], "3", *COMMAND[10:]],
}


def main() -> None:
    """Print one line per kind of refusal: milliseconds, and the ratio to `python3 -c pass`."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--runs", type=int, default=30)
    runs = reader.parse_args().runs
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    empty = [shutil.which("python3", path=environment["PATH"]), "-c", "pass"]
    print(f"median of {runs} runs; the peer is {' '.join(empty)}")
    for name, arguments in CASES.items():
        refused, peer = _medians([["sh", str(SCRIPT), *arguments], empty], [2, 0], environment, runs)
        print(f"{name:22} {refused * 1e3:6.1f} ms   {refused / peer:4.2f} × {peer * 1e3:.1f} ms")


def _medians(commands: list[list[str]], statuses: list[int], environment: dict[str, str], runs: int) -> list[float]:
    """Seconds of each command; they alternate, so that both see the same load."""
    seconds = [[] for _ in commands]
    for _ in range(runs + 1):
        for command, status, taken in zip(commands, statuses, seconds, strict=True):
            start = time.perf_counter()
            result = subprocess.run(command, env=environment, capture_output=True)
            taken.append(time.perf_counter() - start)
            if result.returncode != status:
                raise RuntimeError(f"{command} ended with {result.returncode}: {result.stderr.decode()}")
    return [statistics.median(taken[1:]) for taken in seconds]  # the first run fills the caches


if __name__ == "__main__":
    main()
