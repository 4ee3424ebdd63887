"""What this rank holds of every parameter, as boxes of the whole: what it saves, and what it reads back."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_patch.checkpoint.dcp_boxes import Box, Extent, piece_boxes, shard_region
from megatron_patch.checkpoint.dcp_source import read_region
from megatron_patch.checkpoint.distcp import Stored
from megatron_patch.families.manifest import EMBEDDING, Entry
from megatron_patch.parallel.mesh import Axis, Mesh
from megatron_patch.weights.parameters import local, parameter_name, shard_axis


@dataclass(frozen=True)
class Piece:
    """This rank's part of an entry. Of the `copies` that ranks hold of it, this is number `copy`."""

    entry: Entry
    parameter: nn.Parameter
    slot: int | None  # which of the rank's experts, where they share the parameter
    boxes: tuple[Box, ...]
    copy: int
    copies: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece in the parameter, or in a tensor that is spread as the parameter is; a view."""
        held = local(tensor)
        return held if self.slot is None else held[self.slot]

    def is_written_here(self, number: int) -> bool:
        """Whether this copy is the one to save: the ranks that have one take turns with the `number` of the entry."""
        return number % self.copies == self.copy


def pieces(parameters: Mapping[str, nn.Parameter], entries: Iterable[Entry], mesh: Mesh) -> Iterator[tuple[int, Piece]]:
    """This rank's pieces with their entry's number; `parameters` as `named_parameters` gives them before a forward.

    An FSDP module that has run holds other tensors until it is told to shard them again.
    """
    regions = {name: _region(parameter) for name, parameter in parameters.items()}
    for number, entry in enumerate(entries):
        name, axis = parameter_name(entry), shard_axis(entry, mesh)
        if name not in parameters:
            continue
        start, shape = regions[name]
        slot = None
        if entry.expert is not None:
            slot = entry.expert - mesh.ep.rank * len(parameters[name]) - start[0]
            if not 0 <= slot < shape[0]:
                continue
            start, shape = start[1:], shape[1:]
        boxes = tuple(piece_boxes(entry, axis.rank, axis.size, start, shape))
        yield number, Piece(entry, parameters[name], slot, boxes, *_copy(entry, parameters[name], mesh))


def is_second_copy(entry: Entry, mesh: Mesh) -> bool:
    """Whether the first pipeline stage holds the same: tied embeddings stand at both ends."""
    return entry.mcore == EMBEDDING and not mesh.is_first_stage


def read_piece(piece: Piece, tensor: Tensor, index: Mapping[str, Stored], name: str) -> None:
    """Fill the piece of `tensor`, which is spread as its parameter is, from wherever `name` is stored.

    Rows that pad the vocabulary become zeros.
    """
    values = piece.of(tensor)
    if sum(math.prod(box.shape) for box in piece.boxes) != values.numel():
        values.zero_()
    for box in piece.boxes:
        read_region(name, index[name], box.start, values[box.local])


def _region(parameter: Tensor) -> tuple[Extent, Extent]:
    """Where the local piece of a parameter lies in the whole that its data-parallel ranks share."""
    if not isinstance(parameter, DTensor):
        return (0,) * parameter.dim(), tuple(parameter.shape)
    sizes, ranks = parameter.device_mesh.shape, parameter.device_mesh.get_coordinate()
    cuts = [(p.dim, ranks[i], sizes[i]) for i, p in enumerate(parameter.placements) if p.is_shard()]
    region = shard_region(parameter.shape, cuts)
    assert region[1] == tuple(parameter.to_local().shape), f"{parameter.placements} are not cut as torch.chunk cuts"
    return region


def _copy(entry: Entry, parameter: Tensor, mesh: Mesh) -> tuple[int, int]:
    """Which copy this rank holds, of how many: over data-parallel replicas, and over tp of what tp does not cut."""
    axes: Sequence[tuple[int, int]]
    if isinstance(parameter, DTensor):
        sizes, ranks = parameter.device_mesh.shape, parameter.device_mesh.get_coordinate()
        axes = [(ranks[i], sizes[i]) for i, p in enumerate(parameter.placements) if p.is_replicate()]
    else:
        axes = [_position(mesh.dp_cp if entry.expert is None else mesh.edp)]
    if entry.shard is None:
        axes = [*axes, _position(shard_axis(entry, mesh))]
    copy, copies = 0, 1
    for rank, size in axes:
        copy, copies = copy * size + rank, copies * size
    return copy, copies


def _position(axis: Axis) -> tuple[int, int]:
    return axis.rank, axis.size
