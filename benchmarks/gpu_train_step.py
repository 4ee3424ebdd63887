"""Training steps of real widths on one accelerator, beside transformers' and Megatron-Core's, in bf16 and fp8.

    python3 benchmarks/gpu_train_step.py [--case mistral-4096 …] [--rounds 10]
    python3 benchmarks/gpu_train_step.py --device cpu --tiny

Layers are those of the published sizes, few of them, so that one device holds the optimizer too. A line says how many
TFLOP/s of the model's own arithmetic a step does, and what share that is of the fastest large matrix product that this
run measured in the same precision. Each contender is built, warmed up, timed (median) and removed before the next. Ours
and Megatron-Core keep float32 master weights; transformers trains bf16 weights directly, which is less work.
"""

import argparse
import dataclasses
import datetime
import gc
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_peer import HAS_MEGATRON, megatron_step
from steps import OPTIMIZER, Step, our_step, peer_step, run_config

from megatron_patch.config.model import ModelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.mesh import Mesh, build_mesh
from megatron_patch.plan.flops import training_flops
from megatron_patch.weights.load import RandomWeights

WARM_UP = 3
PACKAGES = ("torch", "transformers", "megatron-core", "transformer-engine", "torchao", "flash-attn")


@dataclass(frozen=True)
class Case:
    """Layers of a published size, and the tokens of a step."""

    family: str
    size: str
    layers: int
    length: int
    samples: int
    is_float8: bool = True  # whether fp8 is measured too: experts stay bf16, so that it says little of them


CASES = {
    "mistral-4096": Case("mistral", "7B", 4, 4096, 4),
    "mistral-32768": Case("mistral", "7B", 4, 32768, 1),
    "mixtral-4096": Case("mixtral", "8x7B", 1, 4096, 4, is_float8=False),
    "deepseek_v2-4096": Case("deepseek_v2", "A2.4B", 4, 4096, 4, is_float8=False),
}
TINY = {
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "vocab_size": 256,
    "window_size": 32,
}
TINY_EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 128}
TINY_LATENT = {
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 16,
    "kv_channels": 16,
    "window_size": None,
}


def main() -> None:
    """One table, a line per case, precision and contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(None, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        grid = Grid(tp=1, cp=1, ep=1, pp=1, etp=1, world=1)
        mesh = build_mesh(grid, device, sharded=True, sequence_parallel=False, timeout_minutes=10.0)
        ceilings = {precision: ceiling(precision, device, options.tiny) for precision in ("bf16", "fp8")}
        print(heading(device, ceilings, options.rounds))
        for name in options.case:
            case = CASES[name]
            for precision in ("bf16", "fp8") if case.is_float8 else ("bf16",):
                for line in lines(case, precision, mesh, ceilings[precision], options):
                    print(f"| {name} | {precision} | {line} |", flush=True)
        dist.destroy_process_group()


def heading(device: torch.device, ceilings: dict[str, float | None], rounds: int) -> str:
    """What was measured with what, and the table's head."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    tops = ", ".join(f"{key} {value / 1e12:.1f}" if value else f"no {key}" for key, value in ceilings.items())
    return (
        f"{datetime.date.today()}, {name}; {', '.join(filter(None, map(_version, PACKAGES)))}, "
        f"Python {platform.python_version()}; median of {rounds}\nlargest matrix product measured, TFLOP/s: {tops}\n\n"
        "| case | precision | contender | ms a step | tokens/s | TFLOP/s | of ceiling | peak GB | first loss |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )


def lines(case: Case, precision: str, mesh: Mesh, top: float | None, options: argparse.Namespace) -> list[str]:
    """The rest of each contender's line; what one lacks stands in its line."""
    config, length = shape(case, options.tiny), 128 if options.tiny else case.length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (case.samples, length + 1), generator=generator)
    flops = training_flops(ALL[case.family], config, length) * case.samples
    found = []
    for name, build in contenders(case.family, config, precision, tokens, mesh).items():
        try:
            seconds, peak, loss = timed(build, options.rounds, mesh.device)
        except Exception as error:  # a contender that does not run here is a line of the table
            found.append(f"{name} | {_first_line(error)} | | | | |")
            continue
        rate = flops / seconds
        share = f"{rate / top:.0%}" if top else ""
        found.append(
            f"{name} | {seconds * 1e3:.0f} | {case.samples * length / seconds:.0f} | {rate / 1e12:.3g} | {share} | "
            f"{peak / 1e9:.1f} | {loss:.3f}"
        )
    return found


