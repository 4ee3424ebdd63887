"""Fine-tuning records: complete the first sentence of a function's docstring, given its signature and the opening."""

import argparse
import json
from pathlib import Path

from examples.quickstart.corpus import read_jsonl
from examples.quickstart.docstrings import Documented, documented_functions

INSTRUCTION = "Complete the first sentence of this function's docstring."


def record(function: Documented) -> dict[str, str]:
    """One raw-JSON record with `instruction`, `input` and `output`."""
    opening, ending = function.halves()
    return {"instruction": INSTRUCTION, "input": f"{function.signature}\n{opening}", "output": ending}


def main() -> None:
    """Write train.json from the training documents and valid.json from the held-out ones."""
    reader = argparse.ArgumentParser(prog="python3 -m examples.quickstart.instructions", description=__doc__)
    reader.add_argument("corpus", type=Path, help="directory with train.jsonl and valid.jsonl")
    reader.add_argument("directory", type=Path, help="receives train.json and valid.json")
    arguments = reader.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid"):
        functions = documented_functions(read_jsonl(arguments.corpus / f"{name}.jsonl"))
        records = [record(function) for function in functions]
        (arguments.directory / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        print(f"{name}: {len(records)} records")


if __name__ == "__main__":
    main()
