"""A micro-batch as one context-parallel rank sees it."""

import torch

from megatron_patch.data.batches import Batch
from megatron_patch.parallel.mesh import Axis
from megatron_patch.parallel.zigzag import held


def cut_sequence(batch: Batch, cp: Axis) -> Batch:
    """The tokens of `batch` that this rank holds, [B, S/cp], and what belongs to them.

    Starts of segments stay positions in the whole sample. Raises ValueError where S is not a multiple of 2 × cp.
    """
    if cp.size == 1:
        return batch
    positions = torch.cat([torch.arange(run.start, run.stop) for run in held(cp.rank, cp.size, batch.tokens.shape[1])])
    return Batch(**{name: None if part is None else part[:, positions] for name, part in vars(batch).items()})
