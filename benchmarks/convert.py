"""How fast a checkpoint is converted, and in how much memory, beside copying it: `python3 benchmarks/convert.py`.

A Mixtral of real widths and few layers is made in a temporary directory and removed again. Every figure is the fastest
of alternating runs over the same files, which are read once before each run. A run is the whole command until its bytes
are on the disk, Python's start included; what the conversion itself took, by its own clock, stands beside it. Memory is
RssAnon + RssShmem of all its processes, the highest of all runs.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_patch.checkpoint.hf import write_hf
from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.layouts import cut, merge
from megatron_patch.config.model import ModelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import Entry, manifest, parameter_count
from megatron_patch.families.resolve import from_checkpoint

FAMILY = ALL["mixtral"]
RANKS = 2  # tensor-parallel ranks of every converter here
CONVERT = (sys.executable, "-m", "megatron_patch.convert", "{source}", "{target}")
CASES = {
    "cp -r && sync": ("sh", "-c", "cp -r {source} {target} && sync"),
    "ours, hf to mcore": (*CONVERT, "--format", "mcore", "--tp", str(RANKS)),
    "ours, hf to hf": (*CONVERT, "--format", "hf"),
    "load everything": (sys.executable, __file__, "--peer", "everything", "{source}", "{target}"),
    "transformers": (sys.executable, __file__, "--peer", "transformers", "{source}", "{target}"),
}


@dataclass(frozen=True)
class Run:
    """One run: seconds, those that the command itself tells, bytes it left on disk, its highest memory in bytes."""

    seconds: float
    told: float | None
    bytes: int
    memory: int


@dataclass(frozen=True)
class RandomSource:
    """Normal weights in bf16, each parameter another part of one random tile."""

    tile: Tensor
    dtype: torch.dtype = torch.bfloat16

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The same for all."""
        return self.dtype

    def read(self, entry: Entry) -> Tensor:
        """A view, so that nothing is drawn twice."""
        size = torch.Size(entry.shape).numel()
        first = hash(entry.mcore) % (len(self.tile) - size)
        return self.tile[first : first + size].view(entry.shape)


def main() -> None:
    """Print, per case, seconds, bytes per second, their ratio to `cp`, and peak memory."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--layers", type=int, default=2, help="2 make 6 GB")
    reader.add_argument("--runs", type=int, default=3)
    reader.add_argument("--directory", type=Path, help="where; default: the system's temporary directory")
    reader.add_argument("--peer", nargs=3, metavar=("NAME", "SOURCE", "TARGET"), help="run one peer only")
    arguments = reader.parse_args()
    if arguments.peer:
        PEERS[arguments.peer[0]](*map(Path, arguments.peer[1:]))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        source = make_source(Path(directory) / "source", arguments.layers)
        results = compare(source, Path(directory) / "target", arguments.runs)
    report(results)


def make_source(directory: Path, layers: int) -> Path:
    """A Hugging Face directory of Mixtral 8x7B's widths. Raises OSError when the disk cannot hold three of them."""
    keys = FAMILY.sizes["8x7B"] | {"num_hidden_layers": layers}
    config = FAMILY.config(keys)
    size = 2 * parameter_count(FAMILY, config)
    directory.mkdir()
    if shutil.disk_usage(directory).free < 3 * size:
        raise OSError(f"{directory} needs {3 * size:,} free bytes; name another with --directory")
    print(f"Mixtral 8x7B with {layers} layers, {size:,} bytes; torch {torch.__version__}, {os.cpu_count()} cores,")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.release()}")
    text = json.dumps(FAMILY.hf_config(config, "bfloat16"), indent=2)
    (directory / "config.json").write_text(text)
    tile = torch.randn(200_000_000, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    write_hf(directory, manifest(FAMILY, config), config, RandomSource(tile), Target())
    return directory


def compare(source: Path, target: Path, runs: int) -> dict[str, list[Run]]:
    """Every case `runs` times, in turns."""
    results: dict[str, list[Run]] = {name: [] for name in CASES}
    for _ in range(runs):
        for name, command in CASES.items():
            warm(source)
            results[name].append(measure([part.format(source=source, target=target) for part in command], target))
            shutil.rmtree(target)
    return results


def warm(source: Path) -> None:
    """Bring the source into the page cache and let earlier writes reach the disk: the same start for every case."""
    for path in source.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    os.sync()


def measure(command: list[str], target: Path) -> Run:
    """Run the command to its end. Raises RuntimeError when it fails."""
    start, memory = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while process.poll() is None:
            memory = max(memory, resident(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {text[-2000:]}")
    told = re.search(r", (\d+\.\d) s, peak memory", text)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Run(seconds, told and float(told[1]), size, memory)


def resident(pid: int) -> int:
    """RssAnon + RssShmem of a process and those it started, in bytes; 0 once it has ended."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = sum(int(line[1]) * 1024 for line in lines if line[0] in ("RssAnon:", "RssShmem:"))
    return own + sum(resident(int(child)) for child in children)


def report(results: dict[str, list[Run]]) -> None:
    """A line per case. The ratios compare bytes written per second."""
    best = {name: min(runs, key=lambda run: run.seconds) for name, runs in results.items()}
    copy = next(iter(best.values()))
    print(f"the fastest of {len(next(iter(results.values())))} runs")
    for name, run in best.items():
        memory = max(run.memory for run in results[name]) / 1e6
        ratio = run.bytes / run.seconds / (copy.bytes / copy.seconds)
        line = f"{name:18} {run.seconds:6.2f} s  {run.bytes / run.seconds / 1e9:5.2f} GB/s  {ratio:5.2f} × cp"
        told = f"  (by itself {run.told:4.1f} s, {ratio * run.seconds / run.told:4.2f} × cp)" if run.told else " " * 32
        print(f"{line}{told}  peak memory {memory:7,.0f} MB")


def load_everything(source: Path, target: Path) -> None:
    """The straightforward converter: every tensor in memory, every rank's dict, torch.save."""
    resolved = from_checkpoint(("mixtral",), "auto", source)
    tensors: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    entries = manifest(resolved.family, resolved.config)
    model = {entry.mcore: _merged(entry, tensors, resolved.config) for entry in entries}
    for rank in range(RANKS):
        directory = target / "release" / f"mp_rank_{rank:02d}"
        directory.mkdir(parents=True)
        shards = {entry.mcore: cut(entry, model[entry.mcore], rank, RANKS).clone() for entry in entries}
        torch.save({"model": shards, "checkpoint_version": 3.0}, directory / "model_optim_rng.pt")
    os.sync()


def _merged(entry: Entry, tensors: dict[str, Tensor], config: ModelConfig) -> Tensor:
    return merge(entry, [tensors.pop(name) for name in entry.hf], config)


def load_and_save(source: Path, target: Path) -> None:
    """What transformers needs to read the model and write it again."""
    from transformers import MixtralForCausalLM

    MixtralForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    os.sync()


PEERS = {"everything": load_everything, "transformers": load_and_save}


if __name__ == "__main__":
    main()
