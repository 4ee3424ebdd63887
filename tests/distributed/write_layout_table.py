"""Writes docs/layout_table.md: what every layout of layouts.py differs by from one process, measured anew.

    python3 tests/distributed/write_layout_table.py [--only TEXT]

With `--only`, prints the lines whose model or layout holds TEXT and writes nothing.
"""

import argparse
import datetime
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from layout_step import LIMITS, Errors, errors_on  # noqa: E402
from layouts import LAYOUTS, trial  # noqa: E402

TABLE = ROOT / "docs" / "layout_table.md"
HEAD = """# Every layout beside one process

Each line trains one tiny model with the trainer's own step, on gloo ranks of one machine, and compares it with the
same model, weights and global batch in one process. Written by `tests/distributed/write_layout_table.py` on {date},
with torch {torch}; the layouts stand in `tests/distributed/layouts.py`.

* **layout**: the size of each axis that is more than 1; what is left of the ranks is data-parallel (**dp**). `sp` cuts
  the sequence over tensor-parallel ranks, `vp1` gives interleaved chunks one layer each, `first1` gives the first stage
  one layer, `layers5` is a model of five layers instead of four, `replicated` is DO=false, `packed` puts several
  documents in a sample.
* **loss**, **validation**, **norm**: relative difference of the training loss, the validation loss and the gradient
  norm, the largest of all ranks, float32. Limit {float32:.0e}.
* **gradient**: the largest difference of any gradient, relative to the largest value in the same tensor, and the
  tensor it is in, float32. Limit {float32:.0e}.
* **weights**: the largest difference of any parameter after three AdamW steps, float64. Limit {float64:.0e}.
* **replicas**: whether every rank that holds the same piece of a gradient or parameter holds the same bits, both
  pipeline ends of a tied embedding included, and each piece is held by exactly as many ranks as the layout says.

{passed} of {count} lines hold.

| model | ranks | layout | dp | loss | validation | norm | gradient | worst in | weights | replicas | |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Run the layouts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="print the lines that hold TEXT, write nothing")
    only = parser.parse_args().only
    lines = []
    for number, (name, world, layout) in enumerate(LAYOUTS, 1):
        if only in f"{name} {layout}":
            begin = time.monotonic()
            lines.append(measured(name, world, layout))
            print(f"{number}/{len(LAYOUTS)} {lines[-1]} {time.monotonic() - begin:.1f} s", flush=True)
    passed = sum(line.endswith("| ok |") for line in lines)
    print(f"{passed} of {len(lines)} hold")
    if not only:
        limits = {str(dtype).removeprefix("torch."): limit for dtype, limit in LIMITS.items()}
        head = HEAD.format(
            date=datetime.date.today(), torch=torch.__version__, passed=passed, count=len(lines), **limits
        )
        TABLE.write_text(head + "\n".join(lines) + "\n")
    sys.exit(passed < len(lines))


def measured(name: str, world: int, layout: str) -> str:
    """The table's line of one layout."""
    wanted = trial(name, world, layout)
    begin = f"| {name} | {world} | {layout} | {wanted.grid.dp} |"
    try:
        errors = errors_on(wanted)
        after = errors_on(trial(name, world, layout, steps=3, dtype=torch.float64))
    except Exception as error:  # a line that fails is a line of the table, whatever it fails with
        return f"{begin} | | | | | | | **{_last_line(error)}** |"
    verdict = "ok" if holds(errors, torch.float32) and holds(after, torch.float64) else "**differs**"
    found = (errors.loss, errors.validation, errors.norm, errors.gradient)
    return (
        f"{begin} {' | '.join(map(_short, found))} | `{errors.gradient_of}` | {_short(after.weight)} | identical | "
        f"{verdict} |"
    )


def holds(errors: Errors, dtype: torch.dtype) -> bool:
    """Whether all differences are within the limit of `dtype`; parameters are compared in float64 only."""
    compared = [errors.loss, errors.validation, errors.norm, errors.gradient]
    return max(compared + [errors.weight] * (dtype == torch.float64)) <= LIMITS[dtype]


def _short(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].replace("|", "/")[:200]


if __name__ == "__main__":
    main()
