"""How Hugging Face tensors become one mcore tensor, and how tensor parallelism cuts it.

`merge`/`split` and `cut`/`join` are pairs of exact inverses; nothing here touches a file or a process group.
"""

import torch
from torch import Tensor

from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry


def part_shapes(entry: Entry, config: ModelConfig) -> list[tuple[int, ...]]:
    """Full shape of each Hugging Face tensor of `entry`, in the order of `entry.hf`."""
    rows, *rest = entry.shape
    if entry.layout == "copy":
        return [entry.shape]
    if entry.layout == "gate_up":
        return [(rows // 2, *rest)] * 2
    if entry.layout == "qkv":
        query, key = config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels
        return [(query, *rest), (key, *rest), (key, *rest)]
    raise ValueError(_unknown_layout(entry))


def merge(entry: Entry, parts: list[Tensor], config: ModelConfig) -> Tensor:
    """The mcore tensor (full, `entry.shape`) of the Hugging Face `parts`, which come in the order of `entry.hf`.

    qkv: per query group its query heads, then its key head, then its value head. gate_up: gate rows, then up rows.
    """
    if entry.layout == "copy":
        return parts[0]
    if entry.layout == "gate_up":
        return torch.cat(parts)
    if entry.layout == "qkv":
        grouped = [part.unflatten(0, (config.num_query_groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    raise ValueError(_unknown_layout(entry))


def split(entry: Entry, whole: Tensor, config: ModelConfig) -> list[Tensor]:
    """The Hugging Face parts of the full mcore tensor `whole`: the inverse of `merge`. Parts may be views."""
    if entry.layout == "copy":
        return [whole]
    if entry.layout == "gate_up":
        return list(whole.chunk(2))
    if entry.layout == "qkv":
        groups = config.num_query_groups
        widths = [shape[0] // groups for shape in part_shapes(entry, config)]
        return [part.flatten(0, 1) for part in whole.unflatten(0, (groups, -1)).split(widths, dim=1)]
    raise ValueError(_unknown_layout(entry))


def check_divides(entry: Entry, config: ModelConfig, size: int) -> None:
    """Raise ValueError unless `size` tensor-parallel ranks get equal shares of `entry`, in whole query groups."""
    if entry.layout == "qkv" and config.num_query_groups % size:
        raise ValueError(f"{entry.mcore} has {config.num_query_groups} query groups, which tp {size} does not divide")
    shard_shape(entry, size)


def shard_shape(entry: Entry, size: int) -> tuple[int, ...]:
    """Shape of one of `size` shards; vocabulary rows are rounded up. ValueError when another cut does not divide."""
    shape = list(entry.shape)
    if entry.shard == "vocab":
        shape[0] = -(-shape[0] // size)
    elif entry.shard is not None:
        dim, blocks = _cut_dimension(entry)
        if shape[dim] % (blocks * size):
            raise ValueError(f"{entry.mcore}: {shape[dim] // blocks} is not divisible by tp {size} (dimension {dim})")
        shape[dim] //= size
    return tuple(shape)


def cut(entry: Entry, whole: Tensor, rank: int, size: int) -> Tensor:
    """Rank `rank`'s shard of the full mcore tensor `whole`, possibly a view.

    A gate_up shard is [gate_r; up_r]. Vocabulary shards are padded with zero rows to equal height. ValueError when
    `size` does not divide; that a qkv shard holds whole query groups is `check_divides`'s to say.
    """
    shape = shard_shape(entry, size)
    if entry.shard is None or (size == 1 and whole.shape == shape):
        return whole
    if entry.shard == "vocab":
        rows = whole[rank * shape[0] : (rank + 1) * shape[0]]
        return torch.cat([rows, rows.new_zeros(shape[0] - len(rows), *shape[1:])]) if len(rows) < shape[0] else rows
    dim, blocks = _cut_dimension(entry)
    pieces = [block.chunk(size, dim)[rank] for block in whole.chunk(blocks, dim)]
    return pieces[0] if blocks == 1 else torch.cat(pieces, dim)


def join(entry: Entry, shards: list[Tensor]) -> Tensor:
    """The full mcore tensor of one shard per rank: the inverse of `cut`. Vocabulary padding is stripped.

    Raises ValueError when replicas of an uncut tensor differ.
    """
    if entry.shard is None:
        differing = [rank for rank, shard in enumerate(shards) if not same_bits(shard, shards[0])]
        if differing:
            raise ValueError(f"{entry.mcore} is replicated, but tensor-parallel ranks 0 and {differing[0]} differ")
        return shards[0]
    if entry.shard == "vocab":
        return (shards[0] if len(shards) == 1 else torch.cat(shards))[: entry.shape[0]]
    if len(shards) == 1:
        return shards[0]
    dim, blocks = _cut_dimension(entry)
    pieces = [shard.chunk(blocks, dim) for shard in shards]
    return torch.cat([piece[block] for block in range(blocks) for piece in pieces], dim)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, so that a NaN equals itself and 0.0 differs from -0.0."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return one.dtype == other.dtype and torch.equal(one.view(bits), other.view(bits))


def _cut_dimension(entry: Entry) -> tuple[int, int]:
    """The dimension that is cut, and how many blocks along it are cut separately."""
    if entry.shard == "row":
        return 1, 1
    if entry.shard == "column":
        return 0, 2 if entry.layout == "gate_up" else 1
    raise ValueError(f"{entry.mcore}: shard {entry.shard!r} is none of column, row, vocab")


def _unknown_layout(entry: Entry) -> str:
    return f"{entry.mcore}: layout {entry.layout!r} is none of copy, qkv, gate_up"
