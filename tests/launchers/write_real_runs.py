"""Writes docs/real_runs.md: every training script run for real, at a tiny size, through dash and bash.

    python3 tests/launchers/write_real_runs.py

From a directory that is not the checkout's, with a space in its path and in the checkout's. Needs both shells.
"""

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from commands import clean_environment  # noqa: E402
from test_training_runs import MIXTRAL_FLAGS, SCRIPT_FLAGS, VALUES  # noqa: E402
from tiny import SCRIPTS, tiny_command, write_material  # noqa: E402

from megatron_patch.data import preprocess_instructions  # noqa: E402
from megatron_patch.launch.tables import LAUNCHERS  # noqa: E402

TABLE = ROOT / "docs/real_runs.md"
HEAD = """# Every training script, for real

Each line is a script of `examples/` that trained a tiny model on one rank, started through the shell from a directory
with a space in its path, the checkout's path having one too. Written by `tests/launchers/write_real_runs.py` on {date}.

| script | shell | exit status | iterations | first loss | last loss |
|---|---|---|---|---|---|
"""
TUNING = {"CKPT_PATH": "mistral", "DATA_PATH": "alpaca"}
TUNING_FLAGS = [*MIXTRAL_FLAGS, "--seq-length", "64", "--sliding-window", "4"]
EDITED = {
    **{script: (flags, VALUES) for script, flags in SCRIPT_FLAGS.items()},
    "mixtral/mixtral_4x7b_example.sh": (MIXTRAL_FLAGS, VALUES),
    "mistral/tune_mistral_7b_ptd.sh": (TUNING_FLAGS, VALUES | TUNING),
}


def commands() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Script → its arguments and the variables it is edited by."""
    positional = {
        script: (tiny_command(LAUNCHERS[name].tables[-1], family), {}) for name, (script, family) in SCRIPTS.items()
    }
    return positional | EDITED


def write_instructions(material: Path) -> None:
    """ModelLink's three files, of the records that raw fine-tuning reads."""
    arguments = ["--input", str(material / "train.json"), "--output-prefix", str(material / "alpaca")]
    arguments += [
        "--tokenizer-model",
        str(material / "words"),
        "--handler",
        "GeneralInstructionHandler",
        "--append-eod",
    ]
    if preprocess_instructions.main(arguments):
        raise SystemExit("the instruction data could not be written")


def row(
    checkout: Path, material: Path, shell: str, script: str, arguments: list[str], variables: dict[str, str]
) -> str:
    """One line of the table; what a failed run said goes to standard error."""
    with tempfile.TemporaryDirectory(prefix="a place ") as folder:
        for file in material.iterdir():
            (Path(folder) / file.name).symlink_to(file)
        environment = clean_environment(OMP_NUM_THREADS="1", NPROC_PER_NODE="1", **variables)
        command = [shell, str(checkout / "examples" / script), *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
        logs = [line for path in Path(folder).glob("**/*.jsonl") for line in path.read_text().splitlines()]
    losses = [line["lm loss"] for line in map(json.loads, logs) if "lm loss" in line]
    first, last = (f"{losses[place]:.4f}" for place in (0, -1)) if losses else ("–", "–")
    return f"| `{script}` | {shell} | {done.returncode} | {len(losses)} | {first} | {last} |"


def main() -> int:
    """Exit status 1 if any run failed."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        checkout, material = Path(folder, "a checkout"), Path(folder, "material")
        checkout.symlink_to(ROOT, target_is_directory=True)
        material.mkdir()
        write_material(material, "mistral", "mixtral", "llama", "qwen1_5", "deepseek_v2")
        write_instructions(material)
        for script, (arguments, variables) in commands().items():
            for shell in ("dash", "bash"):
                lines.append(row(checkout, material, shell, script, arguments, variables))
                print(lines[-1], flush=True)
    TABLE.write_text(HEAD.format(date=datetime.date.today()) + "\n".join(lines) + "\n", encoding="utf-8")
    return 0 if all("| 0 |" in line for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
