"""Reading Megatron-LM's legacy checkpoints: every rank file of one iteration, whatever its layout and spelling.

The layout is read from the files; what they record in `args` is held against it.
"""

import argparse
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.layouts import join, same_bits, shard_shape
from megatron_patch.checkpoint.mcore import latest_directory, rank_directories
from megatron_patch.checkpoint.megatron_args import check_args, stored_args
from megatron_patch.checkpoint.placement import Rank
from megatron_patch.checkpoint.spellings import ENCODER, SPELLINGS, ZEROS, Item, Spelling, items
from megatron_patch.checkpoint.unpickle import read_pt
from megatron_patch.config.checkpoint import RANK_FILE
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry, check_complete

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_LAYER = re.compile(re.escape(ENCODER) + r"layers\.(\d+)\.")

File = Mapping[str, Tensor]  # a rank's memory-mapped tensors by dotted key


@dataclass(frozen=True)
class Place:
    """Where an entry lives: shard `index` of `item`, in the files of `stage` and of every one of `ep_ranks`."""

    item: Item
    index: int
    stage: int
    ep_ranks: tuple[int, ...]


@dataclass(frozen=True)
class LegacySource:
    """An open iteration: every rank's file, and every entry's place in them."""

    directory: Path
    format: str
    target: Target
    files: Mapping[Rank, File]
    places: Mapping[str, Place]

    @property
    def dtype(self) -> torch.dtype:
        """The type of most tensors."""
        return Counter(tensor.dtype for tensor in self.files[0, 0, 0].values()).most_common(1)[0][0]

    @property
    def layout(self) -> Mapping[str, int | str]:
        """The sizes into which it is cut; its names are its format's own."""
        return self.target.sizes(has_experts=self._has_experts)

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The type of `entry`, the same in every file."""
        place = self.places[entry.mcore]
        return self.files[0, place.stage, place.ep_ranks[0]][place.item.keys[0]].dtype

    def read(self, entry: Entry) -> Tensor:
        """The full mcore tensor, `entry.shape`. Raises ValueError where replicas differ."""
        return self.assemble(entry, self.parts(entry))

    def parts(self, entry: Entry) -> list[Tensor]:
        """The stored tensors; those that are not made of the entry's rows are put together first."""
        place = self.places[entry.mcore]
        stored = list(self._stored(place))
        if place.item.packing.moves_rows:
            return [part for parts in stored for part in parts]
        return [_joined(place, entry.shape, stored)]

    def assemble(self, entry: Entry, parts: list[Tensor]) -> Tensor:
        """The full tensor of `parts`."""
        place = self.places[entry.mcore]
        if not place.item.packing.moves_rows:
            return parts[0]
        count = len(place.item.keys)
        return _joined(place, entry.shape, [parts[start : start + count] for start in range(0, len(parts), count)])

    def check_optional(self, place: Place) -> None:
        """Raise ValueError where a copy, or a tensor that must be zero, is there and is not what it should be."""
        (key,), (entry,) = place.item.keys, place.item.entries
        if not all(key in self.files[rank] for rank in self._ranks(place)):
            return
        if place.item.packing is ZEROS and any(self.files[rank][key].any() for rank in self._ranks(place)):
            raise ValueError(f"{self.directory}: {key} is not zero, and no other format has a place for it")
        if place.item.is_copy:
            copy = _joined(place, entry.shape, list(self._stored(place)))
            if not same_bits(copy, self.read(entry)):
                raise ValueError(f"{self.directory}: {key} differs from {entry.mcore}, which it must repeat")

    def describe(self) -> str:
        """One phrase for the log."""
        cut = self.target.phrase(has_experts=self._has_experts)
        return f"{self.format} {self.directory.name}, {cut}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def _has_experts(self) -> bool:
        return any(entry.expert is not None for place in self.places.values() for entry in place.item.entries)

    def _ranks(self, place: Place) -> list[Rank]:
        return [(tp_rank, place.stage, ep_rank) for tp_rank in range(self.target.tp) for ep_rank in place.ep_ranks]

    def _stored(self, place: Place) -> Iterator[list[Tensor]]:
        """The parts of each shard, once its replicas are found to be equal."""
        ranks, copies = self._ranks(place), len(place.ep_ranks)
        if place.item.entries[place.index].shard is None:
            copies *= self.target.tp
        for start in range(0, len(ranks), copies):
            first = self._parts(place, ranks[start])
            for rank in ranks[start + 1 : start + copies]:
                if not all(map(same_bits, first, self._parts(place, rank))):
                    name = place.item.entries[place.index].mcore
                    raise ValueError(
                        f"{self.directory}: ranks {ranks[start]} and {rank} hold different copies of {name}"
                    )
            yield first

    def _parts(self, place: Place, rank: Rank) -> list[Tensor]:
        return place.item.parts([self.files[rank][key] for key in place.item.keys], place.index)


