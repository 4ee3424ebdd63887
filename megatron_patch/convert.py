"""Converting a checkpoint between formats and tensor-parallel layouts: `python3 -m megatron_patch.convert SRC DST`."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_patch.checkpoint import mcore
from megatron_patch.checkpoint.assets import copy_assets, write_dtype
from megatron_patch.checkpoint.atomic import replaced_directory
from megatron_patch.checkpoint.hf import HfSource, write_hf
from megatron_patch.checkpoint.layouts import check_divides, cut, part_shapes, split
from megatron_patch.checkpoint.mcore import McoreSource
from megatron_patch.checkpoint.source import detect_format, open_checkpoint
from megatron_patch.config.model import ModelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import Entry, manifest
from megatron_patch.families.resolve import Resolved, from_checkpoint

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
_COMMAND = "python3 -m megatron_patch.convert"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Job:
    """One conversion. `tp` and `transformer_impl` (te | local names) describe an mcore target."""

    source: Path
    target: Path
    format: str
    tp: int = 1
    transformer_impl: str = "te"
    dtype: torch.dtype | None = None  # None keeps each tensor's own
    assets: Path | None = None
    model_size: str = "auto"
    overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion wrote: tensors (a tensor-parallel one counts once) and their bytes over all ranks."""

    tensors: int
    bytes: int
    warnings: tuple[str, ...]


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status 2 for arguments that cannot work, 1 for a checkpoint that cannot be converted."""
    parser = _parser()
    job = _job(parser, parser.parse_args(argv))
    try:
        check_paths(job)
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    try:
        summary = convert(job)
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"convert: interrupted; {job.target} is as it was", file=sys.stderr)
        return INTERRUPTED
    for warning in summary.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    seconds = time.perf_counter() - start
    print(f"{job.target}: {job.format}, {summary.tensors} tensors, {summary.bytes:,} bytes, {seconds:.1f} s")
    return 0


def convert(job: Job) -> Summary:
    """Convert `job.source` into `job.target`, which appears complete or not at all.

    Raises ValueError or OSError in one sentence, before anything is written where that can be known.
    """
    check_paths(job)
    source_format = detect_format(job.source)
    resolved, assets = resolve_architecture(job)
    entries = manifest(resolved.family, resolved.config)
    warnings = list(resolved.warnings)
    if job.format == "mcore":
        for entry in entries:
            check_divides(entry, resolved.config, job.tp)
    source = open_checkpoint(job.source, resolved.family, resolved.config)
    if job.format == "hf" and job.tp > 1 and (source_format == "hf" or job.tp != len(source.ranks)):
        warnings.append(f"--tp {job.tp} has no effect: the source is {source.describe()}, and hf is not cut")
    job.target.parent.mkdir(parents=True, exist_ok=True)
    with replaced_directory(job.target) as partial:
        copy_assets(assets, partial)
        write_dtype(partial, str(job.dtype or source.dtype).removeprefix("torch."))
        write = _write_hf if job.format == "hf" else _write_mcore
        tensors, size = write(job, source, entries, resolved.config, partial)
    return Summary(tensors, size, tuple(warnings))


def check_paths(job: Job) -> None:
    """Raise ValueError unless the target can be written without touching the source or anything else of value."""
    source, target = job.source.resolve(), job.target.resolve()
    if target == source or source in target.parents:
        raise ValueError(f"DST {job.target} lies inside SRC {job.source}, which is never written to")
    for name, kept in (("SRC", source), ("--assets", job.assets and job.assets.resolve())):
        if kept and (target == kept or target in kept.parents):
            raise ValueError(f"{name} {kept} lies inside DST {job.target}, which would be replaced")
    if job.target.exists() and not job.target.is_dir():
        raise ValueError(f"DST {job.target} is a file; name a directory")
    if job.target.is_dir() and any(job.target.iterdir()):
        if not job.overwrite:
            raise ValueError(f"DST {job.target} is not empty; choose another directory or pass --overwrite")
        try:
            detect_format(job.target)
        except FileNotFoundError:
            raise ValueError(f"DST {job.target} holds no checkpoint; --overwrite replaces checkpoints only") from None


def resolve_architecture(job: Job) -> tuple[Resolved, Path]:
    """The family and config that the source or `--assets` describes, and the directory whose files travel along."""
    families, own = tuple(ALL), (job.source / "config.json").is_file()
    if not own and job.assets is None:
        raise FileNotFoundError(f"{job.source} holds no config.json; pass --assets with the model's Hugging Face files")
    resolved = from_checkpoint(families, job.model_size, job.assets or job.source)
    if own and job.assets is not None:
        theirs = from_checkpoint(families, "auto", job.source)
        _check_same(resolved, theirs, job)
    return resolved, job.assets or job.source


def _check_same(assets: Resolved, source: Resolved, job: Job) -> None:
    if assets.family is not source.family:
        raise ValueError(f"architectures is {assets.family.architecture} in {job.assets}, not so in {job.source}")
    for field, key in source.family.keys.items():
        ours, theirs = getattr(assets.config, field), getattr(source.config, field)
        if ours != theirs:
            raise ValueError(f"{key.hf[0]} is {ours} in {job.assets}/config.json and {theirs} in {job.source}")


def _write_hf(
    job: Job, source: HfSource | McoreSource, entries: list[Entry], config: ModelConfig, directory: Path
) -> tuple[int, int]:
    outline = {
        name: (job.dtype or source.dtype_of(entry), shape)
        for entry in entries
        for name, shape in zip(entry.hf, part_shapes(entry, config), strict=True)
    }

    def tensors() -> Iterator[Tensor]:
        for entry in _progress(entries):
            yield from split(entry, _cast(entry, source.read(entry), job.dtype), config)

    return len(outline), write_hf(directory, outline, tensors())


def _write_mcore(
    job: Job, source: HfSource | McoreSource, entries: list[Entry], config: ModelConfig, directory: Path
) -> tuple[int, int]:
    args = mcore.megatron_args(config, job.tp, job.dtype or source.dtype, job.transformer_impl)
    name_of = mcore.local_name if job.transformer_impl == "local" else str

    def write_rank(rank: int) -> int:  # returns before the next rank's shards are made
        shards = {
            name_of(entry.mcore): _cast(entry, cut(entry, source.read(entry), rank, job.tp), job.dtype)
            for entry in _progress(entries, f"rank {rank}")
        }
        mcore.write_rank(directory, None, rank, shards, args)
        return sum(shard.nbytes for shard in shards.values())

    size = sum(write_rank(rank) for rank in range(job.tp))
    mcore.publish(directory, None, job.tp)
    return len(entries), size


def _cast(entry: Entry, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(result).all():
        raise ValueError(f"{entry.mcore} has values beyond fp16's 65504; keep the dtype or use bf16")
    return result


def _progress(entries: list[Entry], label: str = "tensors") -> Iterator[Entry]:
    return iter(tqdm(entries, label, leave=False, disable=not sys.stderr.isatty()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert", usage=f"{_COMMAND} SRC DST --format {{hf,mcore}} [options]", description="Convert a checkpoint."
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint directory; its format is detected")
    parser.add_argument("target", metavar="DST", type=Path, help="directory to write")
    parser.add_argument("--format", required=True, choices=("hf", "mcore"), help="what to write")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of an mcore target")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages of an mcore target; only 1 yet")
    parser.add_argument("--transformer-impl", choices=("te", "local"), default="te", help="parameter names of mcore")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="convert every tensor; default: as stored")
    parser.add_argument("--assets", type=Path, metavar="DIR", help="config.json and tokenizer to carry; default: SRC's")
    parser.add_argument("--model-size", default="auto", help="hold config.json against a named size")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that stands in DST")
    return parser


def _job(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Job:
    values = vars(arguments)
    if (pp := values.pop("pp")) != 1:
        parser.error(f"--pp is {pp}; only 1 is built so far")
    if values["tp"] < 1:
        parser.error(f"--tp is {values['tp']}; it must be at least 1")
    return Job(**values | {"dtype": DTYPES.get(values["dtype"])})


if __name__ == "__main__":
    sys.exit(main())
