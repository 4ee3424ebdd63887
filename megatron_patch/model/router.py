"""Which experts a token is sent to, and with what weight.

Shapes: T tokens, H hidden, E experts, K experts of a token, G groups of experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_patch.config.model import ModelConfig


class TopKRouter(nn.Module):
    """Top-k routing by a softmax over the experts, in at least float32 whatever the model computes in.

    The weights are the softmax over all experts at those chosen (DeepSeek-V2, Qwen1.5-MoE), or the softmax over the
    chosen only (Mixtral), times a constant. No token is dropped.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.topk, self.factor = config.moe_router_topk, config.moe_router_topk_scaling_factor
        self.groups, self.group_topk = config.moe_router_num_groups, config.moe_router_group_topk
        self.is_softmax_first = config.moe_router_pre_softmax
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, K], at least float32, and expert indices [T, K]."""
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        logits_TE = F.linear(x_TH.to(wide), self.weight.to(wide))
        experts_TK = self._eligible(logits_TE.detach()).topk(self.topk, sorted=False).indices
        if self.is_softmax_first:
            weights_TK = logits_TE.softmax(-1).gather(-1, experts_TK)
        else:
            weights_TK = logits_TE.gather(-1, experts_TK).softmax(-1)
        return weights_TK * self.factor, experts_TK

    def _eligible(self, logits_TE: Tensor) -> Tensor:
        """Logits, −inf outside the groups whose best expert is among the best (arXiv:2405.04434, section 2.2.2)."""
        if self.groups == 1:
            return logits_TE
        grouped_TGE = logits_TE.unflatten(-1, (self.groups, -1))
        best_TG = grouped_TGE.amax(-1)
        chosen_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(
            -1, best_TG.topk(self.group_topk, sorted=False).indices, True
        )
        return grouped_TGE.masked_fill(~chosen_TG.unsqueeze(-1), -torch.inf).flatten(-2)
