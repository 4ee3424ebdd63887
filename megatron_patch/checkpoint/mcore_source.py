"""Reading a classic Megatron checkpoint: every rank file of one iteration, whatever its layout and spelling.

The layout is read from the files; what they record in `args` is held against it.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.layouts import join, same_bits, shard_shape
from megatron_patch.checkpoint.mcore import latest_directory, rank_directories
from megatron_patch.checkpoint.megatron_args import check_args, stored_args, stored_size
from megatron_patch.checkpoint.placement import (
    Rank,
    as_cut,
    current_key,
    file_slots,
    rank_name,
    ranks,
    spelling_of,
)
from megatron_patch.checkpoint.unpickle import read_pt
from megatron_patch.config.checkpoint import RANK_FILE
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import EMBEDDING, Entry, check_complete
from megatron_patch.parallel.stages import layer_ranges

_RANK = re.compile(r"mp_rank_(\d{2,5})(?:_(\d{3,5}))?(?:_(\d{3,5}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_GROUPED = re.compile(r"\.mlp\.experts\.(linear_fc[12]\.weight\d+|weight[12])$")
_SECOND = re.compile(r"\.mlp\.experts\..*linear_fc2\.weight\d*$")
_TRANSPOSED = re.compile(r"(.*\.mlp\.experts\.)weight([12])")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Piece:
    """A tensor of a rank file, for messages with the file."""

    file: Path
    tensor: Tensor


@dataclass(frozen=True)
class Stored:
    """A parameter as the files hold it: cut as `entry` says; per shard, its replicas, which are to be equal."""

    entry: Entry
    shards: dict[int, list[Piece]]


@dataclass(frozen=True)
class McoreSource:
    """An open iteration: where each manifest name is stored, memory-mapped."""

    directory: Path
    stored: Mapping[str, Stored]
    target: Target
    format: str = "mcore"

    @property
    def dtype(self) -> torch.dtype:
        """The type of most tensors."""
        return Counter(stored.shards[0][0].tensor.dtype for stored in self.stored.values()).most_common(1)[0][0]

    @property
    def layout(self) -> Mapping[str, int | str]:
        """The sizes into which it is cut, and whose names it has."""
        names = {"transformer_impl": self.target.transformer_impl}
        sizes = self.target.sizes(has_experts=self._has_experts)
        return sizes | names | ({"experts": self.target.experts} if self._has_experts else {})

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The type of `entry`, the same in every file."""
        return self.stored[entry.mcore].shards[0][0].tensor.dtype

    def read(self, entry: Entry) -> Tensor:
        """The full mcore tensor, `entry.shape`, without vocabulary padding."""
        return self.assemble(entry, self.parts(entry))

    def parts(self, entry: Entry) -> list[Tensor]:
        """The mapped shards. Raises ValueError where two files hold different copies of what should be the same."""
        shards = self.stored[entry.mcore].shards
        for first, *replicas in shards.values():
            for replica in replicas:
                if not same_bits(first.tensor, replica.tensor):
                    raise ValueError(f"{first.file} and {replica.file} hold different copies of {entry.mcore}")
        return [shards[number][0].tensor for number in sorted(shards)]

    def assemble(self, entry: Entry, parts: list[Tensor]) -> Tensor:
        """The full tensor of its shards."""
        return join(dataclasses.replace(entry, shard=self.stored[entry.mcore].entry.shard), parts)

    def describe(self) -> str:
        """One phrase for the log."""
        cut = self.target.phrase(has_experts=self._has_experts)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"mcore {self.directory.name}, {cut}, {self.target.transformer_impl} names, {dtype}"

    @property
    def _has_experts(self) -> bool:
        return any(stored.entry.expert is not None for stored in self.stored.values())


@dataclass(frozen=True)
class _RankFile:
    """An open file: `chunks` holds, per virtual chunk, its tensors by the names on disk."""

    path: Path
    args: Any
    chunks: list[Mapping[str, Tensor]]

    def has(self, key: str) -> bool:
        return any(key in chunk for chunk in self.chunks)

    def layer_counts(self) -> list[int]:
        """Layers of each chunk, if they are numbered without a gap."""
        found = [{int(m[1]) for key in chunk if (m := _LAYER.match(key))} for chunk in self.chunks]
        return [max(layers, default=-1) + 1 for layers in found]


