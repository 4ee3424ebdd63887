"""How layers keep what their backward pass needs: as it is, not at all (recomputed), or in host memory.

Each way gives the same gradients, bit for bit.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Keep: TypeAlias = Callable[..., Any]  # (function, *arguments) → function(*arguments)


def kept(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run it: autograd keeps what it wants."""
    return function(*arguments)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Keep only the arguments, and run it again in the backward pass (arXiv:1604.06174). Nothing in it is random."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def offloaded(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run it; what autograd keeps waits in host memory, pinned where there is an accelerator. Weights stay."""
    with saved_tensors_hooks(_to_host, _to_device):
        return function(*arguments)


def is_moved(tensor: Tensor) -> bool:
    """Whether what autograd keeps is an activation: not a weight, which stays, nor a few indices."""
    is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
    return tensor.is_floating_point() and not is_weight


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if tensor.device.type == "cpu" or not is_moved(tensor):
        return tensor.device, tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def _to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = packed
    return tensor.to(device, non_blocking=True)
