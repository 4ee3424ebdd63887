"""What every checkpoint format offers and is asked for: a Source to read, a Target to write, a Format to list."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_patch.config.model import ModelConfig
from megatron_patch.families.manifest import Entry


class Source(Protocol):
    """An open checkpoint. Names, shapes and types were held against the manifest when it was opened."""

    format: str

    @property
    def dtype(self) -> torch.dtype:
        """The type of most tensors."""

    @property
    def layout(self) -> Mapping[str, int | str]:
        """How it is cut and named, by Target's fields (`tp`, `experts` …), as far as its files can tell."""

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The type that `read` returns."""

    def read(self, entry: Entry) -> Tensor:
        """The full mcore tensor, `entry.shape`, without padding; possibly a view of mapped pages, never changed.

        Several threads may read at once.
        """

    def describe(self) -> str:
        """One phrase for the log: format, layout, type."""


@runtime_checkable
class PartedSource(Protocol):
    """A Source whose `read(entry)` is `assemble(entry, parts(entry))`, so that writers may move rows without it.

    `assemble` must follow from the shapes alone and use nothing of `entry` but what they scale with: it is also run on
    small tensors of row numbers, whose columns stand for blocks of columns.
    """

    def parts(self, entry: Entry) -> list[Tensor]:
        """The stored tensors, mapped and not copied, checked where replicas must agree."""

    def assemble(self, entry: Entry, parts: list[Tensor]) -> Tensor:
        """The full mcore tensor of `parts`: a pure rearrangement."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The layout to write. A format reads the fields it lists in `Format.options`, and no other."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None  # tensor-parallel size of experts; None: as tp
    vp: int = 1  # virtual chunks of a pipeline stage
    first_stage_layers: int | None = None  # None: as many as the other stages
    transformer_impl: str = "te"  # te | local: parameter names
    experts: str = "sequential"  # sequential | grouped

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size of experts."""
        return self.tp if self.etp is None else self.etp

    def sizes(self, *, has_experts: bool) -> dict[str, int]:
        """What a model is cut into, by field: no `etp` without experts, no first stage where all is one."""
        sizes = {"tp": self.tp, "pp": self.pp, "ep": self.ep, "etp": self.expert_tp, "vp": self.vp}
        if not has_experts:
            del sizes["etp"]
        return sizes if self.first_stage_layers is None else sizes | {"first_stage_layers": self.first_stage_layers}

    def phrase(self, *, has_experts: bool) -> str:
        """The sizes for the log, without those that are as if nobody had asked for them."""
        usual = {"pp": 1, "ep": 1, "etp": self.tp, "vp": 1}
        sizes = self.sizes(has_experts=has_experts).items()
        return " ".join(f"{name} {size}" for name, size in sizes if size != usual.get(name))


@dataclass(frozen=True)
class Written:
    """What a writer wrote: tensors (one cut over ranks counts once), their bytes over all files, who holds a NaN."""

    tensors: int
    bytes: int
    nan: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A way to lay a checkpoint out on disk, in both directions.

    `holds(directory)` says cheaply whether the files are this format's. `open(directory, entries, config)` checks them
    against the manifest. `check(entries, config, target)` raises ValueError for a layout that cannot be written,
    before anything is. `write(directory, entries, config, source, target)` fills an existing directory that nobody
    looks into yet, and reads every entry once.
    """

    name: str
    marker: str  # the files that give it away, for the message that nothing was found
    holds: Callable[[Path], bool]
    open: Callable[[Path, list[Entry], ModelConfig], Source]
    check: Callable[[list[Entry], ModelConfig, Target], None]
    write: Callable[[Path, list[Entry], ModelConfig, Source, Target], Written]
    options: frozenset[str] = frozenset()