def open_mcore(root: Path, entries: list[Entry], config: ModelConfig) -> McoreSource:
    """Open the iteration that the tracker names, on whatever layout it was written.

    Raises ValueError or FileNotFoundError in one sentence, with the path, for a missing tracker or rank, a damaged
    file, an architecture other than `config`, and names, shapes or types other than `entries`.
    """
    directory = latest_directory(root)
    files = _by_rank(_open_files(directory))
    counts = _layer_counts(files)
    target = _found_layout(directory, files, counts, entries, config)
    for file in files.values():
        check_args(file.path, file.args, config, target)
    if sum(map(sum, counts)) != config.num_layers:
        raise ValueError(f"{directory} holds {sum(map(sum, counts))} layers, config.json says {config.num_layers}")
    ranges = layer_ranges(counts)
    stored: dict[str, Stored] = {}
    for rank, file in files.items():
        for entry, piece in _matched(rank, file, entries, config, target, ranges):
            held = stored.setdefault(entry.mcore, Stored(entry, {}))
            _check_alike(held, entry, piece)
            held.shards.setdefault(rank[0] if entry.shard else 0, []).append(piece)
    check_complete((entry.mcore for entry in entries), stored, str(directory))
    return McoreSource(directory, stored, target)


def _open_files(directory: Path) -> dict[tuple[int, ...], _RankFile]:
    """The files by the numbers in their directories' names, all of them equally many."""
    files = {}
    for path in rank_directories(directory):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path} is not a rank's directory: mp_rank_TT, mp_rank_TT_NNN or mp_rank_TT_PPP_EEE")
        files[tuple(int(number) for number in match.groups() if number)] = _open_file(path / RANK_FILE)
    if not files:
        raise FileNotFoundError(f"{directory / 'mp_rank_00'} does not exist")
    if len({(len(numbers), len(file.chunks)) for numbers, file in files.items()}) > 1:
        raise ValueError(f"{directory} mixes the rank files of different layouts; keep one layout per directory")
    return files


def _open_file(path: Path) -> _RankFile:
    payload = read_pt(path)
    held = payload if isinstance(payload, dict) else {type(payload).__name__: None}
    names = [name for name, value in held.items() if re.fullmatch(r"model\d*", str(name)) and isinstance(value, dict)]
    wanted = names if names == ["model"] else [f"model{chunk}" for chunk in range(len(names))]
    if not names or set(names) != set(wanted):
        found = ", ".join(map(str, held))
        raise ValueError(f"{path} holds no dict under 'model', nor under 'model0', 'model1' … (it holds {found})")
    return _RankFile(path, stored_args(path, held), [_tensors(path, held[name]) for name in wanted])