def _joined(place: Place, shape: tuple[int, ...], stored: list[list[Tensor]]) -> Tensor:
    shards = [place.item.packing.whole(parts) for parts in stored]
    return join(replace(place.item.entries[place.index], shape=shape), shards)


def spelling_of(directory: Path) -> Spelling | None:
    """How the checkpoint in `directory` is spelled; None when it is not a legacy one, or cannot be read."""
    try:
        file = min(latest_directory(directory).glob(f"mp_rank_*/{RANK_FILE}"), default=None)
        keys = [] if file is None else [key for key, _ in _leaves(_payload(file)["model"])]
    except (ValueError, OSError):
        return None
    if not any(key.startswith("language_model.") for key in keys):
        return None
    return next((spelling for spelling in SPELLINGS if any(spelling.marker in key for key in keys)), None)


def open_legacy(spelling: Spelling, root: Path, entries: list[Entry], config: ModelConfig) -> LegacySource:
    """Open the iteration that the tracker names.

    Raises ValueError or FileNotFoundError in one sentence for a missing rank, a damaged file, an architecture other
    than `config`, names, shapes or types other than `entries`, and copies that differ from what they repeat.
    """
    directory = latest_directory(root)
    paths = _rank_paths(directory, spelling)
    payloads = {rank: _payload(path) for rank, path in paths.items()}
    files = {rank: _tensors(paths[rank], payload["model"]) for rank, payload in payloads.items()}
    sizes = {name: 1 + max(rank[axis] for rank in paths) for axis, name in enumerate(("tp", "pp", "ep"))}
    target = Target(**sizes, etp=1 if spelling.expert_first else None)
    for rank, payload in payloads.items():
        _check_payload(paths[rank], payload, spelling, config, target)
    if target.ep > 1 and (not config.num_moe_experts or config.num_moe_experts % target.ep):
        raise ValueError(f"{directory} holds {target.ep} shares of {config.num_moe_experts} experts; one is missing")
    places: dict[str, Place] = {}
    optional = []
    stages = _stages(directory, files, target, config)
    target = replace(target, first_stage_layers=len(stages[0]) if target.pp > 1 else None)
    for stage, layers in enumerate(stages):
        for ep_rank in range(target.ep):
            found = items(spelling, entries, config, target, layers, ep_rank)
            for tp_rank in range(target.tp):
                rank = tp_rank, stage, ep_rank
                _check_file(paths[rank], files[rank], found, target)
                _check_alike(paths, files, rank)
            for item in found:
                if item.is_optional:
                    optional.append(Place(item, 0, stage, (ep_rank,)))
                else:
                    places |= _places(places, item, stage, ep_rank)
    source = LegacySource(directory, spelling.format, target, files, places)
    for place in optional:
        source.check_optional(place)
    return source


def _payload(path: Path) -> dict[str, Any]:
    payload = read_pt(path)
    if not isinstance(payload, dict) or not isinstance(payload.get("model"), dict):
        raise ValueError(f"{path} holds no dict under 'model'; interleaved pipelines of legacy formats are not read")
    return payload


