"""Which kernel computes core attention on this machine: the fastest that runs, tried once, or the plain one."""

import dataclasses
import importlib
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_patch.config.model import ModelConfig
from megatron_patch.model.core_attention import Attend, Bounds, CoreAttention, Flash, Packed, find_segments
from megatron_patch.parallel.mesh import Axis, Mesh

FLASH_3, CUDNN, FLASH = "FlashAttention-3", "cuDNN", "PyTorch's FlashAttention"
EFFICIENT, PLAIN = "PyTorch's memory-efficient attention", "plain attention"
OF_PYTORCH = {
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    FLASH: SDPBackend.FLASH_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    PLAIN: SDPBackend.MATH,
}
# The package that FlashAttention-3 was installed as → its module.
FLASH_3_MODULES = {
    "flash_attn_interface": "flash_attn_interface",
    "flashattn_hopper": "flashattn_hopper.flash_attn_interface",
}
HOPPER, AMPERE = (9, 0), (8, 0)
TRIED_TOKENS, TRIED_WINDOW = 256, 48
TRIED_QUERIES = range(96, TRIED_TOKENS)  # of two segments: as a late chunk of a packed sample
TRIED_STARTS = (0, 170)
TOLERANCE = 0.05  # of the largest value: half precision rounds to 0.004 of it, a wrong mask is 1 off


@dataclass(frozen=True)
class Kernel:
    """What attention runs on: `backends` of PyTorch, best first (none: its choice), and `flash` for what they lack."""

    description: str
    backends: tuple[SDPBackend, ...] = ()
    flash: Flash | None = None


@dataclass(frozen=True)
class Heads:
    """What a kernel must support: heads and key/value heads of a rank, their width, that of the values."""

    queries: int
    groups: int
    width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device


def kernel_order(
    device_type: str, capability: tuple[int, int] | None, importable: Collection[str], dtype: torch.dtype
) -> tuple[str, ...]:
    """Names of the kernels that may run, fastest first; the last always does. Empty: PyTorch knows best.

    `importable` are the packages that this Python finds.
    """
    if device_type != "cuda":
        return ()
    if dtype == torch.float32 or capability is None or capability < AMPERE:
        return (EFFICIENT, PLAIN)
    if capability < HOPPER:
        return (FLASH, CUDNN, EFFICIENT, PLAIN)
    is_flash_3 = capability[0] == HOPPER[0] and not FLASH_3_MODULES.keys().isdisjoint(importable)
    return (*([FLASH_3] if is_flash_3 else []), CUDNN, FLASH, EFFICIENT, PLAIN)


def resolve_kernel(config: ModelConfig, mesh: Mesh, dtype: torch.dtype, *, fastest: bool) -> Kernel:
    """The kernel for `config` on this rank's device in `dtype`: the fastest that runs here, or the plain one."""
    if not fastest:
        return Kernel(f"{PLAIN}, as asked", (SDPBackend.MATH,))
    device = mesh.device
    importable = [package for package in FLASH_3_MODULES if find_spec(package)]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    order = kernel_order(device.type, capability, importable, dtype)
    if not order:
        return Kernel(f"PyTorch's choice for {device.type}")
    return first_that_runs(order, importable, _heads(config, mesh, dtype))


@contextmanager
def using(kernel: Kernel, models: Iterable[nn.Module]) -> Iterator[None]:
    """Attention anywhere in `models` runs on `kernel`."""
    for model in models:
        for module in model.modules():
            if isinstance(module, CoreAttention):
                module.flash = kernel.flash
    with sdpa_kernel(list(kernel.backends), set_priority=True) if kernel.backends else nullcontext():
        yield


def first_that_runs(order: tuple[str, ...], importable: Collection[str], heads: Heads) -> Kernel:
    """The first kernel of `order` whose forward and backward give what attention is. Says what does not run."""
    backends = tuple(OF_PYTORCH[name] for name in order if name in OF_PYTORCH)
    failures = []
    for name in order:
        try:
            if name == FLASH_3:
                kernel = Kernel(name, backends, Flash(_flash_3(importable), is_fastest=True))
                _check_packed(kernel, heads)
            else:
                kernel = Kernel(name, backends[backends.index(OF_PYTORCH[name]) :])
            _check(dataclasses.replace(kernel, backends=kernel.backends[:1]), heads)
        except Exception as error:  # whatever it is that a kernel lacks, the run has others
            failures.append(f"{name} does not run: {_first_line(error)}")
            continue
        kernel = kernel if kernel.flash else _with_flash(kernel, heads)
        return dataclasses.replace(kernel, description="; ".join([kernel.description, *failures]))
    raise ValueError("no attention kernel runs on this machine: " + "; ".join(failures))


