"""Auxiliary losses of a router: experts of equal load, logits that stay small. Their gradient is added on the way back.

Both are means per MoE layer; `L + Σ_layers (moe_aux_loss_coeff · balance + moe_z_loss_coeff · z)` is what a run
minimises, where each is averaged over the micro-batches of the global batch. Which convention a coefficient is in:

    aux_loss      E / (K·T) · Σ_e n_e · p_e over the T tokens of a micro-batch, n_e: how many chose expert e,
                  p_e: the mean of their softmax over all experts. 1 at balance, whatever E and K. As Megatron-Core's
                  (arXiv:2101.03961, equation 4, divided by K), and DeepSeek-V2's `aux_loss_alpha` without `seq_aux`.
    seq_aux_loss  the same over each sequence, averaged over sequences: the expert-level balance loss of
                  arXiv:2405.04434, section 2.2.3, DeepSeek-V2's `aux_loss_alpha` with `seq_aux`.
    z-loss        the mean of logsumexp(logits)² (arXiv:2202.08906, equation 5).

`router_aux_loss_coef` of Mixtral and Qwen1.5-MoE is taken for moe_aux_loss_coeff as it stands, as other Megatron
converters take it. transformers means another loss by it: it pools the counts and means of all L layers and does not
divide by K, so that at balance its one term is K, and ours are L of 1 each.

Every token counts, padding too: these are statistics of what the experts are sent.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megatron_patch.config.model import ModelConfig
from megatron_patch.parallel.collectives import sum_
from megatron_patch.parallel.mesh import Axis, Mesh


class AuxiliaryLosses(nn.Module):
    """The auxiliary losses of one router, and what it did since it was last asked.

    Gradients are multiplied by `scale`, which is 0 until `set_auxiliary_scale`: a model that nobody trains has none.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        is_balanced = config.moe_router_load_balancing_type != "none"
        self.balance_coeff = config.moe_aux_loss_coeff if is_balanced else 0.0
        self.z_coeff = config.moe_z_loss_coeff
        self.is_per_sequence = config.moe_router_load_balancing_type == "seq_aux_loss"
        self.cut_over = [mesh.cp, mesh.tp if mesh.sequence_parallel else Axis()]  # ranks that share a sequence
        self.scale = 0.0
        self._recorded: Tensor | None = None

    def forward(self, weights_SBK: Tensor, logits_SBE: Tensor, experts_SBK: Tensor) -> Tensor:
        """`weights_SBK`, through which the losses' gradients reach `logits_SBE` once the weights have theirs."""
        if not weights_SBK.requires_grad:
            return weights_SBK
        counts_BE = tokens_per_expert(experts_SBK, logits_SBE.shape[-1], logits_SBE.dtype)
        load_E, none = counts_BE.sum(0), logits_SBE.new_zeros(())
        spread = self.cut_over[0].size * self.cut_over[1].size
        balance = self._balance(logits_SBE, counts_BE, experts_SBK.shape[-1], spread) if self.balance_coeff else none
        z = logits_SBE.logsumexp(-1).square().mean() / spread if self.z_coeff else none
        record = torch.cat([load_E, torch.stack([balance.detach(), z.detach(), none + 1])])
        return _Inject.apply(weights_SBK, self.balance_coeff * balance + self.z_coeff * z, record, self)

    def take_record(self) -> Tensor | None:
        """What this rank's backwards found since the last call, and forget it; None where there was none.

        [E + 3], sums over micro-batches: tokens sent to each expert, the rank's share of the balance loss and of the
        z-loss (0 where not asked for), number of micro-batches.
        """
        record, self._recorded = self._recorded, None
        return record

    def add_record(self, record: Tensor) -> None:
        """Add one micro-batch to what `take_record` gives."""
        self._recorded = record if self._recorded is None else self._recorded + record

    def _balance(self, logits_SBE: Tensor, counts_BE: Tensor, topk: int, spread: int) -> Tensor:
        for axis in self.cut_over:
            sum_(counts_BE, axis)
        return load_balancing_loss(
            logits_SBE.softmax(-1), counts_BE, topk, spread=spread, is_per_sequence=self.is_per_sequence
        )


def load_balancing_loss(
    probabilities_SBE: Tensor, counts_BE: Tensor, topk: int, *, spread: int = 1, is_per_sequence: bool = False
) -> Tensor:
    """This rank's share of the balance loss: their sum over the `spread` ranks that share each sequence is the loss.

    `counts_BE` are of whole sequences, `probabilities_SBE` of this rank's tokens.
    """
    length, batch, experts = probabilities_SBE.shape
    sums_BE, tokens = probabilities_SBE.sum(0), length * spread
    if is_per_sequence:
        return (counts_BE * sums_BE).sum() * (experts / (topk * tokens**2 * batch))
    return (counts_BE.sum(0) * sums_BE.sum(0)).sum() * (experts / (topk * (tokens * batch) ** 2))


def tokens_per_expert(experts_SBK: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """How many tokens of each sequence chose each expert [B, E]."""
    chosen_BR = experts_SBK.transpose(0, 1).flatten(1)
    counts = torch.zeros(len(chosen_BR), experts, dtype=dtype, device=chosen_BR.device)
    return counts.scatter_add_(1, chosen_BR, torch.ones_like(chosen_BR, dtype=dtype))


def set_auxiliary_scale(chunks: Iterable[nn.Module], scale: float | Tensor) -> None:
    """What the gradients of all auxiliary losses are multiplied by from the next forward on.

    loss scale / (micro-batches of a rank · data-parallel ranks) makes them those of the mean over the global batch.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, AuxiliaryLosses):
                module.scale = scale


class _Inject(torch.autograd.Function):
    """Identity of `weights`; `loss` gets the gradient `scale`.

    Records on the way back, which each micro-batch that trains goes once: a forward may be of a validation batch, or
    be computed again to save memory.
    """

    @staticmethod
    def forward(ctx, weights, loss, record, owner):
        ctx.save_for_backward(record)
        ctx.owner, ctx.scale, ctx.of_loss = owner, owner.scale, (loss.dtype, loss.device)
        return weights.clone()  # FSDP hooks what a router returns, and a view may lose its hook

    @staticmethod
    def backward(ctx, grad):
        (record,) = ctx.saved_tensors
        ctx.owner.add_record(record)
        dtype, device = ctx.of_loss
        return grad, torch.as_tensor(ctx.scale, dtype=dtype, device=device), None, None
