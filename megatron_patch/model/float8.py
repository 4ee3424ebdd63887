"""Products in float8: torchao's training recipe with dynamic tensorwise scales, in place of the layers' plain product.

What is multiplied, in both passes, is rounded to float8 (e4m3 forward, e5m2 for gradients: arXiv:2209.05433); weights,
activations between products, norms, routers and experts stay as they are.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_patch.model.linear import ColumnLinear, RowLinear

MULTIPLE = 16  # float8 products want both sizes of a weight to be multiples of it
LEAST_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def check_float8(device: torch.device) -> None:
    """Raise ValueError, naming what is missing, unless `device` multiplies in float8 and torchao is there."""
    missing = []
    if importlib.util.find_spec("torchao") is None:
        missing.append("the package torchao (the extra `fp8`)")
    if device.type != "cuda":
        missing.append(f"a CUDA GPU (this device is {device.type})")
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        missing.append(f"a GPU of compute capability 8.9 or more (this one has {found})")
    if missing:
        raise ValueError(f"precision fp8 needs {' and '.join(missing)}; use bf16")


def use_float8(layers: nn.Module, *, emulate: bool = False) -> None:
    """Let every column and row layer in `layers` multiply in float8, if its sizes allow.

    `emulate`: round as float8 does but multiply in the given dtype, on any device.
    """
    product = cache(partial(_product, emulate))  # layers that share it share what torch.compile makes of them
    for module in layers.modules():
        if isinstance(module, ColumnLinear | RowLinear) and all(size % MULTIPLE == 0 for size in module.weight.shape):
            module.multiply = product(*module.weight.shape)


def _product(emulate: bool, out_features: int, in_features: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # an extra: only fp8 runs need it

    with torch.device("meta"):
        plain = nn.Linear(in_features, out_features, bias=False)
    rounding = convert_to_float8_training(plain, config=Float8LinearConfig(emulate=emulate, pad_inner_dim=True))

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = functional_call(rounding, {"weight": weight}, (x,))
        return product if bias is None else product + bias

    return multiply