def _tensors(path: Path, tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor under its dotted key; `_extra_state` is the only thing left out."""
    found: dict[str, Tensor] = {}
    for key, value in _leaves(tree):
        if isinstance(value, Tensor):
            found[key] = value
        elif not key.endswith("_extra_state"):
            raise ValueError(f"{path}: {key} is {type(value).__name__}, not a tensor")
    return found


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_payload(
    path: Path, payload: Mapping[str, Any], spelling: Spelling, config: ModelConfig, target: Target
) -> None:
    version = payload.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 2:
        raise ValueError(f"{path} has checkpoint_version {version!r}, which orders QKV otherwise; 2.0 and 3.0 are read")
    args = stored_args(path, payload)
    if args is not None and spelling.expert_first:  # its expert-parallel ranks are the data-parallel ones
        args = argparse.Namespace(**{**vars(args), "expert_model_parallel_size": None})
    check_args(path, args, config, target)


def _rank_paths(directory: Path, spelling: Spelling) -> dict[Rank, Path]:
    """The file of every rank. Raises FileNotFoundError for a gap, ValueError for a name that is none."""
    found: dict[tuple[int, ...], Path] = {}
    for path in rank_directories(directory):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path} is no rank's directory; they are called mp_rank_TT, mp_rank_TT_PPP, and so on")
        if not (path / RANK_FILE).is_file():
            raise FileNotFoundError(f"{path / RANK_FILE} does not exist")
        found[tuple(int(number) for number in match.groups() if number)] = path / RANK_FILE
    if len({len(numbers) for numbers in found}) != 1:
        raise ValueError(f"{directory} holds no rank's directory, or those of several layouts; keep one layout's")
    expert_at = _expert_position(found, spelling)
    paths = {}
    for numbers, path in found.items():
        others = list(numbers[1:])
        ep_rank = others.pop(expert_at) if expert_at is not None else 0
        paths[numbers[0], others[0] if others else 0, ep_rank] = path
    for rank in itertools.product(*(range(1 + max(rank[axis] for rank in paths)) for axis in range(3))):
        if rank not in paths:
            raise FileNotFoundError(f"{directory} lacks the file of tensor, pipeline and expert rank {rank}")
    return paths


def _expert_position(found: Mapping[tuple[int, ...], Path], spelling: Spelling) -> int | None:
    """Which of the numbers behind the tensor-parallel one counts experts.

    A lone one does not tell by its name: expert-parallel files all hold the embedding, later stages do not.
    """
    last = max(found)
    if len(last) == 3:
        return 0 if spelling.expert_first else 1
    if len(last) == 1:
        return None
    keys = _tensors(found[last], _payload(found[last])["model"])
    return 0 if any("embedding.word_embeddings." in key for key in keys) else None


def _stages(directory: Path, files: Mapping[Rank, File], target: Target, config: ModelConfig) -> list[range]:
    """The global layers of each stage, whose files count theirs from 0."""
    counts = [
        len({match[1] for key in files[0, stage, 0] if (match := _LAYER.match(key))}) for stage in range(target.pp)
    ]
    if sum(counts) != config.num_layers:
        raise ValueError(f"{directory} holds {sum(counts)} layers, config.json says {config.num_layers}")
    stops = list(itertools.accumulate(counts))
    return [range(stop - count, stop) for count, stop in zip(counts, stops, strict=True)]


def _places(places: Mapping[str, Place], item: Item, stage: int, ep_rank: int) -> dict[str, Place]:
    known = {entry.mcore: places[entry.mcore].ep_ranks for entry in item.entries if entry.mcore in places}
    return {
        entry.mcore: Place(item, index, stage, (*known.get(entry.mcore, ()), ep_rank))
        for index, entry in enumerate(item.entries)
    }


def _check_file(path: Path, file: File, found: list[Item], target: Target) -> None:
    optional = {key for item in found if item.is_optional for key in item.keys}
    wanted = [key for item in found if not item.is_optional for key in item.keys]
    check_complete(wanted, (key for key in file if key not in optional), str(path))
    for item in found:
        shard = torch.empty(shard_shape(item.entries[0], target.tp), device="meta")
        for key, part in zip(item.keys, item.packing.parts, strict=True):
            if key in file:
                shape = item.shape(tuple(part(shard).shape))
                _check_tensor(path, key, file[key], shape, is_padded=item.entries[0].shard == "vocab")
        if len({file[key].dtype for key in item.keys if key in file}) > 1:
            raise ValueError(f"{path}: {', '.join(item.keys)} become one tensor but differ in dtype")


def _check_alike(paths: Mapping[Rank, Path], files: Mapping[Rank, File], rank: Rank) -> None:
    """Raise ValueError unless this rank's shards are of the type and size that the first tensor-parallel rank's are."""
    first = (0, *rank[1:])
    for key, tensor in files[rank].items():
        other = files[first].get(key, tensor)
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            kinds = [f"{one.dtype} {tuple(one.shape)}" for one in (other, tensor)]
            raise ValueError(f"{key} is {kinds[0]} in {paths[first]}, but {kinds[1]} in {paths[rank]}")


def _check_tensor(path: Path, key: str, tensor: Tensor, wanted: tuple[int, ...], *, is_padded: bool) -> None:
    shape = tuple(tensor.shape)
    if shape != wanted and not (is_padded and shape[1:] == wanted[1:] and shape[0] >= wanted[0]):
        raise ValueError(f"{path}: {key} has shape {shape}, config.json implies {wanted}")
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{path}: {key} is {tensor.dtype}; supported are fp32, fp16 and bf16")
