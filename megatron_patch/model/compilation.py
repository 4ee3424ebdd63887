"""Which parts of a model `torch.compile` fuses, and when: layer by layer, so that all layers share one graph."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from megatron_patch.model.decoder import GPTModel, TransformerLayer
from megatron_patch.model.moe import MoE


def is_compiled(choice: str, device: torch.device) -> bool:
    """What `torch_compile` means on `device`: auto is on for CUDA; on a CPU a minute of compiling saves little."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


def compile_layers(chunks: Iterable[GPTModel], **options: Any) -> None:
    """Compile the layers in place, at their first call; parameters keep their names. `options` are torch.compile's."""
    for chunk in chunks:
        for layer in chunk.decoder.layers.values():
            for part in _parts(layer):
                part.compile(**options)


def _parts(layer: TransformerLayer) -> Iterator[nn.Module]:
    """A dense layer is one graph. Routers and experts count tokens on the host, so their layer is the rest of it."""
    if not isinstance(layer.mlp, MoE):
        yield layer
        return
    yield from (layer.input_layernorm, layer.self_attention, layer.pre_mlp_layernorm)
    if layer.mlp.shared_experts is not None:
        yield layer.mlp.shared_experts
