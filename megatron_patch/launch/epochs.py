"""EPOCH as iterations: how many samples one pass has, counted without tokenising them."""

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from megatron_patch.config.data import DataConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.data.index_header import read_header
from megatron_patch.data.inputs import check_readable, read_rows, resolve_inputs
from megatron_patch.data.paths import parse_blend
from megatron_patch.data.splits import split_range

BATCH = 1 << 20  # bytes of records read together


def samples_per_epoch(data: DataConfig) -> int:
    """Training samples of one pass. Records that training leaves out, as too long, are counted: it has to tokenise
    them to know.

    Raises FileNotFoundError for data that is missing, ValueError for data of which no pass can be counted.
    """
    if data.dataset == "JSON-SFT":
        if data.sft_packing:
            raise ValueError(
                "MP_SFT_PACKING is true: how many samples the records fill is not known before they are tokenised, so "
                "EPOCH cannot be counted; unset it, or preprocess them with PACKING true and MP_DATASET_TYPE=idxmap"
            )
        sizes = [_count_records(resolve_inputs(data.train_data_path))]
    else:
        sources = parse_blend(data.train_data_path)
        if any(source.weight is not None for source in sources):
            raise ValueError("a blend with weights has no end, so EPOCH cannot be counted; leave the weights out")
        sizes = [read_header(source.prefix).sequences for source in sources]
    if data.train_data_path == data.valid_data_path:
        sizes = [last - first for first, last in (split_range(data.split, "train", size) for size in sizes)]
    if not sum(sizes):
        raise ValueError(f"training data {' '.join(data.train_data_path)!r} holds no record; name another file")
    return sum(sizes)


def in_epochs(run: RunConfig, epochs: int, samples: int, said: Collection[str]) -> RunConfig:
    """`run` made `epochs` passes over `samples` samples long, with a checkpoint at the end of each.

    The last iteration of a pass begins the next one where the samples do not fill it. Flags that were `said` stay.
    """
    each = math.ceil(samples / run.global_batch_size)
    train = run.train_iters if "--train-iters" in said else epochs * each
    decay = run.optimizer.lr_decay_iters if "--lr-decay-iters" in said else train - run.optimizer.lr_warmup_iters
    interval = run.checkpoint.save_interval if "--save-interval" in said else each
    return replace(
        run,
        train_iters=train,
        optimizer=replace(run.optimizer, lr_decay_iters=decay),
        checkpoint=replace(run.checkpoint, save_interval=interval),
    )


def _count_records(files: list[Path]) -> int:
    check_readable(files)
    return sum(len(rows.rows) for path in files for rows in read_rows(path, None, BATCH))
