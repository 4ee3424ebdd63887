"""A checkpoint seen in another precision: readers and writers of formats never convert a type themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_patch.checkpoint.interface import Source
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
    def layout(self) -> Mapping[str, int]:
        """The source's."""
        return self.source.layout

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The same for all."""
        return self.dtype

    def read(self, entry: Entry) -> Tensor:
        """The rounded tensor. Raises ValueError where a finite value leaves fp16's range."""
        tensor = self.source.read(entry)
        result = tensor.to(self.dtype)
        if self.dtype == torch.float16 and not torch.isfinite(result).all() and torch.isfinite(tensor).all():
            raise ValueError(f"{entry.mcore} has values beyond fp16's 65504; keep the dtype or use bf16")
        return result

    def describe(self) -> str:
        """The source's phrase, and the type it is seen in."""
        return f"{self.source.describe()} as {str(self.dtype).removeprefix('torch.')}"
