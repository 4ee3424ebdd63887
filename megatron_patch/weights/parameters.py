"""Where a manifest entry stands among this rank's parameters: a layer's experts share one, each has a slice of it."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_patch.families.manifest import Entry
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import Axis, Mesh

GROUPED, ONE = ".mlp.experts.", ".mlp.experts.local_experts.{}."


def named_parameters(chunks: Iterable[GPTModel]) -> dict[str, nn.Parameter]:
    """Every parameter of this rank by its name, which holds the layer's number in the whole model."""
    return {name: parameter for chunk in chunks for name, parameter in chunk.named_parameters()}


def parameter_name(entry: Entry) -> str:
    """The parameter that holds `entry`: its own, or for an expert the one `[E/ep, …]` of all experts of a rank."""
    return entry.mcore if entry.expert is None else entry.mcore.replace(ONE.format(entry.expert), GROUPED)


def shard_axis(entry: Entry, mesh: Mesh) -> Axis:
    """The axis over which `entry` is cut."""
    return mesh.tp if entry.expert is None else mesh.etp


def local_expert(expert: int, parameter: Tensor, mesh: Mesh) -> int | None:
    """Which slice of `parameter`, the `[E/ep, …]` of this rank, is `expert`; None where another rank has it."""
    number = expert - mesh.ep.rank * len(parameter)
    return number if 0 <= number < len(parameter) else None


def entry_tensors(name: str, whole: Tensor, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """The manifest's names of parameter `name`, with their tensors: views of `whole`."""
    if GROUPED not in name:
        yield name, whole
        return
    for expert, tensor in enumerate(whole, mesh.ep.rank * len(whole)):
        yield name.replace(GROUPED, ONE.format(expert)), tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a parameter or gradient, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
