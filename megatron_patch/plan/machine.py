"""What a rank's device is, has and can do at best, found without torch; what is not known is None."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

# Dense bf16 matrix products per second, from the makers' data sheets (without sparsity).
KNOWN_PEAKS: Mapping[str, float] = MappingProxyType(
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
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
SMI_SECONDS = 10
CGROUP_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """The device of one rank: `memory` in bytes, `peak_flops` per second in bf16; `is_cpu` shares the host's memory."""

    device: str
    memory: int | None
    peak_flops: float | None
    is_cpu: bool


def resolve_machine(ranks: int, *, has_accelerator: bool, root: Path = Path("/")) -> Machine:
    """The machine that this process runs on, whose memory `ranks` CPU ranks share equally."""
    if not has_accelerator:
        memory = host_memory(root)
        return Machine("cpu", None if memory is None else memory // ranks, None, is_cpu=True)
    name, memory = _nvidia(root)
    return Machine(name, memory, known_peak(name), is_cpu=False)


def known_peak(name: str) -> float | None:
    """bf16 operations per second of the device whose name its driver gives, as far as the table has it."""
    longest_first = sorted(KNOWN_PEAKS, key=len, reverse=True)
    part = next((part for part in longest_first if re.search(rf"{part}(?![0-9A-Z])", name)), None)  # A10 is no A10G
    return KNOWN_PEAKS[part] if part else None


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that new processes may take: what the kernel calls available, or what the container is allowed."""
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    if available is None:
        return None
    limits = [int(available[1]) * 1024]
    for name in CGROUP_LIMITS:
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def _nvidia(root: Path) -> tuple[str, int | None]:
    """Name and memory of the first GPU: of what its driver says, as much as there is."""
    try:
        told = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
        name, _, mebibytes = told.splitlines()[0].rpartition(",")
        return name.strip(), int(mebibytes) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        pass
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
        if model:
            return model[1].strip(), None
    return "accelerator", None
