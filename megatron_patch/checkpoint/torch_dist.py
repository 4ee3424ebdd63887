"""Megatron-Core's distributed checkpoint, `torch_dist`: one global tensor per parameter, whatever the layout.

Where all layers are alike, a parameter of theirs is one tensor with a leading layer axis; experts add an axis behind
it. Where dense and MoE layers alternate, each layer has names of its own. Since 0.14 Megatron-Core can write every
layer, every expert and each half of a SwiGLU under its own name (`singleton_local_shards`); that is read too.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_patch.checkpoint.atomic import write_text
from megatron_patch.checkpoint.disk import named_errors
from megatron_patch.checkpoint.distcp import (
    DATA,
    BlankBox,
    Box,
    Part,
    Stored,
    boxes_by_position,
    lay_out,
    map_part,
    read_index,
    resolve_parts,
)
from megatron_patch.checkpoint.interface import Source, Target, Written
from megatron_patch.checkpoint.mcore import iteration_name, latest_directory
from megatron_patch.checkpoint.megatron_args import check_architecture, megatron_args, stored_args
from megatron_patch.checkpoint.stream import Piece, fill
from megatron_patch.checkpoint.stream import Place as FilePlace
from megatron_patch.checkpoint.unpickle import read_pt
from megatron_patch.config.checkpoint import TRACKER
from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry, check_complete

COMMON, CONTENT = "common.pt", "metadata.json"
_CONTENT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_LAYERS, _EXPERTS = "decoder.layers.", "mlp.experts.local_experts."
_OPTIMIZER = ("optimizer.", "chained_")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What `--transformer-impl local` is called here, other than in a classic checkpoint: with grouped-query attention it
# borrows Transformer Engine's names, for the MoE norm even where that has another; with latent attention it does not.
_LOCAL_GROUPED = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
_LOCAL_LATENT = {
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}


@dataclass(frozen=True)
class Naming:
    """What makes the names of one checkpoint differ from another's."""

    transformer_impl: str | None  # te | local; None: both would have these names
    is_stacked: bool  # layers are an axis
    is_singleton: bool  # experts and the halves of a SwiGLU have names of their own


@dataclass(frozen=True)
class Place:
    """All of an entry, or one half of it: a position along the leading axes, of these `sizes`, of a global tensor."""

    name: str
    position: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TorchDistSource:
    """An open iteration: the parts that make up each manifest name, in order."""

    directory: Path
    stored: Mapping[str, tuple[Part, ...]]
    transformer_impl: str | None
    format: str = "torch_dist"

    @property
    def dtype(self) -> torch.dtype:
        """The type of most tensors."""
        return Counter(parts[0].dtype for parts in self.stored.values()).most_common(1)[0][0]

    @property
    def layout(self) -> Mapping[str, int | str]:
        """Tensors are whole; whose names they have shows only where Megatron-Core's two implementations differ."""
        return {"transformer_impl": self.transformer_impl} if self.transformer_impl else {}

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The type of `entry`."""
        return self.stored[entry.mcore][0].dtype

    def parts(self, entry: Entry) -> list[Tensor]:
        """What lies in each box, without the axes of layers and experts. Raises ValueError for a damaged one."""
        parts = map(map_part, self.stored[entry.mcore])
        return [part[(0,) * (part.dim() - len(entry.shape))] for part in parts]

    def assemble(self, entry: Entry, parts: list[Tensor]) -> Tensor:
        """Joined along the axis that cuts it: the boxes of a half, and the halves."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim=0 if sum(map(len, parts)) == entry.shape[0] else 1)

    def read(self, entry: Entry) -> Tensor:
        """The full mcore tensor, `entry.shape`, without vocabulary padding."""
        return self.assemble(entry, self.parts(entry))

    def describe(self) -> str:
        """One phrase for the log."""
        dtype = str(self.dtype).removeprefix("torch.")
        names = f"{self.transformer_impl} names, " if self.transformer_impl else ""
        return f"torch_dist {self.directory.name}, {names}{dtype}"


def open_torch_dist(root: Path, entries: list[Entry], config: ModelConfig) -> TorchDistSource:
    """Open the iteration that the tracker names. An optimizer's state and objects that are no tensors are not read.

    Raises ValueError or FileNotFoundError in one sentence, with the path, for a missing or damaged file, an
    architecture other than `config`, and names, shapes or types other than `entries`.
    """
    directory = latest_directory(root)
    common = read_pt(directory / COMMON)
    if isinstance(common, dict):
        check_architecture(directory / COMMON, stored_args(directory / COMMON, common), config)
    index = {name: stored for name, stored in read_index(directory).items() if not name.startswith(_OPTIMIZER)}
    naming = _found_naming(index, entries, config)
    wanted = {entry.mcore: places(entry, config, naming) for entry in entries}
    axes = {place.name: len(place.sizes) for found in wanted.values() for place in found}
    check_complete(list(axes), index, str(directory))
    for entry in entries:
        for place in wanted[entry.mcore]:
            _check_shape(directory, entry, place, index[place.name])
    boxes = {name: boxes_by_position(index[name], count) for name, count in axes.items()}
    stored = {
        name: tuple(part for place in found for part in _parts(directory, place, index[place.name].dtype, boxes))
        for name, found in wanted.items()
    }
    return TorchDistSource(directory, stored, naming.transformer_impl)