def contenders(
    family: str, config: ModelConfig, precision: str, tokens: Tensor, mesh: Mesh
) -> dict[str, Callable[[], Step]]:
    """How to build each one's step."""
    length, samples = tokens.shape[1] - 1, len(tokens)
    run = run_config(family, config, length=length, samples=samples, micro_batch=samples, precision=precision)
    source = RandomWeights(config, manifest(ALL[family], config), seed=0)
    steps = {"ours": lambda: our_step(run, source, tokens, mesh)}
    if precision == "bf16":  # transformers has no fp8 training of its own
        steps["transformers"] = lambda: transformers_step(family, config, tokens, mesh.device)
        steps["transformers compiled"] = lambda: transformers_step(family, config, tokens, mesh.device, compiled=True)
    if HAS_MEGATRON:
        steps["megatron-core"] = lambda: megatron_step(config, OPTIMIZER, tokens, precision, mesh.device)
    return steps


def transformers_step(
    family: str, config: ModelConfig, tokens: Tensor, device: torch.device, *, compiled: bool = False
) -> Step:
    """transformers' with its fastest experts, and FlashAttention where that is installed."""
    hf = ALL[family].hf_config(config, dtype="bfloat16")
    chosen = {"experts_implementation": "grouped_mm"} if config.num_moe_experts else {}
    attention = "flash_attention_2" if _version("flash-attn") and device.type == "cuda" else "sdpa"
    with device:
        peer = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**hf), attn_implementation=attention, dtype=torch.bfloat16, **chosen
        )
    if compiled:
        peer.compile()
    return peer_step(peer.train(), tokens)


def timed(build: Callable[[], Step], rounds: int, device: torch.device) -> tuple[float, int, float]:
    """Median seconds of a step, the peak of device memory, and the first loss."""
    clear(device)
    step = build()
    losses, seconds = [step() for _ in range(WARM_UP)], []
    for _ in range(rounds):
        synchronise(device)
        begin = time.perf_counter()
        step()
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    del step
    clear(device)
    return statistics.median(seconds), peak, losses[0]


def ceiling(precision: str, device: torch.device, is_tiny: bool) -> float | None:
    """FLOP/s of the fastest large square matrix product; None where the device has none in `precision`."""
    best = 0.0
    for size in (256,) if is_tiny else (4096, 8192, 16384):
        try:
            best = max(best, 2 * size**3 / product_seconds(size, precision, device))
        except (RuntimeError, ValueError, NotImplementedError):
            return None
    return best


def product_seconds(size: int, precision: str, device: torch.device, rounds: int = 20) -> float:
    """Shortest time of one product of two matrices `size` wide."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    if precision == "fp8":
        a, b, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device=device)
        product = partial(torch._scaled_mm, a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    else:
        product = partial(torch.matmul, a, b)
    shortest = float("inf")
    for _ in range(rounds):
        synchronise(device)
        begin = time.perf_counter()
        product()
        synchronise(device)
        shortest = min(shortest, time.perf_counter() - begin)
    return shortest


def shape(case: Case, is_tiny: bool) -> ModelConfig:
    """The architecture of `case`."""
    config = ALL[case.family].config(ALL[case.family].sizes[case.size])
    small = {"moe_router_load_balancing_type": "none"}  # as transformers, unless asked
    if is_tiny:
        small |= TINY | {"num_query_groups": 4 if config.is_mla else 2}
        small |= TINY_EXPERTS if config.num_moe_experts else {}
        small |= TINY_LATENT if config.is_mla else {}
    return dataclasses.replace(config, num_layers=2 if is_tiny else case.layers, **small)


def synchronise(device: torch.device) -> None:
    """Wait for what was asked of `device`."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clear(device: torch.device) -> None:
    """Give the device's memory back, and forget its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _version(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].replace("|", "/")[:160]


if __name__ == "__main__":
    main()
