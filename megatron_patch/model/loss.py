"""Cross-entropy over a vocabulary that is cut over the tensor-parallel axis."""

import torch
from torch import Tensor

from megatron_patch.parallel.collectives import max_, sum_
from megatron_patch.parallel.mesh import Axis


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, tp: Axis, vocab_size: int) -> Tensor:
    """Loss per token, at least float32 [...], from this rank's logits [..., V/tp] and labels [...] in [0, vocab_size).

    Rows that only pad the vocabulary take no part in the softmax. Overwrites `logits` unless it is of half precision.
    """
    return _CrossEntropy.apply(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, tp, vocab_size)


class _CrossEntropy(torch.autograd.Function):
    """Holds one copy of the logits: exponentials, then gradients, both in their place."""

    @staticmethod
    def forward(ctx, logits, labels, tp, vocab_size):
        columns = logits.shape[-1]
        first = tp.rank * columns
        real = min(max(vocab_size - first, 0), columns)
        logits[..., real:] = -torch.inf
        logits -= max_(logits.amax(-1), tp).unsqueeze(-1)
        elsewhere = (labels < first) | (labels >= first + columns)
        column = (labels - first).masked_fill(elsewhere, 0).unsqueeze(-1)
        chosen = sum_(logits.gather(-1, column).squeeze(-1).masked_fill(elsewhere, 0), tp)
        total = sum_(logits.exp_().sum(-1), tp)
        ctx.save_for_backward(logits, total, column, elsewhere)
        return total.log() - chosen

    @staticmethod
    def backward(ctx, grad):
        exponentials, total, column, elsewhere = ctx.saved_tensors
        gradient = exponentials.mul_((grad / total).unsqueeze(-1))
        gradient.scatter_add_(-1, column, -grad.masked_fill(elsewhere, 0).unsqueeze(-1))
        return gradient, None, None, None
