"""What the walk ended with: artefacts, losses, speed, the loss curve, scores."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.quickstart.steps import Outcome
from examples.quickstart.task import CHOICES
from examples.quickstart.task import NAME as TASK
from megatron_patch.data.indexed import IndexedDataset

SMALLEST_GAIN = 1.5  # nats between the first and the last validation loss
TOKENS = "data-train/mmap_mistral_datasets_text_document"


@dataclass(frozen=True)
class Curve:
    """One run's `log/<NAME>.jsonl`: (iteration, nats per token), and its speed."""

    training: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    tokens_per_second: float  # median over iterations


def read_curve(output: Path) -> Curve:
    """The curve of the one run below OUTPUT_BASEPATH `output`."""
    (log,) = (output / "log").glob("*.jsonl")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    speeds = sorted(row["tokens per second"] for row in rows if "tokens per second" in row)
    return Curve(_points(rows, "lm loss"), _points(rows, "validation lm loss"), speeds[len(speeds) // 2])


def _points(rows: list[Mapping[str, float]], name: str) -> list[tuple[int, float]]:
    return [(int(row["iteration"]), row[name]) for row in rows if name in row]


def unigram_entropy(prefix: Path) -> float:
    """Nats per token of an indexed dataset's token frequencies: what a model that ignores context can reach."""
    dataset = IndexedDataset(prefix)
    counts = sum(np.bincount(dataset[i], minlength=1 << 16) for i in range(len(dataset)))
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def check_learned(out: Path) -> None:
    """Raise ValueError unless pre-training ended SMALLEST_GAIN below its start and below the unigram entropy."""
    losses = [loss for _, loss in read_curve(out / "pretrain").validation]
    check_gain(losses[0], losses[-1], unigram_entropy(out / TOKENS))


def check_gain(first: float, last: float, entropy: float) -> None:
    """Raise ValueError unless validation loss `last` is SMALLEST_GAIN below `first`, and below `entropy` (nats)."""
    if not last <= first - SMALLEST_GAIN:
        raise ValueError(
            f"pre-training moved the validation loss from {first:.3f} to {last:.3f} nats; it should fall by at least "
            f"{SMALLEST_GAIN}"
        )
    if not last < entropy:
        raise ValueError(
            f"the validation loss ended at {last:.3f} nats, not below the corpus's unigram entropy of {entropy:.3f}"
        )


def read_score(directory: Path) -> tuple[float, float]:
    """Accuracy and its standard error from what `lm_eval --output_path` wrote."""
    newest = max(directory.glob("*/results_*.json"))
    scores = json.loads(newest.read_text(encoding="utf-8"))["results"][TASK]
    return scores["acc,none"], scores["acc_stderr,none"]


def draw(curve: Curve, entropy: float, path: Path) -> None:
    """Training and validation loss against iterations, with the entropy as a line."""
    import matplotlib  # slow to import, and only the last step of the walk draws

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*curve.training, strict=True), label="training", linewidth=1, alpha=0.7)
    axes.plot(*zip(*curve.validation, strict=True), label="validation", marker="o")
    axes.axhline(entropy, label="unigram entropy of the corpus", linestyle="--", color="grey")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title="pre-training")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def summarise(out: Path, outcomes: list[Outcome]) -> str:
    """The closing text of the walk; draws the loss curve."""
    pretrain, finetune = read_curve(out / "pretrain"), read_curve(out / "finetune")
    entropy = unigram_entropy(out / TOKENS)
    picture = out / "loss_curve.png"
    draw(pretrain, entropy, picture)
    seconds = sum(outcome.seconds for outcome in outcomes)
    peak = max(outcome.peak_bytes for outcome in outcomes)
    return "\n".join(
        [
            "\nSummary",
            *_artefacts(out),
            *_losses("pre-training", pretrain),
            f"  unigram entropy of the corpus: {entropy:.3f} nats per token",
            *_losses("fine-tuning", finetune),
            f"  loss curve: {picture}",
            *_scores(out),
            f"  {seconds:.0f} seconds for all steps, {peak / 1e9:.2f} GB of memory at most",
        ]
    )


def _artefacts(out: Path) -> list[str]:
    places = {
        "corpus": "corpus",
        "tokenizer": "tokenizer",
        "tokens": "data-train",
        "start (hf)": "start-hf",
        "start (mcore)": "start-mcore-tp2",
        "pre-trained": "pretrain/checkpoint",
        "fine-tuned": "finetune/checkpoint",
        "final (hf)": "final-hf",
        "TensorBoard": "pretrain/tensorboard",
        "logs of the steps": "log",
    }
    return [f"  {name + ':':<20}{out / place}" for name, place in places.items()]


def _losses(name: str, curve: Curve) -> list[str]:
    (_, first), (last_iteration, last) = curve.training[0], curve.training[-1]
    first_valid, last_valid = curve.validation[0][1], curve.validation[-1][1]
    return [
        f"  {name}: loss {first:.3f} → {last:.3f}, validation loss {first_valid:.3f} → {last_valid:.3f} nats per token "
        f"in {last_iteration} iterations, {curve.tokens_per_second:.0f} tokens/s"
    ]


def _scores(out: Path) -> list[str]:
    lines = [
        f"  lm_eval, {TASK} (chance level {1 / CHOICES}):",
        "  | model |   acc  | stderr |",
        "  |-------|-------:|-------:|",
    ]
    for name in ("start", "final"):
        accuracy, error = read_score(out / f"score-{name}")
        lines.append(f"  | {name} | {accuracy:.4f} | {error:.4f} |")
    return lines