def write_torch_dist(
    directory: Path, entries: list[Entry], config: ModelConfig, source: Source, target: Target
) -> Written:
    """Write `directory`/release under the names of `target.transformer_impl`, and the tracker.

    Megatron loads it on any layout and pads the vocabulary itself. Raises ValueError where layers differ in type.
    """
    release = directory / iteration_name(None)
    release.mkdir()
    naming = Naming(target.transformer_impl, is_stacked(config), is_singleton=False)
    placed = [(entry, place) for entry in entries for place in places(entry, config, naming)]
    shapes = {place.name: place.sizes + place.shape for _, place in placed}
    boxes = (BlankBox(place.name, *_extent(place), source.dtype_of(entry)) for entry, place in placed)
    offsets = lay_out(release, shapes, boxes, extra_states([place for _, place in placed], naming))
    pieces = [Piece(entry, entry.shape, _as_it_is) for entry, _ in placed]
    written = fill([FilePlace(release / DATA, *place) for place in zip(offsets, pieces, strict=True)], source)
    _write_common(release / COMMON, config, source.dtype, target)
    write_text(release / CONTENT, json.dumps(_CONTENT))
    write_text(directory / TRACKER, "release")
    return written


def _as_it_is(entry: Entry, whole: Tensor) -> Tensor:
    return whole


def is_stacked(config: ModelConfig) -> bool:
    """Whether Megatron-Core gives this model's layers one axis: they are all of one kind."""
    return len({config.is_moe_layer(layer) for layer in range(config.num_layers)}) == 1


def places(entry: Entry, config: ModelConfig, naming: Naming) -> list[Place]:
    """Where `entry` lies: one place, or the two of gate and up."""
    name, position, sizes = entry.mcore, (), ()
    if entry.layer is not None:
        behind = name.removeprefix(f"{_LAYERS}{entry.layer}.")
        if naming.transformer_impl == "local":
            behind = (_LOCAL_LATENT if config.is_mla else _LOCAL_GROUPED).get(behind, behind)
        if naming.is_stacked:
            name, position, sizes = f"{_LAYERS}{behind}", (entry.layer,), (config.num_layers,)
        else:
            name = f"{_LAYERS}{entry.layer}.{behind}"
    if entry.expert is not None:
        numbered = f"{entry.expert}." if naming.is_singleton else ""
        name = name.replace(f"{_EXPERTS}{entry.expert}.", f"mlp.experts.experts.{numbered}")
        if not naming.is_singleton:
            position, sizes = (*position, entry.expert), (*sizes, config.num_moe_experts)
    if entry.layout == "gate_up" and naming.is_singleton:
        half = (entry.shape[0] // 2, *entry.shape[1:])
        return [Place(f"{name}_{part}", position, sizes, half) for part in "wv"]
    return [Place(name, position, sizes, entry.shape)]


def extra_states(placed: list[Place], naming: Naming) -> list[str]:
    """Names of the empty `_extra_state` that Megatron-Core misses where a module has none.

    Modules without Transformer Engine have one per linear layer; with it, norms and attention have one too.
    """
    modules = {}
    for place in placed:
        module, weight = place.name.rpartition(".")[::2]
        kind = module.rpartition(".")[2]
        if weight == "weight" and (kind.startswith("linear_") or (naming.transformer_impl == "te" and "norm" in kind)):
            modules[module, place.position] = place.sizes
        if kind == "linear_proj" and naming.transformer_impl == "te":
            modules[module.removesuffix(kind) + "core_attention", place.position] = place.sizes
    return [f"{module}._extra_state/shard_{_dotted(at)}_{_dotted(of, 1)}" for (module, at), of in modules.items()]


def _dotted(numbers: tuple[int, ...], without_axes: int = 0) -> str:
    return ".".join(map(str, numbers or (without_axes,)))


def _found_naming(index: Mapping[str, Stored], entries: list[Entry], config: ModelConfig) -> Naming:
    """The naming that most of the stored names are of."""
    is_layered = any(name.removeprefix(_LAYERS)[:1].isdigit() for name in index if name.startswith(_LAYERS))
    is_singleton = any(name.endswith("_w") for name in index)

    def known(implementation: str) -> int:
        naming = Naming(implementation, not is_layered, is_singleton)
        return sum(place.name in index for entry in entries for place in places(entry, config, naming))

    te, local = known("te"), known("local")
    implementation = None if te == local else "te" if te > local else "local"
    return Naming(implementation, not is_layered, is_singleton)


def _check_shape(directory: Path, entry: Entry, place: Place, stored: Stored) -> None:
    wanted = place.sizes + place.shape
    is_padded = entry.shard == "vocab" and stored.shape[1:] == wanted[1:] and stored.shape[:1] > wanted[:1]
    if stored.shape != wanted and not is_padded:
        raise ValueError(f"{directory}: {place.name} has shape {stored.shape}, config.json implies {wanted}")
    if stored.dtype not in _DTYPES:
        raise ValueError(f"{directory}: {place.name} is {stored.dtype}; supported are fp32, fp16 and bf16")


def _parts(
    directory: Path, place: Place, dtype: torch.dtype, boxes: Mapping[str, Mapping[tuple[int, ...], list[Box]]]
) -> tuple[Part, ...]:
    try:
        return resolve_parts(boxes[place.name].get(place.position, ()), dtype, *_extent(place))
    except ValueError as error:
        raise ValueError(f"{directory}: {place.name}: {error}") from None


def _extent(place: Place) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First element and extent of a place along every axis of its tensor."""
    return place.position + (0,) * len(place.shape), (1,) * len(place.position) + place.shape


def _write_common(path: Path, config: ModelConfig, dtype: torch.dtype, target: Target) -> None:
    args = megatron_args(config, Target(transformer_impl=target.transformer_impl), dtype)
    payload = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    with named_errors(path), path.open("wb") as file:
        torch.save(payload | {"content_metadata": {"singleton_local_shards": False}}, file)
        file.flush()
        os.fsync(file.fileno())
