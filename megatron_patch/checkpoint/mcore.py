"""Megatron's classic checkpoint: a tracker file and `release|iter_NNNNNNN/mp_rank_TT/model_optim_rng.pt`.

Manifest names are Transformer Engine's. Megatron-Core without it spells two norms of every layer differently
("local" names); both are read, and both can be written.
"""

import argparse
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.checkpoint.atomic import move_directory, write_text
from megatron_patch.checkpoint.layouts import join, shard_shape
from megatron_patch.checkpoint.unpickle import read_pt
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry, check_complete

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_TP = "tensor_model_parallel_size"
_LOCAL_SPELLINGS = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
)
# `args` that must agree with config.json wherever a checkpoint records them.
_COMPARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "norm_epsilon",
    "rotary_base",
)


@dataclass(frozen=True)
class McoreSource:
    """An open iteration: `ranks` holds, per tensor-parallel rank, its memory-mapped tensors by manifest name."""

    directory: Path
    ranks: tuple[Mapping[str, Tensor], ...]
    transformer_impl: str
    format: str = "mcore"

    @property
    def dtype(self) -> torch.dtype:
        """The type of most tensors."""
        return Counter(tensor.dtype for tensor in self.ranks[0].values()).most_common(1)[0][0]

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The type of `entry`, the same on every rank."""
        return self.ranks[0][entry.mcore].dtype

    def read(self, entry: Entry) -> Tensor:
        """The full mcore tensor, `entry.shape`, without vocabulary padding."""
        return join(entry, [rank[entry.mcore] for rank in self.ranks])

    def describe(self) -> str:
        """One phrase for the log."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"mcore {self.directory.name}, tp {len(self.ranks)}, {self.transformer_impl} names, {dtype}"


def local_name(name: str) -> str:
    """The name that Megatron-Core without Transformer Engine gives the parameter."""
    for te, local in _LOCAL_SPELLINGS:
        if name.endswith("." + te):
            return name.removesuffix(te) + local
    return name


def holds_mcore(directory: Path) -> bool:
    """Whether `directory` looks like a classic Megatron checkpoint."""
    return (directory / TRACKER).is_file() or any(directory.glob(f"*/mp_rank_*/{RANK_FILE}"))


def open_mcore(root: Path, entries: list[Entry], config: ModelConfig) -> McoreSource:
    """Open the iteration that the tracker names, on whatever tensor-parallel layout it was written.

    Raises ValueError or FileNotFoundError in one sentence, with the path, for a missing tracker or rank, a damaged
    file, an architecture other than `config`, and names or shapes other than `entries`.
    """
    directory = latest_directory(root)
    files = _rank_files(directory)
    payloads = [_payload(file) for file in files]
    for file, payload in zip(files, payloads, strict=True):
        _check_args(file, payload.get("args"), config, len(files))
    spelling = {local_name(entry.mcore): entry.mcore for entry in entries}
    ranks = tuple(_named(file, payload["model"], spelling) for file, payload in zip(files, payloads, strict=True))
    for file, rank in zip(files, ranks, strict=True):
        check_complete((entry.mcore for entry in entries), rank, str(file))
    for entry in entries:
        _check_shards(entry, [rank[entry.mcore] for rank in ranks], files)
    is_local = any(name in payloads[0]["model"] for name, te in spelling.items() if name != te)
    return McoreSource(directory, ranks, "local" if is_local else "te")


def latest_directory(root: Path) -> Path:
    """The directory that the tracker file of `root` names."""
    path = root / TRACKER
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it names the iteration to read, or says release")
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise ValueError(f"{path} says {text[:40]!r}; it must be release or an iteration number")
    directory = root / iteration_name(None if text == "release" else int(text))
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist, but {path} names it")
    return directory


def iteration_name(iteration: int | None) -> str:
    """The directory of an iteration; None is a release (a conversion, not a training step)."""
    return "release" if iteration is None else f"iter_{iteration:07d}"


def megatron_args(config: ModelConfig, tp: int, dtype: torch.dtype, transformer_impl: str = "te") -> argparse.Namespace:
    """What Megatron's command line would have been: builtins only, under Megatron's own names."""
    return argparse.Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=True,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        vocab_size=config.vocab_size,
        padded_vocab_size=-(-config.vocab_size // tp) * tp,
        make_vocab_size_divisible_by=1,
        max_position_embeddings=config.max_position_embeddings,
        seq_length=config.max_position_embeddings,
        norm_epsilon=config.norm_epsilon,
        normalization="RMSNorm",
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        rotary_percent=1.0,
        window_size=None
        if config.window_size is None
        else (config.window_size - 1, 0),  # Megatron's excludes the query
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=not config.share_embeddings_and_output_weights,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        transformer_impl={"te": "transformer_engine", "local": "local"}[transformer_impl],
    )


def write_rank(
    root: Path, iteration: int | None, tp_rank: int, tensors: Mapping[str, Tensor], args: argparse.Namespace
) -> None:
    """Write one rank's file where no reader looks; `publish` makes it visible once every rank has written.

    `tensors` are the rank's shards under the names they get on disk. Any number of processes may write their own rank.
    """
    directory = _unpublished(root, iteration) / _rank_name(tp_rank)
    directory.mkdir(parents=True, exist_ok=True)
    payload = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": iteration or 0,
        "model": {name: _alone(tensor) for name, tensor in tensors.items()},
    }
    _save(directory / RANK_FILE, payload)


