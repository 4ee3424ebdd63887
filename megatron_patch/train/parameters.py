"""Where a manifest entry stands among a model's parameters: the experts of a layer share one, each has a slice."""

from collections.abc import Iterator

from torch import Tensor

from megatron_patch.families.manifest import Entry

GROUPED, ONE = ".mlp.experts.", ".mlp.experts.local_experts.{}."


def parameter_name(entry: Entry) -> str:
    """The parameter that holds `entry`: its own, or for an expert the one `[E, …]` of all experts."""
    return entry.mcore if entry.expert is None else entry.mcore.replace(ONE.format(entry.expert), GROUPED)


def entry_tensors(name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The manifest's names of parameter `name`, with their tensors: views of `whole`."""
    if GROUPED not in name:
        yield name, whole
        return
    for expert, tensor in enumerate(whole):
        yield name.replace(GROUPED, ONE.format(expert)), tensor
