"""A dense checkpoint seen as a mixture of experts, so that every format's writer works on it."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_patch.checkpoint.interface import Source
from megatron_patch.families.manifest import Entry
from megatron_patch.families.upcycle import Upcycling

STD = 0.02  # of everything that the dense model has no weight for


@dataclass(frozen=True)
class UpcycledSource:
    """`dense` under the manifest of a mixture; `origins` are the dense entries by mcore name.

    Norms, attention and embeddings are the dense ones. Draws depend on the seed and the entry, not on the layout.
    """

    dense: Source
    origins: Mapping[str, Entry]
    upcycling: Upcycling

    @property
    def format(self) -> str:
        """The dense source's."""
        return self.dense.format

    @property
    def dtype(self) -> torch.dtype:
        """The dense source's."""
        return self.dense.dtype

    @property
    def layout(self) -> Mapping[str, int | str]:
        """The dense source's."""
        return self.dense.layout

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """That of the weights it is made of."""
        origin = self._origin(entry)
        return self.dense.dtype if origin is None else self.dense.dtype_of(origin)

    def read(self, entry: Entry) -> Tensor:
        """The full tensor, `entry.shape`; a view of the dense one where that is possible."""
        origin = self._origin(entry)
        if origin is None:
            return self._draw(entry, entry.shape)
        whole = self.dense.read(origin)
        return whole if entry.expert is None else self._expert(entry, whole)

    def describe(self) -> str:
        """One phrase for the log."""
        return f"{self.dense.describe()}, upcycled to {self.upcycling.num_moe_experts} experts"

    def _origin(self, entry: Entry) -> Entry | None:
        """The dense entry it comes from; None for what is drawn."""
        if entry.mcore in self.origins:
            return self.origins[entry.mcore]
        layer, name = f"decoder.layers.{entry.layer}.", entry.mcore.rpartition(".mlp.experts.local_experts.")[2]
        if entry.expert is not None:
            return self.origins[f"{layer}mlp.{name.partition('.')[2]}"]
        if entry.mcore == f"{layer}pre_mlp_layernorm.weight":
            return self.origins[f"{layer}mlp.linear_fc1.layer_norm_weight"]
        return None

    def _expert(self, entry: Entry, whole: Tensor) -> Tensor:
        """The expert's part of the dense `whole`: gate and up are cut and widened each for itself."""
        splits = self.upcycling.num_splits
        dim, blocks = (0, list(whole.chunk(2))) if entry.layout == "gate_up" else (1, [whole])
        parts = [block.chunk(splits, dim)[entry.expert % splits] for block in blocks]
        missing = entry.shape[dim] // len(blocks) - parts[0].shape[dim]
        if missing:
            shape = [len(parts), *parts[0].shape]
            shape[1 + dim] = missing
            parts = [torch.cat(pair, dim) for pair in zip(parts, self._padding(entry, tuple(shape)), strict=True)]
        elif splits == 1:
            return whole
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _padding(self, entry: Entry, shape: tuple[int, ...]) -> Tensor:
        if self.upcycling.padding == "zeros":
            return torch.zeros(shape, dtype=self.dtype_of(entry))
        return self._draw(entry, shape)

    def _draw(self, entry: Entry, shape: tuple[int, ...]) -> Tensor:
        digest = hashlib.sha256(f"{self.upcycling.seed} {entry.mcore}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(shape).normal_(std=STD, generator=generator).to(self.dtype_of(entry))


def upcycle(dense: Source, dense_entries: Iterable[Entry], upcycling: Upcycling) -> UpcycledSource:
    """`dense` as the mixture whose architecture `families.upcycle.resolve_upcycled` found."""
    return UpcycledSource(dense, {entry.mcore: entry for entry in dense_entries}, upcycling)
