"""A coefficient means what it means to Megatron-Core: the same losses of the same logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.auxiliary import AuxiliaryLosses
from megatron_patch.parallel.mesh import single_process

SCRIPT = Path(__file__).with_name("auxiliary_losses.py")
TOPK = 3


def ours(logits: torch.Tensor, kind: str) -> list[float]:
    """The balance loss of `kind` and the z-loss that a router records: without their coefficients."""
    config = ModelConfig(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=1,
        num_query_groups=1,
        kv_channels=8,
        vocab_size=8,
        max_position_embeddings=8,
        num_moe_experts=logits.shape[-1],
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=0.7,
        moe_z_loss_coeff=0.1,
    )
    auxiliary = AuxiliaryLosses(config, single_process())
    logits = logits.clone().requires_grad_()
    auxiliary(logits.topk(TOPK).values, logits, logits.topk(TOPK).indices).sum().backward()
    return auxiliary.take_record()[-3:-1].tolist()


def test_losses_are_megatron_cores(tmp_path):
    logits = torch.randn(9, 4, 6, generator=torch.Generator().manual_seed(1)) * 3
    torch.save({"logits": logits, "topk": TOPK}, tmp_path / "given.pt")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "given.pt"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, sequences, z = json.loads(done.stdout.splitlines()[-1])
    assert ours(logits, "aux_loss") == pytest.approx([whole, z], rel=1e-6)
    assert ours(logits, "seq_aux_loss") == pytest.approx([sequences, z], rel=1e-6)
    assert abs(whole - sequences) > 1e-2
