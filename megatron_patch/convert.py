"""Converting a checkpoint between formats and layouts: `python3 -m megatron_patch.convert SRC DST`."""

import argparse
import dataclasses
import fnmatch
import hashlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_patch.checkpoint.assets import TOKENIZER, copy_assets, write_config, write_dtype
from megatron_patch.checkpoint.atomic import replaced_directory
from megatron_patch.checkpoint.cast import DTYPES, Cast
from megatron_patch.checkpoint.formats import FORMATS, detect_format
from megatron_patch.checkpoint.interface import Source, Target, Written
from megatron_patch.checkpoint.memory import peak_memory
from megatron_patch.checkpoint.upcycle import upcycle
from megatron_patch.config.checks import check_model
from megatron_patch.config.model import ModelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import Entry, listed, manifest
from megatron_patch.families.resolve import Resolved, from_checkpoint, read_config
from megatron_patch.families.upcycle import Upcycling, resolve_upcycled, upcycled_hf_config
from megatron_patch.plan.disk import check_writable
from megatron_patch.verify import check_can_run, check_equal, check_logits

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
MOST_DIGITS = 18  # of a count
_COMMAND = "python3 -m megatron_patch.convert"
# Behind `--upcycle-`: the field of Upcycling.
_UPCYCLING = {
    "experts": "num_moe_experts",
    "topk": "moe_router_topk",
    "splits": "num_splits",
    "ffn": "moe_ffn_hidden_size",
    "shared": "moe_shared_expert_intermediate_size",
    "pre_softmax": "moe_router_pre_softmax",
    "padding": "padding",
    "seed": "seed",
}
_EXPERT_LAYOUT = ("etp", "experts")  # of experts alone; an `ep` above 1 without experts is an error


