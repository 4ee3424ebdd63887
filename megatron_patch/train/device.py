"""What the device of this rank can do, and how much of its memory a run has taken."""

import resource
import sys
import time

import torch

from megatron_patch.plan.machine import known_peak

SIDE, ROUNDS = 1024, 4
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Floating-point operations per second that `device` can do at best, and how that is known: 'known' or 'measured'.

    Known is what the maker says of bf16 products; what is in no table, as a CPU, is timed on float32 products.
    """
    if device.type != "cpu":
        known = known_peak(torch.get_device_module(device).get_device_name(device))
        if known is not None:
            return known, "known"
    return _measured(device), "measured"


def _measured(device: torch.device) -> float:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        a @ a
        synchronise(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * SIDE**3 / fastest


def synchronise(device: torch.device) -> None:
    """Wait for what `device` was given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held on `device` so far; on a CPU, of its own memory."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES
    return torch.get_device_module(device).max_memory_allocated(device)
