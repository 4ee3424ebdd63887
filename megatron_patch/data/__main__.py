"""Commands about datasets that exist: `python3 -m megatron_patch.data inspect|cache DATASET_PATH …`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_patch.config.data import DataConfig
from megatron_patch.data.batches import Deal
from megatron_patch.data.command_line import count
from megatron_patch.data.index_header import instruction_prefixes, read_header
from megatron_patch.data.indexed import IndexedDataset
from megatron_patch.data.inspect import describe, show_documents, show_samples
from megatron_patch.data.paths import parse_blend, split_words
from megatron_patch.data.pretraining import open_indexed
from megatron_patch.data.sidecar import FINE_TUNING, read_sidecar
from megatron_patch.data.tokenizer import check_datasets, load_tokenizer

ORDER = ("seq_length", "train_iters", "global_batch_size")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what cannot be used ends it with one sentence and status 1."""
    options = parser().parse_args(argv)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"megatron_patch.data: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Both commands; they name a run's data as the trainer does."""
    result = argparse.ArgumentParser(prog="megatron_patch.data", description=__doc__)
    commands = result.add_subparsers(required=True)
    inspect = commands.add_parser("inspect", help="what a dataset holds, and what a rank will see of it")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("--tokenizer-model", help="decode with this tokenizer; absent: ids are shown")
    inspect.add_argument("--documents", type=count, default=3, help="how many are shown")
    inspect.add_argument("--iteration", type=int, help="show the samples of this training step, counted from 1")
    inspect.add_argument("--rank", type=int, default=0, help="data-parallel rank that sees them")
    inspect.add_argument("--data-parallel-size", type=int, default=1)
    inspect.add_argument("--micro-batch-size", type=int, default=1)
    cache = commands.add_parser("cache", help="build the sample indices of a run before it starts")
    cache.set_defaults(run=_cache)
    cache.add_argument("--eval-iters", type=int, default=0, help="of the run; 0: none for validation")
    for command in (inspect, cache):
        _add_data(command)
    return result


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("dataset_path", help="prefix, `weight prefix …` in one word, or a file of them")
    command.add_argument("--valid-dataset-path", help="absent: the same, divided by --split")
    for name in ORDER:
        command.add_argument("--" + name.replace("_", "-"), type=int, help="of the run")
    command.add_argument("--split", default="99,1,0")
    command.add_argument("--seed", type=int, default=1234)
    command.add_argument("--dataloader-type", default="single", choices=("single", "cyclic"))
    command.add_argument("--data-cache-path", help="where indices are kept")


def _inspect(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer_model) if options.tokenizer_model else None
    words = split_words(options.dataset_path)
    if tokenizer is not None:
        for note in check_datasets(words, tokenizer):
            print(f"note: {note}", file=sys.stderr)
    for prefix in (_with_tokens(source.prefix) for source in parse_blend(words)):
        indexed, said = IndexedDataset(prefix), read_sidecar(prefix) or {}
        print(describe(read_header(prefix), indexed.sequence_lengths))
        sample_length = said.get("seq_length") if said.get("kind") == FINE_TUNING else None
        print(show_documents(indexed, options.documents, tokenizer, sample_length))
    if options.iteration is None:
        return
    config = _config(options)
    _check_at_least(options, "iteration", 1)
    if not options.iteration <= options.train_iters:
        raise ValueError(f"--iteration {options.iteration} is beyond --train-iters {options.train_iters}")
    for name in ("micro_batch_size", "data_parallel_size"):
        _check_at_least(options, name, 1)
    deal = Deal(options.global_batch_size, options.micro_batch_size, options.rank, options.data_parallel_size)
    if not 0 <= deal.rank < deal.size:
        raise ValueError(f"--rank {deal.rank} is not one of 0 to {deal.size - 1}, the ranks of --data-parallel-size")
    dataset, order = open_indexed(config, "train", options.train_iters * options.global_batch_size, None)
    print(f"iteration {options.iteration}, data-parallel rank {deal.rank} of {deal.size}:")
    for number, positions in enumerate(deal.positions(options.iteration - 1)):
        print(show_samples(dataset, [order(position) for position in positions], number, tokenizer))


def _with_tokens(prefix: str) -> str:
    """The pair that holds a dataset's tokens: of instruction data the first of its three."""
    first = instruction_prefixes(prefix)[0]
    return first if Path(f"{first}.idx").is_file() and not Path(f"{prefix}.idx").is_file() else prefix


def _cache(options: argparse.Namespace) -> None:
    if not options.data_cache_path:
        raise ValueError("say where the indices go: --data-cache-path DIR, as the run will be told")
    config = _config(options)
    Path(options.data_cache_path).mkdir(parents=True, exist_ok=True)
    if not os.access(options.data_cache_path, os.W_OK):
        raise ValueError(f"--data-cache-path {options.data_cache_path!r} cannot be written; name another directory")
    for split, iterations in (("train", options.train_iters), ("valid", options.eval_iters)):
        if iterations:
            dataset, _ = open_indexed(config, split, iterations * options.global_batch_size, None)
            print(f"{split}: {len(dataset)} samples of {options.seq_length} tokens, in {options.data_cache_path}")


def _config(options: argparse.Namespace) -> DataConfig:
    for name in ORDER:
        _check_at_least(options, name, 1)
    train = split_words(options.dataset_path)
    return DataConfig(
        train_data_path=train,
        valid_data_path=split_words(options.valid_dataset_path or options.dataset_path, "valid"),
        split=options.split,
        seq_length=options.seq_length,
        max_padding_length=options.seq_length,
        dataloader_type=options.dataloader_type,
        data_cache_path=options.data_cache_path,
        seed=options.seed,
    )


def _check_at_least(options: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(options, name)
    if value is None or value < least:
        raise ValueError(f"--{name.replace('_', '-')} is {value}: give the run's own, {least} or more")


if __name__ == "__main__":
    sys.exit(main())
