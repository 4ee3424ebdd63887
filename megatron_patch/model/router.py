"""Which experts a token is sent to, and with what weight.

Shapes: S sequence, B batch, H hidden, E experts, K experts of a token, G groups of experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.auxiliary import AuxiliaryLosses
from megatron_patch.parallel.mesh import Mesh


class TopKRouter(nn.Module):
    """Top-k routing by a softmax over the experts, in at least float32 whatever the model computes in.

    The weights are the softmax over all experts at those chosen (DeepSeek-V2, Qwen1.5-MoE), or the softmax over the
    chosen only (Mixtral), times a constant. No token is dropped.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        self.topk, self.factor = config.moe_router_topk, config.moe_router_topk_scaling_factor
        self.groups, self.group_topk = config.moe_router_num_groups, config.moe_router_group_topk
        self.is_softmax_first = config.moe_router_pre_softmax
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))
        self.auxiliary = AuxiliaryLosses(config, mesh)

    def forward(self, x_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [S, B, K], at least float32, and expert indices [S, B, K]."""
        wide = torch.promote_types(x_SBH.dtype, torch.float32)
        logits_SBE = F.linear(x_SBH.to(wide), self.weight.to(wide))
        experts_SBK = self._eligible(logits_SBE.detach()).topk(self.topk, sorted=False).indices
        if self.is_softmax_first:
            weights_SBK = logits_SBE.softmax(-1).gather(-1, experts_SBK)
        else:
            weights_SBK = logits_SBE.gather(-1, experts_SBK).softmax(-1)
        return self.auxiliary(weights_SBK * self.factor, logits_SBE, experts_SBK), experts_SBK

    def _eligible(self, logits_SBE: Tensor) -> Tensor:
        """Logits, −inf outside the groups whose best expert is among the best (arXiv:2405.04434, section 2.2.2)."""
        if self.groups == 1:
            return logits_SBE
        grouped_SBGE = logits_SBE.unflatten(-1, (self.groups, -1))
        best_SBG = grouped_SBGE.amax(-1)
        chosen_SBG = torch.zeros_like(best_SBG, dtype=torch.bool).scatter_(
            -1, best_SBG.topk(self.group_topk, sorted=False).indices, True
        )
        return grouped_SBGE.masked_fill(~chosen_SBG.unsqueeze(-1), -torch.inf).flatten(-2)
