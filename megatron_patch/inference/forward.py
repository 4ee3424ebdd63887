"""One pass of tokens through the stages of a pipeline, and what ranks agree on after it.

Shapes: B rows, L tokens of a pass, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.decoder import GPTModel
from megatron_patch.model.kernels import Kernel, using
from megatron_patch.model.kv_cache import KVCache
from megatron_patch.parallel.collectives import gather_sequence, max_
from megatron_patch.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Forward:
    """A rank's part of the model. Every rank of a model calls the same methods in the same order."""

    config: ModelConfig
    model: GPTModel
    mesh: Mesh
    kernel: Kernel
    dtype: torch.dtype

    @property
    def is_last(self) -> bool:
        """Whether this rank has logits."""
        return self.model.is_last

    @property
    def is_in_step(self) -> bool:
        """Whether data-parallel ranks share experts, so that each must make as many passes as the others."""
        return self.mesh.ep.size > 1 and self.mesh.dp.size > 1

    def begin(self, prompts: Sequence[Sequence[int]], limit: int) -> tuple[KVCache, Tensor | None]:
        """A cache of `prompts` for rows of up to `limit` tokens, and the logits [B, V] of what follows them."""
        lengths = [len(prompt) for prompt in prompts]
        cache = KVCache(self.model.layers, lengths, limit, self.config.window_size, self.mesh.device)
        return cache, self._next(self.padded(prompts), cache)

    def step(self, tokens: Sequence[int], cache: KVCache) -> Tensor | None:
        """One token more in each row; the logits [B, V] of the next."""
        cache.advance()
        return self._next(torch.tensor(tokens, device=self.mesh.device)[:, None], cache)

    def padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of tokens [B, longest]; what follows a shorter one is never seen by it."""
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.mesh.device)

    def run(self, tokens_BL: Tensor, cache: KVCache | None = None) -> Tensor | None:
        """This tensor-parallel rank's logits [B, L, V/tp], with a cache [B, 1, V/tp]; None before the last stage."""
        batch, length = tokens_BL.shape
        x = tokens_BL if self.model.is_first else self._receive((length, batch, self.config.hidden_size))
        with using(self.kernel, [self.model]) if length > 1 else nullcontext():
            x = self.model(x, cache=cache)
        if self.is_last:
            return x
        dist.send(x.contiguous(), self._stage(self.mesh.pp.rank + 1), group=self.mesh.pp.group)
        return None

    def whole(self, logits_TV: Tensor) -> Tensor:
        """[T, V/tp] of each tensor-parallel rank → [T, V], float32, without the rows that pad the vocabulary."""
        gathered = gather_sequence(logits_TV.t().contiguous(), self.mesh.tp).t()
        return gathered[:, : self.config.vocab_size].float()

    def agree(self, decide: Callable[[], tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What `decide` returns where the logits are: whole numbers and float32 numbers of `shape`, on every rank.

        Tensor-parallel ranks take the first one's word: their logits could differ in what a device rounds.
        """
        device, tp, pp = self.mesh.device, self.mesh.tp, self.mesh.pp
        if self.is_last:
            found = tuple(tensor.to(device).contiguous() for tensor in decide())
        else:
            found = tuple(torch.empty(shape, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
        for tensor in found:
            if self.is_last:
                _broadcast(tensor, tp, self.mesh.grid.peers(self.mesh.rank, "tp")[0])
            _broadcast(tensor, pp, self._stage(pp.size - 1))
        return found[0].cpu(), found[1].cpu()

    def is_any_busy(self, is_busy: bool) -> bool:
        """Whether this rank has rows to go on with or, where data-parallel ranks stay in step, any of these has."""
        if not self.is_in_step:
            return is_busy
        return bool(max_(torch.tensor(float(is_busy), device=self.mesh.device), self.mesh.dp))

    def _next(self, tokens_BL: Tensor, cache: KVCache) -> Tensor | None:
        logits = self.run(tokens_BL, cache)
        return None if logits is None else self.whole(logits[:, 0])

    def _stage(self, number: int) -> int:
        return self.mesh.grid.peers(self.mesh.rank, "pp")[number]

    def _receive(self, shape: tuple[int, ...]) -> Tensor:
        x = torch.empty(shape, dtype=self.dtype, device=self.mesh.device)
        dist.recv(x, self._stage(self.mesh.pp.rank - 1), group=self.mesh.pp.group)
        return x


def _broadcast(tensor: Tensor, axis: Axis, source: int) -> None:
    if axis.size > 1:
        dist.broadcast(tensor, source, group=axis.group)
