"""What a run needs on disk: its datasets, start weights and tokenizer there, its output directory its own."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_patch.config.run import RunConfig
from megatron_patch.data.index_header import check_instruction_files, check_sample_documents, read_header
from megatron_patch.data.inputs import check_readable, read_rows, resolve_inputs
from megatron_patch.data.json_lines import is_array
from megatron_patch.data.paths import parse_blend
from megatron_patch.data.records import Names, conversation, resolve_names
from megatron_patch.data.sidecar import check_made_for
from megatron_patch.data.splits import parse_split, shifted_split_range, split_range
from megatron_patch.plan.start import resolve_start
from megatron_patch.plan.weights import check_weights

LOOKED_AT, ROWS_BYTES = 16 << 20, 1 << 20  # bytes of raw records read before a run, and at once


def look(run: RunConfig) -> tuple[list[str], list[str]]:
    """Sentences about what stands in the way now but may change (missing or occupied paths), and about what is wrong.

    The first kind is an OSError in the checks below, the second a ValueError.
    """
    now, wrong = [], []
    for check in (check_training_data, check_validation_data, check_checkpoint, check_tokenizer, check_output):
        try:
            check(run)
        except OSError as error:
            now.append(str(error))
        except ValueError as error:
            wrong.append(str(error))
    return list(dict.fromkeys(now)), list(dict.fromkeys(wrong))


def present_obstacles(*checks: Callable[[], None]) -> list[str]:
    """The sentences of those `checks` that raise OSError."""
    sentences = []
    for check in checks:
        try:
            check()
        except OSError as error:
            sentences.append(str(error))
    return sentences


def check_training_data(run: RunConfig) -> None:
    """Raise unless every training dataset is there and whole, and what it shares with validation leaves both some.

    With no validation to do, it may leave that none.
    """
    resolve_names(run.data.map_keys)
    parse_split(run.data.split)
    is_divided = run.data.train_data_path == run.data.valid_data_path
    _check_dataset(run, run.data.train_data_path)
    if is_divided and run.data.dataset != "JSON-SFT":
        is_instruction = run.data.is_instruction_dataset
        read, divide = (check_instruction_files, shifted_split_range) if is_instruction else (read_header, split_range)
        for source in parse_blend(run.data.train_data_path):
            documents = read(source.prefix).sequences
            for name in ("train", "valid") if run.eval_iters else ("train",):
                _check_split(source.prefix, run.data.split, name, *divide(run.data.split, name, documents), documents)


def check_validation_data(run: RunConfig) -> None:
    """The same for validation, if there is any."""
    if run.eval_iters:
        _check_dataset(run, run.data.valid_data_path)


def check_checkpoint(run: RunConfig) -> None:
    """Raise unless the directory to load holds whole weights."""
    load = run.checkpoint.load
    if load is None:
        return
    if not Path(load).is_dir():
        raise FileNotFoundError(f"checkpoint directory {load!r} does not exist")
    check_weights(Path(load))


def check_tokenizer(run: RunConfig) -> None:
    """Raise unless the tokenizer directory, where one is named, is there."""
    name = run.data.tokenizer_model
    if name is not None and not Path(name).is_dir():
        raise FileNotFoundError(f"tokenizer directory {name!r} does not exist")


def check_output(run: RunConfig) -> None:
    """Raise unless checkpoints, events and log can be written, and this run may continue or replace what is there."""
    for path in (run.checkpoint.save, run.tensorboard_dir, run.log_file):
        if path is not None:
            check_writable(path)
    if run.checkpoint.load and Path(run.checkpoint.load).resolve() == Path(run.checkpoint.save).resolve():
        raise FileExistsError(
            f"{run.checkpoint.save} is where the run starts from; name another directory to write: OUTPUT_BASEPATH, "
            "or in a script --save"
        )
    resolve_start(run)


def check_writable(path: str | Path) -> None:
    """Raise unless `path` could be created: its nearest existing parent is a directory that we may write to."""
    parent = Path(path).absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: no permission in {parent}")


def _check_dataset(run: RunConfig, paths: tuple[str, ...]) -> None:
    if run.data.dataset == "JSON-SFT":
        files = resolve_inputs(paths)
        check_readable(files)
        _check_records(files, resolve_names(run.data.map_keys))
        return
    for source in parse_blend(paths):
        if run.data.is_instruction_dataset:
            check_instruction_files(source.prefix)
            continue
        header, is_tuning = read_header(source.prefix), run.data.dataset == "MMAP-SFT"
        check_made_for(source.prefix, run.data.seq_length if is_tuning else None)
        if is_tuning:
            check_sample_documents(header, run.data.seq_length)
        elif not header.tokens:
            raise ValueError(f"dataset {source.prefix!r} holds no token; preprocess again")


def _check_records(files: Iterable[Path], names: Names) -> None:
    """Raise ValueError for the first record that says nothing, with its place; ranks look at what is not read here."""
    for path in files:
        with path.open("rb") as file:
            if path.stat().st_size > LOOKED_AT and is_array(file):
                continue  # it can only be read as a whole
        for rows in read_rows(path, None, ROWS_BYTES):
            for row in rows.rows:
                if row.record is None:
                    raise ValueError(row.problem)
                try:
                    conversation(row.record, names)
                except ValueError as error:
                    raise ValueError(f"{row.place}: {error}") from None
            if rows.position > LOOKED_AT:
                break


def _check_split(prefix: str, split: str, name: str, first: int, last: int, documents: int) -> None:
    if first == last:
        raise ValueError(
            f"split {split!r} leaves nothing of dataset {prefix!r} ({documents} documents) for {name}; "
            "change --split, or name another validation dataset"
        )