@dataclasses.dataclass(frozen=True)
class Job:
    """One conversion. `layout` holds the Target fields that were named; `dtype` None keeps each tensor's own."""

    source: Path
    target: Path
    format: str
    layout: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype | None = None
    assets: Path | None = None
    model_size: str = "auto"
    overwrite: bool = False
    upcycling: Upcycling | None = None  # make a dense source a mixture of experts
    verify: bool = False  # read the result again, bit for bit
    verify_logits: int = 0  # tokens to run through both


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion wrote, and the sha256 of its manifest: a line `name type shape` per parameter."""

    written: Written
    manifest: str
    warnings: tuple[str, ...]


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status 2 for arguments that cannot work, 1 for a checkpoint that cannot be converted."""
    parser = _parser()
    try:
        job = _job(parser.parse_args(argv))
        check_paths(job)
    except (ValueError, OSError) as error:
        parser.error(_told(error))
    start, before = time.perf_counter(), _identity(job.target)
    try:
        with peak_memory() as peak:
            summary = convert(job)
    except (ValueError, OSError) as error:
        print(f"convert: {_told(error, job.target)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        state = "is as it was" if _identity(job.target) == before else "was replaced already and is complete"
        print(f"convert: interrupted; {job.target} {state}", file=sys.stderr)
        return INTERRUPTED
    for warning in summary.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return _print_closing_line(_closing_line(job, summary, time.perf_counter() - start, peak()), job.target)


def _print_closing_line(line: str, target: Path) -> int:
    """The exit status: 1 where nobody could be told that all went well."""
    try:
        print(line, flush=True)
    except OSError as error:
        print(f"convert: {target} is complete, but the output could not say so: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more when it ends
        return 1
    return 0


def _told(error: ValueError | OSError, target: Path | None = None) -> str:
    """What happened; of an error of the system without its number, and of two files the one that was written."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    file = error.filename2 or error.filename or target
    return f"{file}: {error.strerror}" if file else error.strerror


def _identity(path: Path) -> tuple[int, int] | None:
    return (path.stat().st_dev, path.stat().st_ino) if path.exists() else None


def _closing_line(job: Job, summary: Summary, seconds: float, peak: int) -> str:
    proofs = ["bits verified"] * job.verify + [f"logits of {job.verify_logits} tokens verified"] * bool(
        job.verify_logits
    )
    facts = (
        job.format,
        f"{summary.written.tensors} tensors",
        f"{summary.written.bytes:,} bytes",
        f"{seconds:.1f} s",
        f"peak memory {peak / 2**20:.0f} MiB",
        *proofs,
        f"manifest sha256 {summary.manifest}",
    )
    return f"{job.target}: {', '.join(facts)}"


def convert(job: Job) -> Summary:
    """Convert `job.source` into `job.target`, which appears complete or not at all.

    Raises ValueError or OSError in one sentence, before anything is written where that can be known.
    """
    check_paths(job)
    found, wanted = detect_format(job.source), FORMATS[job.format]
    resolved, assets = resolve_architecture(job)
    stored = manifest(resolved.family, resolved.config)
    family, config = resolved.family, resolved.config
    if job.upcycling:
        family, config = resolve_upcycled(config, job.upcycling)
    check_model(config)
    if job.verify_logits:
        check_can_run(config, job.verify_logits)
    entries = manifest(family, config)
    target = Target(**{name: value for name, value in job.layout.items() if name in wanted.options})
    wanted.check(entries, config, target)
    source = found.open(job.source, stored, resolved.config)
    _check_layout_arguments(job, source)
    if job.upcycling:
        source = upcycle(source, stored, job.upcycling)
    if job.dtype is not None:
        source = Cast(source, job.dtype)
    with replaced_directory(job.target) as partial:
        copied = copy_assets(assets, partial)
        if job.upcycling:
            write_config(partial, upcycled_hf_config(read_config(assets), family, config, "float32"))
        write_dtype(partial, str(source.dtype).removeprefix("torch."))
        written = wanted.write(partial, entries, config, source, target)
        _verify(job, entries, config, source, partial)
        check_paths(job)  # somebody else may have filled DST meanwhile
    told = (*_without_effect(job, source, config), *_not_numbers(written), *_no_tokenizer(assets, copied))
    warnings = (*resolved.warnings, *told)
    return Summary(written, _fingerprint(entries, source), warnings)


def _verify(job: Job, entries: list[Entry], config: ModelConfig, source: Source, directory: Path) -> None:
    """Raise ValueError where what stands in `directory` is not the source, as far as the job asks."""
    if not job.verify and not job.verify_logits:
        return
    result = FORMATS[job.format].open(directory, entries, config)
    if job.verify:
        check_equal(entries, source, result)
    if job.verify_logits:
        check_logits(entries, config, source, result, job.verify_logits)


def _fingerprint(entries: list[Entry], source: Source) -> str:
    lines = (f"{entry.mcore} {source.dtype_of(entry)} {entry.shape}\n" for entry in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _not_numbers(written: Written) -> list[str]:
    count = len(written.nan)
    return [f"{count} tensors hold NaN, written as they are: {listed(written.nan)}"] if count else []


def _no_tokenizer(assets: Path, copied: list[str]) -> list[str]:
    if any(fnmatch.fnmatch(name, pattern) for name in copied for pattern in TOKENIZER if pattern != "*.py"):
        return []
    return [f"{assets} holds no tokenizer, so none travels along; training will need --tokenizer-model"]


def check_paths(job: Job) -> None:
    """Raise ValueError or OSError unless the target can be written without touching anything else of value."""
    source, target = _resolved("SRC", job.source), _resolved("DST", job.target)
    if target == source or source in target.parents:
        raise ValueError(f"DST {job.target} lies inside SRC {job.source}, which is never written to")
    assets = job.assets and _resolved("--assets", job.assets)
    is_in_place = job.overwrite and target == assets  # its files travel into the replacement before it is replaced
    for name, kept in (("SRC", source), ("--assets", None if is_in_place else assets)):
        if kept and (target == kept or target in kept.parents):
            raise ValueError(f"{name} {kept} lies inside DST {job.target}, which would be replaced")
    if target.exists() and not target.is_dir():
        raise ValueError(f"DST {job.target} is a file; name a directory")
    if target.is_dir() and any(target.iterdir()):
        _check_replaceable(job, source, target)
    check_writable(target)


def _check_replaceable(job: Job, source: Path, target: Path) -> None:
    """Raise ValueError or OSError unless what stands in the target may go, and can."""
    if not job.overwrite:
        raise ValueError(f"DST {job.target} is not empty; choose another directory or pass --overwrite")
    try:
        detect_format(target)
    except FileNotFoundError:
        raise ValueError(f"DST {job.target} holds no checkpoint; --overwrite replaces checkpoints only") from None
    linked = [path for path in source.rglob("*") if path.is_symlink() and target in path.resolve().parents]
    if linked:
        raise ValueError(f"{linked[0]} is a link into DST {job.target}, which would be replaced")
    for directory in (target, *(path for path in target.rglob("*") if path.is_dir())):
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(f"DST {job.target} cannot be replaced: no permission in {directory}")


def _resolved(name: str, path: Path) -> Path:
    if os.fsencode(path).decode("utf-8", "replace") != str(path):  # neither torch nor safetensors opens such a file
        raise ValueError(f"{name} {str(path)!r} is a name that is not UTF-8; rename it")
    try:
        return path.resolve()
    except RuntimeError:  # until Python 3.13
        raise ValueError(f"{name} {path} is a link that leads to itself; name a directory") from None


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
        ours, theirs = key.written(field, assets.config), key.written(field, source.config)
        if ours != theirs and key.hf:
            raise ValueError(f"{key.hf[0]} is {ours} in {job.assets}/config.json and {theirs} in {job.source}")


def _check_layout_arguments(job: Job, source: Source) -> None:
    """Raise ValueError where an argument without meaning for the target contradicts the source it may describe."""
    for name, value in job.layout.items():
        held = source.layout.get(name, value)
        if name not in FORMATS[job.format].options and value != held:
            told = f"{_option(name)} is {value}, but SRC has {held} ({source.describe()})"
            raise ValueError(f"{told}; {job.format} has no such layout, so leave it out or name SRC's")


def _without_effect(job: Job, source: Source, config: ModelConfig) -> list[str]:
    """What was asked for and shows neither in the target, which is a `config`, nor in the source."""
    defaults, options, sentences = Target(), FORMATS[job.format].options, []
    for name, value in job.layout.items():
        if value == getattr(defaults, name):
            continue
        if name in _EXPERT_LAYOUT and not config.num_moe_experts:
            sentences.append(f"{_option(name)} {value} has no effect: the model has no experts")
        elif name not in options and name not in source.layout:
            reason = f"{job.format} has no such layout, nor does SRC show one"
            sentences.append(f"{_option(name)} {value} has no effect: {reason}")
    return sentences


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert", usage=f"{_COMMAND} SRC DST --format FORMAT [options]", description="Convert a checkpoint."
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint directory; its format is detected")
    parser.add_argument("target", metavar="DST", type=Path, help="directory to write")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="what to write")
    layout = parser.add_argument_group("layout of the target; where its format has none, the source's must agree")
    layout.add_argument("--tp", type=_count, help="tensor-parallel ranks")
    layout.add_argument("--pp", type=_count, help="pipeline stages")
    layout.add_argument("--ep", type=_count, help="expert-parallel ranks")
    layout.add_argument("--etp", type=_count, help="tensor-parallel ranks of experts; default: as --tp")
    layout.add_argument("--vp", type=_count, help="virtual chunks of each pipeline stage")
    layout.add_argument("--first-stage-layers", type=_count, help="layers of the first stage; default: even")
    layout.add_argument("--transformer-impl", choices=("te", "local"), help="parameter names of mcore; default: te")
    layout.add_argument("--experts", choices=("sequential", "grouped"), help="names of experts; default: sequential")
    mixture = parser.add_argument_group("upcycling: a dense source becomes a mixture of experts made from its MLP")
    mixture.add_argument("--upcycle-experts", type=_count, help="routed experts of every layer")
    mixture.add_argument("--upcycle-topk", type=_count, help="experts each token is sent to")
    mixture.add_argument("--upcycle-splits", type=_count, help="parts of the MLP, one to an expert; default: 1, copies")
    mixture.add_argument("--upcycle-ffn", type=_count, help="width of an expert; default: that of its part")
    mixture.add_argument("--upcycle-shared", type=_count, help="width of a random shared expert; default: none")
    mixture.add_argument("--upcycle-pre-softmax", action="store_true", default=None, help="no renormalised weights")
    mixture.add_argument("--upcycle-padding", choices=("normal", "zeros"), help="what widens a part; default: normal")
    mixture.add_argument("--upcycle-seed", type=_count, help="of the router and all other draws; default: 1234")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="convert every tensor; default: as stored")
    parser.add_argument("--assets", type=Path, metavar="DIR", help="config.json and tokenizer to carry; default: SRC's")
    parser.add_argument("--model-size", default="auto", help="hold config.json against a named size")
    parser.add_argument("--verify", action="store_true", help="read the result again and compare every bit")
    parser.add_argument("--verify-logits", type=_count, metavar="N", default=0, help="compare logits on N tokens")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that stands in DST")
    return parser


def _count(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else 0
    if value < 1:
        told = f"{text[:MOST_DIGITS]}{'…' if len(text) > MOST_DIGITS else ''}"
        raise argparse.ArgumentTypeError(f"{told} is not a count; it must be at least 1")
    return value


def _job(arguments: argparse.Namespace) -> Job:
    values = vars(arguments)
    layout = {field.name: values.pop(field.name) for field in dataclasses.fields(Target)}
    named = {name: value for name, value in layout.items() if value is not None}
    upcycling = {field: values.pop(f"upcycle_{name}") for name, field in _UPCYCLING.items()}
    return Job(**values | {"dtype": DTYPES.get(values["dtype"]), "layout": named, "upcycling": _upcycling(upcycling)})


def _upcycling(values: Mapping[str, int | str | None]) -> Upcycling | None:
    said = {name: value for name, value in values.items() if value is not None}
    if said and not {"num_moe_experts", "moe_router_topk"} <= said.keys():
        raise ValueError("upcycling needs both --upcycle-experts and --upcycle-topk")
    return Upcycling(**said) if said else None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # unwinds, so that nothing is left behind
    sys.exit(main())
