"""Accelerators, what attention runs on, and float8: as torch sees them."""

from collections.abc import Iterator

from megatron_patch.doctor.finding import Finding
from megatron_patch.plan.machine import known_peak
from megatron_patch.plan.table import in_units

TRIED_HEADS = (8, 2, 128)  # query heads, groups, width: those of published models, fewer


def devices() -> Iterator[Finding]:
    """Every accelerator that this process may use."""
    import torch

    if not torch.accelerator.is_available():
        cost = "training and generation run on the CPU, which is for tests and small models"
        yield Finding("devices", "accelerator", "none", cost)
        return
    kind = torch.accelerator.current_accelerator().type
    module = torch.get_device_module(kind)
    for number in range(torch.accelerator.device_count()):
        name = module.get_device_name(number)
        free, total = module.mem_get_info(number)
        peak = known_peak(name)
        cost = "" if peak else "its peak is in no table: the plan gives no time per step, and MFU is of a measured peak"
        used = f", {in_units(total - free)} in use" if total - free > total // 10 else ""
        yield Finding("devices", f"{kind} {number}", f"{name}, {in_units(total)}{used}", cost)


def attention() -> Iterator[Finding]:
    """Each kernel that may run here, tried once against plain attention."""
    import importlib.util

    import torch

    from megatron_patch.model.kernels import FLASH_3_MODULES, PLAIN, Heads, first_that_runs, kernel_order

    is_cuda = torch.cuda.is_available()
    if not is_cuda:
        yield Finding("attention", "kernel", "PyTorch's choice for this device")
        return
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    importable = [package for package in FLASH_3_MODULES if importlib.util.find_spec(package)]
    queries, groups, width = TRIED_HEADS
    heads = Heads(queries, groups, width, width, dtype, device)
    order = kernel_order("cuda", torch.cuda.get_device_capability(device), importable, dtype)
    for name in order:
        try:
            first_that_runs((name,), importable, heads)
        except ValueError as error:
            yield Finding("attention", name, str(error), f"another kernel is used instead: {PLAIN} at the worst")
        else:
            yield Finding("attention", name, "runs")


def float8() -> Iterator[Finding]:
    """Whether precision fp8 would be accepted here."""
    import torch

    from megatron_patch.model.float8 import check_float8

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        check_float8(device)
    except ValueError as error:
        yield Finding(
            "fp8", "PR=fp8", str(error), "PR=fp8 is refused; bf16 takes up to twice the time on GPUs that have fp8"
        )
    else:
        yield Finding("fp8", "PR=fp8", "runs")
