"""Questions with four choices from local copies of MMLU, C-Eval and CMMLU, for the task files beside this one.

`MP_EVAL_DATA` names the directory that holds the benchmark, or one above it. Both layouts that these are published in
are read: CSV files `<split>/<subject>[_<split>].csv`, with a header or, as MMLU's, without; and parquet files
`<subject>/<split>-*.parquet`, as on the Hugging Face hub.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

NUMBERS = {"A": 0, "B": 1, "C": 2, "D": 3}
DIRECTORIES = {  # where archives and the hub put a benchmark, below the directory that holds it
    "mmlu": ("", "data", "mmlu", "mmlu/data"),
    "ceval": ("", "ceval", "ceval-exam", "ceval/ceval-exam"),
    "cmmlu": ("", "cmmlu", "cmmlu_v1_0_1", "cmmlu/cmmlu_v1_0_1"),
}


def mmlu(subject: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The development and test questions of one subject."""
    return _splits("mmlu", subject, ("dev", "test"))


def ceval(subject: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The development and validation questions of one subject; the answers of its test are not public."""
    return _splits("ceval", subject, ("dev", "val"))


def cmmlu(subject: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The development and test questions of one subject."""
    return _splits("cmmlu", subject, ("dev", "test"))


def _splits(benchmark: str, subject: str, splits: tuple[str, ...]) -> dict[str, datasets.Dataset]:
    """Rows of `question`, four `choices` and the number of the `answer`. Raises ValueError naming what is not there."""
    return {
        split: datasets.Dataset.from_list(
            [row for path in _files(benchmark, subject, split) for row in _questions(path)]
        )
        for split in splits
    }


def _files(benchmark: str, subject: str, split: str) -> list[Path]:
    root = os.environ.get("MP_EVAL_DATA")
    if not root:
        raise ValueError(f"MP_EVAL_DATA is not set: it names the directory that holds {benchmark}'s files")
    if not Path(root).is_dir():
        raise ValueError(f"MP_EVAL_DATA is {root}, which is no directory: it holds {benchmark}'s files")
    for directory in DIRECTORIES[benchmark]:
        for pattern in (f"{split}/{subject}_{split}.csv", f"{split}/{subject}.csv", f"{subject}/{split}-*.parquet"):
            if found := sorted(Path(root, directory).glob(pattern)):
                return found
    raise ValueError(
        f"{benchmark} has no {split} questions of subject {subject} under MP_EVAL_DATA={root}: "
        f"expected {split}/{subject}_{split}.csv, {split}/{subject}.csv or {subject}/{split}-*.parquet"
    )


def _questions(path: Path) -> Iterator[dict[str, Any]]:
    rows = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    for number, row in enumerate(rows, 1):
        choices = list(row["choices"]) if "choices" in row else [row.get(letter.lower()) for letter in NUMBERS]
        answer = row.get("answer")
        answer = answer if isinstance(answer, int) else NUMBERS.get(str(answer).strip(), -1)
        if not row.get("question") or len(choices) != 4 or None in choices or answer not in range(4):
            raise ValueError(f"{path}: question {number} is not a question, four choices and one of A, B, C, D")
        yield {"question": row["question"].strip(), "choices": [str(choice) for choice in choices], "answer": answer}


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    names = [name.strip().lower() for name in rows[0]] if rows else []
    if {"question", "answer"} <= set(names):
        rows = rows[1:]
    else:
        names = ["question", "a", "b", "c", "d", "answer"]
    return (dict(zip(names, row, strict=False)) for row in rows)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    return ({name.lower(): value for name, value in row.items()} for row in pq.read_table(path).to_pylist())
