"""The evaluation task: which of four word orders finishes a held-out docstring's first sentence?"""

import argparse
import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from examples.quickstart.corpus import read_jsonl, write_jsonl
from examples.quickstart.docstrings import Documented, documented_functions

NAME = "docstring_order"
CHOICES, FEWEST_ITEMS = 4, 200

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def items(training: Iterable[dict[str, str]], held_out: Iterable[dict[str, str]]) -> list[dict]:
    """`{"context", "choices", "answer"}` per held-out function; the right answer takes each place equally often.

    A sentence that also stands anywhere in the training documents is left out, and so is one whose ending has fewer
    than four word orders. Raises ValueError when fewer than FEWEST_ITEMS remain.
    """
    known = "\n".join(" ".join(document["text"].split()) for document in training)
    chance = random.Random(1234)
    functions = [f for f in documented_functions(held_out) if f.summary not in known]
    made = [made for function in functions if (made := _item(function, chance))]
    made = made[: len(made) - len(made) % CHOICES]
    if len(made) < FEWEST_ITEMS:
        raise ValueError(f"the held-out files give {len(made)} items; a score needs at least {FEWEST_ITEMS}")
    return [_placed(item, place % CHOICES) for place, item in enumerate(made)]


def _item(function: Documented, chance: random.Random) -> tuple[str, list[str]] | None:
    opening, ending = function.halves()
    wrong = list(itertools.islice(_other_orders(ending.split(" "), chance), CHOICES - 1))
    if len(wrong) < CHOICES - 1:
        return None
    return f'{function.signature}\n    """{opening}', [ending, *wrong]


def _other_orders(words: list[str], chance: random.Random) -> Iterator[str]:
    """Distinct orders of `words` other than their own; tries often enough to find three of a short sentence."""
    seen = {tuple(words)}
    for _ in range(100):
        order = tuple(chance.sample(words, len(words)))
        if order not in seen:
            seen.add(order)
            yield " ".join(order)


def _placed(item: tuple[str, list[str]], place: int) -> dict:
    context, (right, *wrong) = item
    return {"context": context, "choices": [*wrong[:place], right, *wrong[place:]], "answer": place}


def main() -> None:
    """Write the items and the task description that `lm_eval --include_path` finds."""
    reader = argparse.ArgumentParser(prog="python3 -m examples.quickstart.task", description=__doc__)
    reader.add_argument("corpus", type=Path, help="directory with train.jsonl and valid.jsonl")
    reader.add_argument("directory", type=Path, help="receives the task")
    arguments = reader.parse_args()
    found = items(read_jsonl(arguments.corpus / "train.jsonl"), read_jsonl(arguments.corpus / "valid.jsonl"))
    arguments.directory.mkdir(parents=True, exist_ok=True)
    path = arguments.directory / "items.jsonl"
    write_jsonl(path, found)
    (arguments.directory / f"{NAME}.yaml").write_text(YAML.format(name=NAME, items=path.resolve()), encoding="utf-8")
    print(f"{NAME}: {len(found)} items, {CHOICES} choices each, chance level {1 / CHOICES}")


if __name__ == "__main__":
    main()