def publish(root: Path, iteration: int | None, tp: int) -> Path:
    """Make an iteration visible, in one process after all `tp` ranks wrote: rename it, then the tracker, last.

    Returns the iteration's directory. Raises FileNotFoundError when a rank's file is missing; what an interrupted save
    on another layout left there is removed.
    """
    directory = _unpublished(root, iteration)
    wanted = [_rank_name(rank) for rank in range(tp)]
    for name in wanted:
        if not (directory / name / RANK_FILE).is_file():
            raise FileNotFoundError(f"{directory / name / RANK_FILE} was not written; iteration is not published")
    for found in directory.iterdir():
        if found.name not in wanted:
            shutil.rmtree(found)
    target = root / iteration_name(iteration)
    move_directory(directory, target)
    write_text(root / TRACKER, "release" if iteration is None else str(iteration))
    return target


def _unpublished(root: Path, iteration: int | None) -> Path:
    return root / f".{iteration_name(iteration)}.partial"


def _rank_name(rank: int) -> str:
    return f"mp_rank_{rank:02d}"


def _save(path: Path, payload: dict[str, Any]) -> None:
    """`torch.save`, on the disk when it returns. Raises OSError naming `path` when the disk is full."""
    try:
        with path.open("wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):  # else torch's zip writer only says that it lost its place
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU and in a storage of its own size: torch.save writes the whole storage behind a view."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _rank_files(directory: Path) -> list[Path]:
    """The files of ranks 0, 1, … without a gap."""
    names = sorted(path.name for path in directory.glob("mp_rank_*"))
    for name in names:
        if not re.fullmatch(r"mp_rank_\d{2,}", name):
            raise ValueError(f"{directory / name} is a pipeline or expert shard; only tensor parallelism is read yet")
    ranks = sorted(int(name.removeprefix("mp_rank_")) for name in names)
    for rank in range(max(ranks, default=0) + 1):
        if rank not in ranks:
            raise FileNotFoundError(f"{directory / _rank_name(rank)} does not exist")
    return [directory / _rank_name(rank) / RANK_FILE for rank in ranks]


def _payload(file: Path) -> dict[str, Any]:
    payload = read_pt(file)
    if not isinstance(payload, dict) or not isinstance(payload.get("model"), dict):
        found = ", ".join(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
        raise ValueError(f"{file} holds no dict under 'model' (it holds {found}); it is not an mcore checkpoint")
    return payload


def _check_args(file: Path, args: Any, config: ModelConfig, tp: int) -> None:
    """Raise ValueError where the stored arguments contradict the files found or the architecture wanted."""
    if args is None:
        return  # some converters store none; names and shapes still have to fit
    if not isinstance(args, dict | argparse.Namespace):
        raise ValueError(f"{file}: args is {type(args).__name__}, not a namespace; it is not an mcore checkpoint")
    stored = dict(args if isinstance(args, dict) else vars(args))
    if isinstance(stored.get(_TP), int) and stored[_TP] > tp:
        missing = file.parent.with_name(_rank_name(tp))
        raise FileNotFoundError(f"{missing} does not exist, but {file} was written at tp {stored[_TP]}")
    if stored.get("group_query_attention") is False:
        stored["num_query_groups"] = stored.get("num_attention_heads")
    wanted = {
        _TP: tp,
        "pipeline_model_parallel_size": 1,
        **{name: getattr(config, name) for name in _COMPARED if name in stored},
    }
    if isinstance(stored.get("vocab_size"), int) and stored["vocab_size"] > 0:
        wanted["vocab_size"] = config.vocab_size
    for name, value in wanted.items():
        if isinstance(stored.get(name), int | float) and stored[name] != value:
            origin = "the directory holds" if name.endswith("parallel_size") else "config.json says"
            raise ValueError(f"{file}: args.{name} is {stored[name]}, {origin} {value}")


def _named(file: Path, model: Mapping[str, Any], spelling: Mapping[str, str]) -> dict[str, Tensor]:
    """The rank's tensors under manifest names; `_extra_state` is the only key left out."""
    named: dict[str, Tensor] = {}
    for key, value in model.items():
        if not isinstance(key, str):
            raise ValueError(f"{file}: {key!r} names a tensor, and a name is text; it is not an mcore checkpoint")
        if key.endswith("_extra_state"):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{file}: {key} is {type(value).__name__}, not a tensor")
        name = spelling.get(key, key)
        if name in named:
            raise ValueError(f"{file} holds {name} under both of its names")
        named[name] = value
    return named


def _check_shards(entry: Entry, shards: list[Tensor], files: list[Path]) -> None:
    wanted = shard_shape(entry, len(shards))
    for file, shard in zip(files, shards, strict=True):
        shape = tuple(shard.shape)
        is_padded = entry.shard == "vocab" and shape[1:] == wanted[1:] and shape[0] >= wanted[0]
        if shape != wanted and not (is_padded and shape == tuple(shards[0].shape)):
            raise ValueError(f"{file}: {entry.mcore} has shape {shape}, config.json implies {wanted}")
        if shard.dtype != shards[0].dtype or shard.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{file}: {entry.mcore} is {shard.dtype}; supported is one of fp32, fp16, bf16 on all ranks"
            )
