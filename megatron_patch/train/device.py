"""What the device of this rank can do, and how much of its memory a run has taken."""

import resource
import sys
import time
from types import MappingProxyType

import torch

# Dense bf16 matrix products per second, from the makers' data sheets (without sparsity).
KNOWN_PEAKS = MappingProxyType(
    {
        "A100": 312e12,
        "A800": 312e12,
        "H100 PCIe": 756e12,
        "H100": 989e12,
        "H800": 989e12,
        "H200": 989e12,
        "H20": 148e12,
        "B200": 2250e12,
        "L40S": 362e12,
        "A10": 125e12,
        "V100": 125e12,
        "MI250X": 383e12,
        "MI300X": 1307e12,
    }
)
SIDE, ROUNDS = 1024, 4
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Floating-point operations per second that `device` can do at best, and how that is known: 'known' or 'measured'.

    Known is what the maker says of bf16 products; what is in no table, as a CPU, is timed on float32 products.
    """
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name(device)
        for part in sorted(KNOWN_PEAKS, key=len, reverse=True):
            if part in name:
                return KNOWN_PEAKS[part], "known"
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