def _tensors(path: Path, model: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the chunk holds; `_extra_state` is the only key left out."""
    nameless = next((key for key in model if not isinstance(key, str)), None)
    if nameless is not None:
        raise ValueError(f"{path}: {nameless!r} names a tensor, and a name is text; it is not an mcore checkpoint")
    tensors = {name: value for name, value in model.items() if not name.endswith("_extra_state")}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is {type(value).__name__}, not a tensor")
    return tensors


def _by_rank(files: dict[tuple[int, ...], _RankFile]) -> dict[Rank, _RankFile]:
    """The files by (tp, pp, ep). One number behind the first counts experts if every file has the embedding."""
    counts_experts = all(file.has(EMBEDDING) for file in files.values())

    def rank(tp: int, *rest: int) -> Rank:
        if len(rest) == 2:
            return tp, *rest
        number = rest[0] if rest else 0
        return (tp, 0, number) if counts_experts else (tp, number, 0)

    return {rank(*numbers): file for numbers, file in files.items()}


def _layer_counts(files: Mapping[Rank, _RankFile]) -> list[list[int]]:
    """Layers by stage and chunk; a stage without a file has none."""
    stages = {stage: file.layer_counts() for (_, stage, _), file in files.items()}
    chunks = len(next(iter(stages.values())))
    return [stages.get(stage, [0] * chunks) for stage in range(max(stages) + 1)]


def _found_layout(
    directory: Path, files: Mapping[Rank, _RankFile], counts: list[list[int]], entries: list[Entry], config: ModelConfig
) -> Target:
    """The layout that the files themselves show. Raises FileNotFoundError for a rank without a file."""
    args = next(iter(files.values())).args
    present = [max(numbers) + 1 for numbers in zip(*files, strict=True)]
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    tp, pp, ep = (max(size, stored_size(args, name)) for size, name in zip(present, names, strict=True))
    if config.num_moe_experts % ep:
        raise ValueError(f"{directory} has {ep} expert-parallel ranks, config.json {config.num_moe_experts} experts")
    keys = [key for file in files.values() for chunk in file.chunks for key in chunk]
    widths = [_expert_width(file, config.num_moe_experts // ep) for file in files.values()]
    target = Target(
        tp=tp,
        pp=pp,
        ep=ep,
        etp=1 if config.moe_ffn_hidden_size in widths else None,
        vp=len(counts[0]),
        first_stage_layers=sum(counts[0]) if pp > 1 else None,
        transformer_impl=spelling_of(keys, entries),
        experts="grouped" if any(_GROUPED.search(key) for key in keys) else "sequential",
    )
    _check_present(directory, files, target)
    return target


def _expert_width(file: _RankFile, local_experts: int) -> int | None:
    """Columns of an expert's second matrix in `file`; None where it holds no expert."""
    for chunk in file.chunks:
        for key, tensor in chunk.items():
            if _SECOND.search(key):
                return tensor.shape[-1]
            if key.endswith(".mlp.experts.weight2"):
                return tensor.shape[0] // max(local_experts, 1)
    return None


def _check_present(directory: Path, files: Mapping[Rank, _RankFile], target: Target) -> None:
    """Raise FileNotFoundError for the first file that is needed and not there.

    Where experts are not cut, Megatron writes fewer files than ranks: each shard and each expert is in some file.
    """
    shards, experts = {(tp, pp) for tp, pp, _ in files}, {(pp, ep) for _, pp, ep in files}
    for rank in ranks(target):
        is_spared = target.expert_tp < target.tp and rank[:2] in shards and rank[1:] in experts
        if rank not in files and not is_spared:
            raise FileNotFoundError(f"{directory / rank_name(target, *rank)} does not exist")


def _matched(
    rank: Rank, file: _RankFile, entries: list[Entry], config: ModelConfig, target: Target, ranges: list[list[range]]
) -> Iterator[tuple[Entry, Piece]]:
    """Each tensor of the file and the entry that it is a shard of, cut as it is here."""
    targets = [dataclasses.replace(target, transformer_impl=spelling) for spelling in ("te", "local")]
    slots = [slot for spelled in targets for slot in file_slots(entries, config, spelled, ranges, *rank[1:])]
    for number, chunk in enumerate(file.chunks):
        by_key = {slot.key: slot.entry for slot in slots if slot.chunk == number}
        tensors = [(current_key(key), tensor) for key, tensor in _apart(file.path, chunk, config, target)]
        names = Counter(by_key[key].mcore if key in by_key else key for key, _ in tensors)
        check_complete({entry.mcore for entry in by_key.values()}, names, str(file.path))
        for name, count in names.items():
            if count > 1:
                raise ValueError(f"{file.path} holds {name} under two of its names")
        for key, tensor in tensors:
            yield _as_stored(by_key[key], tensor, targets, file.path), Piece(file.path, tensor)


def _apart(
    path: Path, chunk: Mapping[str, Tensor], config: ModelConfig, target: Target
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `chunk`; experts that Megatron-Core's first grouped layer kept in one matrix come one by one.

    Its weight1 is (experts, hidden, 2·ffn) in memory and its weight2 (experts, ffn, hidden), though their shapes say
    (hidden, experts·2·ffn) and (experts·ffn, hidden).
    """
    for key, tensor in chunk.items():
        match = _TRANSPOSED.fullmatch(key)
        if match is None:
            yield key, tensor
            continue
        experts = config.num_moe_experts // target.ep
        rows, columns = (config.hidden_size, -1) if match[2] == "1" else (-1, config.hidden_size)
        if not experts or tensor.numel() % (experts * config.hidden_size):
            raise ValueError(f"{path}: {key} of shape {tuple(tensor.shape)} does not divide into {experts} experts")
        for expert, matrix in enumerate(tensor.view(experts, rows, columns)):
            yield f"{match[1]}linear_fc{match[2]}.weight{expert}", matrix.t()


def _as_stored(entry: Entry, tensor: Tensor, targets: list[Target], path: Path) -> Entry:
    """`entry` with the shard that explains the tensor's shape."""
    shape, implied = tuple(tensor.shape), []
    for target in targets:
        cut = as_cut(entry, target)
        implied.append(shard_shape(cut, target.tp))
        is_padded = entry.shard == "vocab" and shape[1:] == implied[-1][1:] and shape[0] > implied[-1][0]
        if shape == implied[-1] or is_padded:
            return cut
    raise ValueError(f"{path}: {entry.mcore} has shape {shape}, config.json implies {implied[0]}")


def _check_alike(held: Stored, entry: Entry, piece: Piece) -> None:
    """Raise ValueError unless `piece` has a supported type and the type, height and cut of the pieces before it."""
    tensor = piece.tensor
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{piece.file}: {entry.mcore} is {tensor.dtype}; supported are fp32, fp16 and bf16")
    first = next(iter(held.shards.values()), [piece])[0]
    if (tensor.dtype, tensor.shape, entry) != (first.tensor.dtype, first.tensor.shape, held.entry):
        kinds = [f"{one.tensor.dtype} {tuple(one.tensor.shape)}" for one in (first, piece)]
        raise ValueError(f"{entry.mcore} is {kinds[0]} in {first.file}, but {kinds[1]} in {piece.file}")
