"""What the routers did, as the log shows it: auxiliary losses and the load of the experts, layer by layer."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.auxiliary import AuxiliaryLosses
from megatron_patch.model.decoder import GPTModel
from megatron_patch.model.moe import MoE
from megatron_patch.parallel.collectives import sum_
from megatron_patch.parallel.mesh import Mesh

BALANCE = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}  # Megatron's names


def router_fields(chunks: list[GPTModel], mesh: Mesh) -> dict[str, float | list[int]]:
    """Of the steps since the last call, the same on every rank; all must call. Empty for a model without experts.

    Losses without their coefficients: the mean over micro-batches, by layer and over the layers. `moe/max_load` is the
    busiest expert's tokens over the mean, `moe/min_load` the idlest's. Layers count from 0. The lists,
    `moe/tokens_per_expert_layer_N`, are for files, not for a console.
    """
    config = chunks[0].config
    found = _found(chunks, mesh)
    if found is None:
        return {}
    layers = {number: row for number, row in enumerate(found.tolist()) if config.is_moe_layer(number)}
    fields: dict[str, float | list[int]] = {}
    for column, name in _losses(config):
        values = {number: row[column] / row[-1] for number, row in layers.items()}
        fields[name] = sum(values.values()) / len(values)
        fields |= {f"moe/{name}_layer_{number}": value for number, value in values.items()}
    loads = {number: row[: config.num_moe_experts] for number, row in layers.items()}
    for name, extreme in (("max_load", max), ("min_load", min)):
        values = {number: extreme(load) * len(load) / sum(load) for number, load in loads.items()}
        fields[f"moe/{name}"] = extreme(values.values())
        fields |= {f"moe/{name}_layer_{number}": value for number, value in values.items()}
    return fields | {f"moe/tokens_per_expert_layer_{n}": [round(count) for count in load] for n, load in loads.items()}


def _losses(config: ModelConfig) -> Iterator[tuple[int, str]]:
    """Column in `_found`, and name, of each loss that the model has."""
    if config.moe_router_load_balancing_type != "none" and config.moe_aux_loss_coeff:
        yield -3, BALANCE[config.moe_router_load_balancing_type]
    if config.moe_z_loss_coeff:
        yield -2, "z_loss"


def _found(chunks: list[GPTModel], mesh: Mesh) -> Tensor | None:
    """[layers of the model, E + 3], `AuxiliaryLosses.take_record` over all ranks; None where no router recorded."""
    config = chunks[0].config
    if not config.num_moe_experts:
        return None
    found = torch.zeros(config.num_layers, config.num_moe_experts + 3, device=mesh.device)
    for layer, auxiliary in _routers(chunks):
        record = auxiliary.take_record()
        if record is not None:
            found[layer] = record
    found = sum_(found, mesh.world).cpu()
    is_cut = mesh.sequence_parallel  # else every tensor rank counts all tokens
    found[:, :-3] /= 1 if is_cut else mesh.tp.size
    found[:, -1] /= mesh.cp.size * (mesh.tp.size if is_cut else 1)
    return found if found[-1, -1] else None


def _routers(chunks: Iterable[GPTModel]) -> Iterator[tuple[int, AuxiliaryLosses]]:
    for chunk in chunks:
        for number, layer in chunk.decoder.layers.items():
            if isinstance(layer.mlp, MoE):
                yield int(number), layer.mlp.router.auxiliary
