"""From what a user counts, tokens or iterations, to what the optimizer counts."""

from collections.abc import Sequence
from typing import Any

from megatron_patch.config.checks import sample_length
from megatron_patch.config.run import RunConfig
from megatron_patch.data.index_header import check_instruction_files, read_header
from megatron_patch.data.paths import parse_blend
from megatron_patch.data.splits import parse_split


def iterations(amount: int, warmup: int, tokens_per_iteration: int, *, is_fine_tuning: bool) -> tuple[int, int, int]:
    """(train, warm-up, decay) iterations, rounded down.

    Pre-training counts `amount` and `warmup` in tokens and decays to the end; fine-tuning counts both in iterations
    and decays over what the warm-up leaves.
    """
    if is_fine_tuning:
        return amount, warmup, amount - warmup
    train = amount // tokens_per_iteration
    return train, warmup // tokens_per_iteration, train


def schedule(run: RunConfig, dp: int) -> dict[str, Any]:
    """The optimizer's schedule, and how much data it passes over; `epochs` is None where no dataset is there."""
    samples = run.train_iters * run.global_batch_size
    tokens = samples * sample_length(run)
    available = _tokens_on_disk(run)
    return {
        "train_iters": run.train_iters,
        "lr_warmup_iters": run.optimizer.lr_warmup_iters,
        "lr_decay_iters": run.optimizer.lr_decay_iters,
        "lr_decay_style": run.optimizer.lr_decay_style,
        "lr": run.optimizer.lr,
        "min_lr": run.optimizer.min_lr,
        "micro_batch_size": run.micro_batch_size,
        "global_batch_size": run.global_batch_size,
        "micro_batches": run.global_batch_size // (run.micro_batch_size * dp),
        "sample_length": sample_length(run),
        "samples": samples,
        "tokens": tokens,
        "dataset_tokens": available,
        "epochs": round(tokens / available, 4) if available else None,
        "epochs_of_datasets": _epochs_of_datasets(run, tokens),
        "eval_interval": run.eval_interval,
        "eval_iters": run.eval_iters,
        "save_interval": run.checkpoint.save_interval,
    }


def _tokens_on_disk(run: RunConfig) -> int | None:
    """Training tokens of one unweighted dataset; raw records are not tokenized yet, and a blend has no one epoch."""
    if run.data.dataset == "JSON-SFT":
        return None
    sources = parse_blend(run.data.train_data_path)
    if any(source.weight is not None for source in sources):
        return None
    try:
        total = _sum_of_tokens([source.prefix for source in sources], run)
    except (OSError, ValueError):
        return None
    return int(total * _training_share(run))


def _epochs_of_datasets(run: RunConfig, tokens: int) -> dict[str, float | None]:
    """How often each dataset of a weighted blend is passed over; None where it is not there, empty without weights."""
    sources = [] if run.data.dataset == "JSON-SFT" else parse_blend(run.data.train_data_path)
    weights = sum(source.weight or 0 for source in sources)
    found: dict[str, float | None] = {}
    for source in sources if weights else ():
        try:
            held = _sum_of_tokens([source.prefix], run) * _training_share(run)
        except (OSError, ValueError):
            held = 0
        found[source.prefix] = round(tokens * source.weight / weights / held, 4) if held else None
    return found


def _training_share(run: RunConfig) -> float:
    """Of the tokens of its datasets."""
    is_divided = run.data.train_data_path == run.data.valid_data_path
    return parse_split(run.data.split)[0] if is_divided else 1.0


def _sum_of_tokens(prefixes: Sequence[str], run: RunConfig) -> int:
    if run.data.is_instruction_dataset:  # each is cut and padded to a sample
        return sum(check_instruction_files(prefix).sequences for prefix in prefixes) * run.data.seq_length
    total = sum(read_header(prefix).tokens for prefix in prefixes)
    return total // 2 if run.data.dataset == "MMAP-SFT" else total  # there, the other half are labels
