"""The local tasks through lm-eval itself: tiny copies of each benchmark in each layout, and scores counted by hand."""

import csv
from pathlib import Path

import lm_eval
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parents[2] / "toolkits/evaluation/tasks"
SPLITS = {"mmlu_local": "test", "ceval-valid_local": "val", "cmmlu_local": "test"}
SIZES = {"mmlu_local": 57, "ceval-valid_local": 52, "cmmlu_local": 67}  # subjects, as the benchmarks' papers count them


class LikesB(LM):
    """Finds the answer B likeliest, always, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        return [
            (-1.0 if continuation.strip() == "B" else -2.0, False) for _, continuation in self.asked[-len(requests) :]
        ]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError("choices are scored by their letters")

    def generate_until(self, requests):
        raise NotImplementedError("choices are scored by their letters")


def subjects(task: str) -> list[str]:
    text = (TASKS / f"{task}.yaml").read_text().replace("!function ", "")
    return [member["dataset_kwargs"]["subject"] for member in yaml.safe_load(text)["task"]]


def questions(subject: str, split: str) -> list[dict]:
    """Six to develop with, all A; to score, some B by the length of the subject's name, and one C."""
    letters = "AAAAAA" if split == "dev" else "B" * (len(subject) % 3 + 1) + "C"
    return [
        {"question": f"{subject} {split} {number}?", **{x: f"{x}{number}" for x in "ABCD"}, "answer": letter}
        for number, letter in enumerate(letters)
    ]


def write_mmlu_csv(root: Path, subject: str, split: str, rows: list[dict]) -> None:
    path = root / "mmlu/data" / split / f"{subject}_{split}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([row[name] for name in ("question", *"ABCD", "answer")] for row in rows)


def write_mmlu_parquet(root: Path, subject: str, split: str, rows: list[dict]) -> None:
    path = root / "mmlu" / subject / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": row["question"], "choices": [row[x] for x in "ABCD"], "answer": "ABCD".index(row["answer"])}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_ceval_csv(root: Path, subject: str, split: str, rows: list[dict]) -> None:
    path = root / "ceval" / split / f"{subject}_{split}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "question", *"ABCD", "answer", "explanation"])
        writer.writeheader()
        writer.writerows({"id": number, "explanation": "", **row} for number, row in enumerate(rows))


def write_cmmlu_csv(root: Path, subject: str, split: str, rows: list[dict]) -> None:
    path = root / "cmmlu" / split / f"{subject}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["", "Question", *"ABCD", "Answer"])
        writer.writerows([n, *(row[name] for name in ("question", *"ABCD", "answer"))] for n, row in enumerate(rows))


LAYOUTS = [
    ("mmlu_local", write_mmlu_csv),
    ("mmlu_local", write_mmlu_parquet),
    ("ceval-valid_local", write_ceval_csv),
    ("cmmlu_local", write_cmmlu_csv),
]


def write(task: str, root: Path, write_split) -> None:
    for subject in subjects(task):
        for split in ("dev", SPLITS[task]):
            write_split(root, subject, split, questions(subject, split))


def evaluate(task: str, model: LM) -> dict:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=False)


@pytest.mark.parametrize(("task", "write_split"), LAYOUTS)
def test_every_subject_and_the_total_are_as_counted_by_hand(task, write_split, tmp_path, monkeypatch):
    monkeypatch.setenv("MP_EVAL_DATA", str(tmp_path))
    write(task, tmp_path, write_split)
    model = LikesB()
    results = evaluate(task, model)["results"]
    counts = {subject: len(subject) % 3 + 1 for subject in subjects(task)}
    assert len(counts) == SIZES[task]
    by_subject = {result["alias"].strip(" -"): result["acc,none"] for result in results.values()}
    for subject, right in counts.items():
        assert by_subject[subject] == pytest.approx(right / (right + 1))
    total = sum(counts.values()) / sum(right + 1 for right in counts.values())
    assert results[task]["acc,none"] == pytest.approx(total)


def test_five_examples_come_from_the_subjects_own_development_questions(tmp_path, monkeypatch):
    monkeypatch.setenv("MP_EVAL_DATA", str(tmp_path))
    write("mmlu_local", tmp_path, write_mmlu_csv)
    model = LikesB()
    evaluate("mmlu_local", model)
    context, continuation = next(args for args in model.asked if "anatomy test 0?" in args[0])
    shots = "".join(f"anatomy dev {n}?\nA. A{n}\nB. B{n}\nC. C{n}\nD. D{n}\nAnswer: A\n\n" for n in range(5))
    assert context == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        f"{shots}anatomy test 0?\nA. A0\nB. B0\nC. C0\nD. D0\nAnswer:"
    )
    assert continuation == " A"


def test_a_missing_subject_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MP_EVAL_DATA", str(tmp_path))
    write("cmmlu_local", tmp_path, write_cmmlu_csv)
    (tmp_path / "cmmlu/test/nutrition.csv").unlink()
    with pytest.raises(ValueError, match="no test questions of subject nutrition under MP_EVAL_DATA"):
        evaluate("cmmlu_local", LikesB())


def test_a_row_that_is_no_question_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MP_EVAL_DATA", str(tmp_path))
    write("cmmlu_local", tmp_path, write_cmmlu_csv)
    path = tmp_path / "cmmlu/test/agronomy.csv"
    path.write_text(path.read_text().replace(",C\n", ",E\n"))
    with pytest.raises(ValueError, match=r"agronomy\.csv: question \d is not a question"):
        evaluate("cmmlu_local", LikesB())


def test_without_a_directory_the_variable_is_named(monkeypatch):
    monkeypatch.delenv("MP_EVAL_DATA", raising=False)
    with pytest.raises(ValueError, match="MP_EVAL_DATA is not set"):
        evaluate("mmlu_local", LikesB())


def test_a_directory_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MP_EVAL_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere, which is no directory"):
        evaluate("mmlu_local", LikesB())
