"""The walk: from nothing to a scored checkpoint, one operator's command after the other."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from examples.quickstart.steps import Step, StepError, run_all
from examples.quickstart.summary import check_learned, summarise
from examples.quickstart.task import NAME as TASK

CONVERT = "toolkits/model_checkpoints_convertor/mistral/hf2mcore_convertor.sh"
PREPROCESS = "toolkits/pretrain_data_preprocessing/run_make_pretraining_dataset_megatron.sh"
TRAIN = "examples/mistral/run_mcore_mistral.sh"

TP = 2
MICRO_BATCH, GLOBAL_BATCH, SEQ_LEN, PAD_LEN = 16, 16, 256, 128
PRETRAIN_ITERS, PRETRAIN_WARMUP = 150, 10
FINETUNE_ITERS, FINETUNE_WARMUP = 40, 4
TOKENS_PER_ITER = GLOBAL_BATCH * SEQ_LEN

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",  # a CPU walk, also where there are GPUs
}
TRAINING_LINES = r"^ (iteration|validation loss) "


def steps(out: Path) -> Iterator[Step]:
    """Every step, in order, with all results below `out`. A training step is over before the next one is made."""
    corpus, tokenizer, instructions, task = (out / n for n in ("corpus", "tokenizer", "instructions", "task"))
    start, mcore, final = out / "start-hf", out / "start-mcore-tp2", out / "final-hf"
    pretrain, finetune = out / "pretrain", out / "finetune"
    data = {split: out / f"data-{split}" for split in ("train", "valid")}

    yield Step("corpus", _own("corpus", corpus), corpus, shows="documents")
    yield Step("tokenizer", _own("tokenizer", corpus / "train.jsonl", tokenizer), tokenizer)
    yield Step("start checkpoint", _own("start_model", tokenizer, start), start)
    yield Step("convert to mcore", _conversion(start, start, mcore, mg2hf=False), mcore)
    for split, directory in data.items():
        words = (corpus / f"{split}.jsonl", "MistralTokenizer", "text", directory, tokenizer)
        yield Step(f"{split} tokens", ["sh", PREPROCESS, *map(str, words)], directory)
    prefixes = [directory / "mmap_mistral_datasets_text_document" for directory in data.values()]
    yield Step("pre-train", _pretraining(prefixes, mcore, pretrain), pretrain, TRAINING_LINES)

    yield Step("instructions", _own("instructions", corpus, instructions), instructions, shows="records")
    records = [instructions / f"{split}.json" for split in ("train", "valid")]
    command = _finetuning(records, checkpoint_of(pretrain), finetune)
    yield Step("fine-tune", command, finetune, TRAINING_LINES, {"MP_DATASET_TYPE": "raw"})
    yield Step("convert back to hf", _conversion(start, checkpoint_of(finetune), final, mg2hf=True), final)

    text = out / "generated.txt"
    yield Step("generate", _own("generate", final, text), text, shows="^(?!Loading weights)")
    yield Step("task", _own("task", corpus, task), task, shows="items")
    for name, checkpoint in (("start", start), ("final", final)):
        scores = out / f"score-{name}"
        yield Step(f"score {name}", _scoring(checkpoint, task, scores), scores, shows=r"^\|")


def checkpoint_of(output: Path) -> Path:
    """The one checkpoint directory that a training run left below its OUTPUT_BASEPATH."""
    (directory,) = (output / "checkpoint").iterdir()
    return directory


def _own(module: str, *arguments: Path) -> list[str]:
    return ["python3", "-m", f"examples.quickstart.{module}", *map(str, arguments)]


def _conversion(hf: Path, source: Path, target: Path, *, mg2hf: bool) -> list[str]:
    """MODEL_SIZE HG_CKPT_PATH MEGATRON_PATH SOURCE TARGET TP PP EXTRA_VOCAB_SIZE NUM_EXPERTS EXPERTS_TOPK EP mg2hf."""
    words = ("auto", hf, ".", source, target, TP, 1, 0, 0, 0, 0, str(mg2hf).lower())
    return ["sh", CONVERT, *map(str, words)]


def _pretraining(data: list[Path], checkpoint: Path, output: Path) -> list[str]:
    tokens = (PRETRAIN_ITERS * TOKENS_PER_ITER, PRETRAIN_WARMUP * TOKENS_PER_ITER)
    return _training(("3e-3", "3e-4"), False, data, checkpoint, tokens, output)


def _finetuning(data: list[Path], checkpoint: Path, output: Path) -> list[str]:
    return _training(("5e-4", "5e-5"), True, data, checkpoint, (FINETUNE_ITERS, FINETUNE_WARMUP), output)


def _training(
    rates: tuple[str, str], sft: bool, data: list[Path], checkpoint: Path, length: tuple[int, int], output: Path
) -> list[str]:
    """The launcher's 26 positional arguments, and how often to validate."""
    parallel = (TP, 1, 1, 1, "true", "true")  # TP PP CP EP SP DO
    switches = ("true", str(sft).lower(), "false", "false")  # FL SFT AC OPTIMIZER_OFFLOAD
    words = ("dsw", "auto", MICRO_BATCH, GLOBAL_BATCH, *rates, SEQ_LEN, PAD_LEN, "fp32", *parallel, *switches)
    words += (1000, *data, checkpoint, *length, output)  # SAVE_INTERVAL comes first
    validation = ("--eval-interval", 25, "--eval-iters", 4)
    return ["sh", TRAIN, *map(str, words), *map(str, validation)]


def _scoring(checkpoint: Path, task: Path, scores: Path) -> list[str]:
    launch = "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no -m lm_eval"
    model = ["--model", "hf", "--model_args", f"pretrained={checkpoint},dtype=float32", "--batch_size", "16"]
    return [*launch.split(), *model, "--tasks", TASK, "--include_path", str(task), "--output_path", str(scores)]


def main() -> int:
    """Run the walk in the checkout; 1 when a step fails or the model did not learn."""
    reader = argparse.ArgumentParser(prog="sh examples/quickstart/run.sh", description=__doc__)
    reader.add_argument("output", type=Path, nargs="?", help="receives every result (quickstart_output)")
    root = Path(__file__).resolve().parents[2]
    chosen = (reader.parse_args().output or root / "quickstart_output").resolve()
    os.chdir(root)
    out = chosen.relative_to(root) if chosen.is_relative_to(root) else chosen
    environment = ENVIRONMENT | {"HF_HOME": str(chosen / "cache")}
    os.environ.update(environment)
    print(f"cd {shlex.quote(str(root))}")
    if "VIRTUAL_ENV" in os.environ:
        print(f". {shlex.quote(os.environ['VIRTUAL_ENV'])}/bin/activate")
    print("export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items()))
    try:
        outcomes = run_all(steps(out), out / "log")
        print(summarise(out, outcomes))
        check_learned(out)
    except (StepError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues with the step that was running", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