def _with_flash(kernel: Kernel, heads: Heads) -> Kernel:
    """PyTorch's kernels know neither windows nor segments; the one beneath its FlashAttention does."""
    description = f"{kernel.description}; {FLASH} for windows, packed samples and context parallelism"
    flashed = Kernel(description, kernel.backends, Flash(_flash_of_pytorch, is_fastest=False))
    if heads.dtype == torch.float32:
        return kernel
    try:
        _check_packed(flashed, heads)
    except Exception:  # then keys are sliced
        return kernel
    return flashed


def _check(kernel: Kernel, heads: Heads) -> None:
    """Raise what the kernel raises, or ValueError where its result is not plain attention's."""
    _compare(kernel, heads, TRIED_TOKENS, None, None)


def _check_packed(kernel: Kernel, heads: Heads) -> None:
    """As `_check`, with a window and segments."""
    first, second = TRIED_STARTS
    starts = [second if position >= second else first for position in TRIED_QUERIES]
    packed = find_segments(torch.tensor([starts], device=heads.device), (TRIED_QUERIES,))
    _compare(kernel, heads, len(TRIED_QUERIES), TRIED_WINDOW, packed)


def _compare(kernel: Kernel, heads: Heads, queries: int, window: int | None, packed: Packed | None) -> None:
    generator = torch.Generator(heads.device).manual_seed(0)

    def random(count: int, length: int, width: int) -> Tensor:
        shape = (1, count, length, width)
        return torch.randn(shape, generator=generator, dtype=heads.dtype, device=heads.device)

    q, grad = random(heads.queries, queries, heads.width), random(heads.queries, queries, heads.value_width)
    k, v = (random(heads.groups, TRIED_TOKENS, width) for width in (heads.width, heads.value_width))
    found = _forward_and_backward(kernel, window, (q, k, v), packed, grad)
    wanted = _forward_and_backward(Kernel(PLAIN, (SDPBackend.MATH,)), window, (q, k, v), packed, grad)
    for ours, theirs in zip(found, wanted, strict=True):
        if not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max():  # a NaN fails too
            raise ValueError("its result is not that of plain attention")


def _forward_and_backward(
    kernel: Kernel, window: int | None, qkv: tuple[Tensor, ...], packed: Packed | None, grad: Tensor
) -> list[Tensor]:
    core, leaves = CoreAttention(window, Axis()), [x.detach().clone().requires_grad_() for x in qkv]
    with using(kernel, [core]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch's kernels lack, they tell in an error too
        out = core(*leaves, packed)
        out.backward(grad)
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]


def _heads(config: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> Heads:
    queries, groups = config.num_attention_heads // mesh.tp.size, config.num_query_groups // mesh.tp.size
    if not config.is_mla:
        return Heads(queries, groups, config.kv_channels, config.kv_channels, dtype, mesh.device)
    width = config.qk_head_dim + config.qk_pos_emb_head_dim
    return Heads(queries, queries, width, max(width, config.v_head_dim), dtype, mesh.device)


def _flash_3(importable: Collection[str]) -> Attend:
    package = next(package for package in FLASH_3_MODULES if package in importable)
    module: ModuleType = importlib.import_module(FLASH_3_MODULES[package])

    def attend(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, bounds: Bounds | None
    ) -> Tensor:
        settings = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": (_left(window), 0),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if bounds is None:
            out = module.flash_attn_func(q, k, v, **settings)
        else:
            out = module.flash_attn_varlen_func(q, k, v, *_places(bounds), **settings)
        return out[0] if isinstance(out, tuple) else out  # some versions return the softmax's sums too

    return attend


def _flash_of_pytorch(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, bounds: Bounds | None
) -> Tensor:
    """The operator beneath `scaled_dot_product_attention` and `torch.nn.attention.varlen`, private to torch."""
    places = (None, None, q.shape[1], k.shape[1]) if bounds is None else _places(bounds)
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *places, 0.0, window is None, False,
        scale=scale, window_size_left=_left(window), window_size_right=0,
    )  # fmt: skip
    return out


def _places(bounds: Bounds) -> tuple[Tensor, Tensor, int, int]:
    return bounds.queries, bounds.keys, bounds.longest_queries, bounds.longest_keys


def _left(window: int | None) -> int:
    return -1 if window is None else window - 1


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
