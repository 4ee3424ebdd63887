"""A checkpoint seen in another precision: readers and writers of formats never convert a type themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_patch.checkpoint.interface import PartedSource, Source
from megatron_patch.families.manifest import Entry

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Cast:
    """`source` with every tensor rounded to `dtype`."""

    source: Source
    dtype: torch.dtype

    @property
    def format(self) -> str:
        """The source's."""
        return self.source.format

    @property
    def layout(self) -> Mapping[str, int | str]:
        """The source's."""
        return self.source.layout

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The same for all."""
        return self.dtype

    def parts(self, entry: Entry) -> list[Tensor]:
        """As stored: what rearranges rows rounds them on the way."""
        return self.source.parts(entry) if isinstance(self.source, PartedSource) else [self.source.read(entry)]

    def assemble(self, entry: Entry, parts: list[Tensor]) -> Tensor:
        """The source's way."""
        return self.source.assemble(entry, parts) if isinstance(self.source, PartedSource) else parts[0]

    def read(self, entry: Entry) -> Tensor:
        """The rounded tensor. Raises ValueError where a value is beyond the range of `dtype`."""
        tensor = self.source.read(entry)
        rounded = tensor.to(self.dtype)
        check_range(entry, rounded, was_rounded=tensor.dtype != self.dtype)
        return rounded

    def describe(self) -> str:
        """The source's phrase, and the type it is seen in."""
        return f"{self.source.describe()} as {str(self.dtype).removeprefix('torch.')}"


def check_range(entry: Entry, tensor: Tensor, *, was_rounded: bool) -> None:
    """Raise ValueError where rounding left the range of the type. A finite sum, which is cheap, holds no infinity."""
    may_overflow = was_rounded and tensor.dtype != torch.float32
    if may_overflow and not torch.isfinite(tensor.sum()) and torch.isinf(tensor).any():
        name = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
        instead = "keep the dtype or use bf16" if tensor.dtype == torch.float16 else "keep the dtype"
        raise ValueError(f"{entry.mcore} has values beyond {name}'s {torch.finfo(tensor.dtype).max:.6g}; {instead}")


def holds_nan(tensor: Tensor) -> bool:
    """Whether a value is not a number. A sum that is a number, which is cheap, holds none."""
    return bool(torch.isnan(tensor.sum())) and bool(torch.isnan(tensor).any())
