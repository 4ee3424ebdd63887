"""Every family on every layout through Megatron-Core, as the tables of docs/oracle_table.md (standard output).

    PYTHONPATH=. python3 tests/megatron_core/write_table.py > docs/oracle_table.md

Takes about ten minutes on two cores. The exit status is 1 if a layout fails.
"""

import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import oracle
import torch

from megatron_patch.checkpoint.interface import Target

LIMIT = 1e-5
HEAD = """# Megatron-Core reads our files

Each cell is one checkpoint that `python3 -m megatron_patch.convert … --format mcore --transformer-impl local` wrote and
that Megatron-Core {mcore} loaded rank by rank: every rank builds its own stage of the model and loads its own file
strictly, by name and shape, and hands its output to the next stage. The number is the largest difference between its
logits and those of transformers {transformers} (float32, tiny random models, weights large enough for all of them to
show). The limit is {limit:.0e}. Python {python}, torch {torch}.

Models have 4 layers. `pp 1+3` is a first stage of one layer, `pp 2×2` two virtual chunks a stage. `etp 1` leaves
experts uncut; otherwise they are cut as the rest is. DeepSeek-V2 chooses as many experts as groups here: Megatron-Core
scores a group by a sum where the model takes the maximum, and the two agree only then.

Written by `tests/megatron_core/write_table.py`.
"""


def main() -> int:
    torch.set_num_threads(1)
    failures = 0
    names = {name: version(package) for name, package in (("mcore", "megatron-core"), ("transformers", "transformers"))}
    print(HEAD.format(**names, limit=LIMIT, python=platform.python_version(), torch=torch.__version__))
    for family in oracle.FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            results = measure(family, Path(directory))
        failures += sum(isinstance(result, str) or result > LIMIT for result in results.values())
        print(f"## {family}\n", *rows(results), "", sep="\n", flush=True)
    print(f"{failures} failures" if failures else "Nothing failed.")
    return 1 if failures else 0


def measure(family: str, directory: Path) -> dict[Target, float | str]:
    """The largest difference of each layout, or the last line of what Megatron-Core raised."""
    layouts = list(oracle.layouts(family))
    with redirect_stdout(sys.stderr):
        wanted = oracle.write_source(family, directory / "source")
        for number, layout in enumerate(layouts):
            oracle.write_layout(directory / "source", directory / str(number), layout)
    cases = [(directory / str(number), directory / "source" / "tokens.pt") for number in range(len(layouts))]
    found = oracle.logits(cases, timeout=3600)
    return {layout: difference(one, wanted) for layout, one in zip(layouts, found, strict=True)}


def difference(found: torch.Tensor | str, wanted: torch.Tensor) -> float | str:
    if isinstance(found, str):
        return found.strip().splitlines()[-1]
    return float((found[..., : oracle.VOCABULARY] - wanted).abs().max())


def rows(results: dict[Target, float | str]) -> Iterator[str]:
    """A Markdown table: tensor-parallel sizes down, pipelines and expert-parallel sizes across."""
    columns = list(dict.fromkeys(column(layout) for layout in results))
    cells = {(row(layout), column(layout)): result for layout, result in results.items()}
    yield " | ".join(["| ", *columns]) + " |"
    yield "|" + "---|" * (len(columns) + 1)
    for name in dict.fromkeys(row(layout) for layout in results):
        yield " | ".join([f"| {name}", *(cell(cells[name, each]) for each in columns)]) + " |"


def row(layout: Target) -> str:
    return f"tp {layout.tp}" + (", etp 1" if layout.etp == 1 else "")


def column(layout: Target) -> str:
    pipeline = "1+3" if layout.first_stage_layers else f"{layout.pp}×2" if layout.vp > 1 else str(layout.pp)
    return f"pp {pipeline}" + (f", ep {layout.ep}" if layout.ep > 1 else "")


def cell(result: float | str) -> str:
    return f"**{result}**" if isinstance(result, str) or result > LIMIT else f"{result:.0e}"


if __name__ == "__main__":
    sys.exit(main())
