"""Causal attention over whatever keys a rank's queries may see: a window, the segments of packed samples, a part of the
sequence. Keys are sliced, so that no mask has the sample's length twice.

Shapes: B batch, N query heads and G key/value heads of this rank, D head dimension. Of the S tokens of a sample this
rank has L queries and, once they are gathered, all keys. A run is a range of consecutive queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megatron_patch.model.activations import Keep, kept
from megatron_patch.parallel.mesh import Axis
from megatron_patch.parallel.zigzag import held

BLOCK = 256  # queries that share a mask, where the window is wider or there is none


@dataclass(frozen=True)
class Bounds:
    """Segments that follow each other in a run: where each ends among its queries and keys, int32 [segments + 1]."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int


@dataclass(frozen=True)
class PackedRun:
    """A run in one row, cut where segments end: `queries[n]` of this rank see up to themselves of `keys[n]` of all."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    bounds: Bounds  # the same, for a kernel that takes the run whole


Packed: TypeAlias = tuple[tuple[PackedRun, ...], ...]  # of each row, its runs

# (queries [B, L, N, D], keys and values [B, K, G, D], scale, window, bounds) → [B, L, N, D]; with bounds there is no B.
# The last query, or with bounds a segment's last, stands where its last key does.
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, float | None, int | None, Bounds | None], Tensor]


@dataclass(frozen=True)
class Flash:
    """A kernel for half precision that knows windows and segments. `is_fastest`: where others need no slices, too."""

    attend: Attend
    is_fastest: bool


def find_segments(starts_BS: Tensor, runs: Sequence[range]) -> Packed:
    """Where segments fall on this rank, whose queries stand at the positions `runs`.

    `starts_BS` [B, L]: the position of the first token of each query's own segment.
    """
    firsts = [0, *accumulate(len(run) for run in runs)]
    return tuple(
        tuple(
            _packed_run(row[first : first + len(run)], first, run, starts_BS.device)
            for first, run in zip(firsts, runs, strict=False)
        )
        for row in starts_BS.cpu()
    )


def _packed_run(starts: Tensor, first: int, run: range, device: torch.device) -> PackedRun:
    ends = [*(torch.nonzero(starts[1:] != starts[:-1]).flatten() + 1).tolist(), len(run)]
    queries = [0, *ends]
    keys = [int(starts[0]), *(run.start + end for end in ends)]  # a later segment begins where the one before ends
    counts = torch.tensor([queries, [key - keys[0] for key in keys]], dtype=torch.int32).to(device)
    return PackedRun(
        queries=tuple(slice(first + begin, first + end) for begin, end in pairwise(queries)),
        keys=tuple(slice(begin, end) for begin, end in pairwise(keys)),
        bounds=Bounds(
            *counts,
            longest_queries=max(end - begin for begin, end in pairwise(queries)),
            longest_keys=max(end - begin for begin, end in pairwise(keys)),
        ),
    )


class CoreAttention(nn.Module):
    """Attention without weights: token i sees token j of its segment when 0 ≤ i − j, and i − j < `window` if any.

    Scores are multiplied by `scale`, 1/√D if absent. Without `flash` PyTorch's kernels do all of it.
    """

    def __init__(self, window: int | None, cp: Axis, scale: float | None = None):
        super().__init__()
        self.window, self.cp, self.scale = window, cp, scale
        self.flash: Flash | None = None
        self.keep: Keep = kept

    def forward(self, q_BNLD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, packed: Packed | None = None) -> Tensor:
        """Keys and values are of the whole sample, in order; queries are those of this rank → [B, N, L, D]."""
        if packed is None and self.keep is kept and not self._takes_flash(q_BNLD, k_BGSD):
            return self._whole(q_BNLD, k_BGSD, v_BGSD)
        return self._uncompiled(q_BNLD, k_BGSD, v_BGSD, packed)

    @torch.compiler.disable
    def _uncompiled(self, *arguments: Any) -> Tensor:
        """Segments are other slices in each batch, recomputing is autograd's work, a kernel of others' is opaque."""
        return self.keep(self._visible, *arguments)

    def _visible(self, q_BNLD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, packed: Packed | None) -> Tensor:
        if packed is None:
            return self._whole(q_BNLD, k_BGSD, v_BGSD)
        rows = zip(q_BNLD, k_BGSD, v_BGSD, packed, strict=True)
        return torch.stack([_join([self._packed(*qkv, run) for run in runs]) for *qkv, runs in rows])

    def _whole(self, q_BNLD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        outputs, first = [], 0
        for run in held(self.cp.rank, self.cp.size, k_BGSD.shape[2]):
            keys = slice(max(0, run.start - self.window + 1) if self.window else 0, run.stop)
            queries = slice(first, first + len(run))
            outputs.append(self._attend(q_BNLD[:, :, queries], k_BGSD[:, :, keys], v_BGSD[:, :, keys]))
            first += len(run)
        return _join(outputs)

    def _packed(self, q_NLD: Tensor, k_GSD: Tensor, v_GSD: Tensor, run: PackedRun) -> Tensor:
        if self._has_flash(q_NLD):
            queries, keys = (slice(parts[0].start, parts[-1].stop) for parts in (run.queries, run.keys))
            parts = (x.transpose(0, 1) for x in (q_NLD[:, queries], k_GSD[:, keys], v_GSD[:, keys]))
            return self.flash.attend(*parts, self.scale, self.window, run.bounds).transpose(0, 1)
        segments = zip(run.queries, run.keys, strict=True)
        return _join(
            [self._attend(q_NLD[None, :, q], k_GSD[None, :, k], v_GSD[None, :, k]).squeeze(0) for q, k in segments]
        )

    def _attend(self, q_BNLD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor) -> Tensor:
        if self._takes_flash(q_BNLD, k_BGKD):
            parts = (x.transpose(1, 2) for x in (q_BNLD, k_BGKD, v_BGKD))
            return self.flash.attend(*parts, self.scale, self.window, None).transpose(1, 2)
        return attend(q_BNLD, k_BGKD, v_BGKD, self.window, self.scale)

    def _takes_flash(self, q_BNLD: Tensor, k_BGKD: Tensor) -> bool:
        is_plain = is_square(q_BNLD, k_BGKD, self.window)
        return self._has_flash(q_BNLD) and (self.flash.is_fastest or not is_plain)

    def _has_flash(self, q: Tensor) -> bool:
        return self.flash is not None and q.dtype in (torch.bfloat16, torch.float16)


def attend(
    q_BNLD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Causal attention [B, N, L, D] of the last L of K tokens, through PyTorch's kernels.

    Blocks of queries are taken each against the keys that they can see: S·W work, and masks of a block's size.
    """
    length, count = q_BNLD.shape[2], k_BGKD.shape[2]
    if is_square(q_BNLD, k_BGKD, window):
        return scaled_dot_product_attention(q_BNLD, k_BGKD, v_BGKD, is_causal=True, scale=scale, enable_gqa=True)
    step = min(window or BLOCK, BLOCK)
    outputs = []
    for begin in range(0, length, step):
        end = min(begin + step, length)
        last = count - length + begin  # the key of the block's first query
        keys = slice(max(0, last - window + 1) if window else 0, count - length + end)
        mask = torch.ones(end - begin, keys.stop - keys.start, dtype=torch.bool, device=q_BNLD.device)
        mask = mask.tril(last - keys.start)
        if window:
            mask = mask.triu(last - keys.start - window + 1)
        q, k, v = q_BNLD[:, :, begin:end], k_BGKD[:, :, keys], v_BGKD[:, :, keys]
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
    return _join(outputs)


def is_square(q_BNLD: Tensor, k_BGKD: Tensor, window: int | None) -> bool:
    """Whether each query sees all keys up to itself, and none came before: what any kernel computes."""
    length = q_BNLD.shape[2]
    return length == k_BGKD.shape[2] and (window is None or length <= window)


def _join(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)
