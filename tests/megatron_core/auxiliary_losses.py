"""Megatron-Core's auxiliary losses of stored logits: `auxiliary_losses.py FILE`, in a process of its own.

FILE holds `logits` [S, B, E] and `topk`; prints the load balancing loss of the batch, that of its sequences, and the
z-loss, each with a coefficient of 1, as one JSON list.
"""

import json
import sys

import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
    z_loss_func,
)

given = torch.load(sys.argv[1])
logits, topk = given["logits"], given["topk"]
length, batch, experts = logits.shape
chosen, scores = compute_routing_scores_for_aux_loss(logits.flatten(0, 1), topk, "softmax")
whole = switch_load_balancing_loss_func(scores, chosen.sum(0), length * batch, topk, experts, 1.0)
# As its router does for sequences: the batch is folded into the experts.
chosen, scores = chosen.reshape(length, -1), scores.reshape(length, -1)
sequences = switch_load_balancing_loss_func(scores, chosen.sum(0), length, topk, experts, 1.0) / batch
print(json.dumps([loss.item() for loss in (whole, sequences, z_loss_func(logits.flatten(0, 1), 1.0))]))
