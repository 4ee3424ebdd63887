"""An automatic offload of the optimizer, for devices of any size."""

import dataclasses

import pytest
import torch

from megatron_patch.config.flags import from_flags
from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.plan.memory import memory
from megatron_patch.plan.offload import fitting
from megatron_patch.train.offload import described, resolve_offload

SIZES = {
    "num-layers": 8,
    "hidden-size": 64,
    "ffn-hidden-size": 96,
    "num-attention-heads": 4,
    "num-query-groups": 2,
    "kv-channels": 16,
    "vocab-size": 101,
    "max-position-embeddings": 64,
}


@pytest.fixture
def run():
    words = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    rest = "--train-data-path d --valid-data-path v --seq-length 32 --max-padding-length 32 --lr 1 --min-lr 0"
    rest += " --lr-decay-iters 9 --save out --save-interval 1 --family mistral --train-iters 9 --micro-batch-size 1"
    rest += " --global-batch-size 1 --precision bf16 --optimizer-offload-policy auto"
    return from_flags([*words, *rest.split()])


def test_no_more_layers_move_than_must(run):
    entries, grid = manifest(ALL["mistral"], run.model), resolve_grid(run.parallel, 1)
    whole = memory(run, entries, grid)["total"]
    assert fitting(run, entries, grid, whole).optimizer_offload_policy == "none"
    choice = fitting(run, entries, grid, whole - 1)
    assert (choice.optimizer_offload_policy, choice.optimizer_offload_fraction) == ("static", 1 / 8)
    half = fitting(run, entries, grid, int(0.7 * whole))
    fits = memory(dataclasses.replace(run, memory=half), entries, grid)["total"]
    assert 1 / 8 < half.optimizer_offload_fraction < 1
    assert fits <= 0.7 * whole
    assert fitting(run, entries, grid, 0).optimizer_offload_fraction == 1


def test_a_share_of_the_layers_is_that_many_layers():
    for layers in range(1, 130):
        for moved in range(layers + 1):
            memory = MemoryConfig(optimizer_offload_policy="static", optimizer_offload_fraction=moved / layers)
            assert memory.layers_on_host(layers) == moved
    half = MemoryConfig(optimizer_offload_policy="static", optimizer_offload_fraction=0.5)
    assert half.layers_on_host(3) == 2


def test_the_log_tells_what_is_moved_of_all_stages(run):
    run = dataclasses.replace(run, parallel=ParallelConfig(pipeline_model_parallel_size=2))
    policy = {"optimizer_offload_policy": "static", "optimizer_offload_fraction": 1 / 8}
    moved = dataclasses.replace(run, memory=dataclasses.replace(run.memory, **policy))
    assert described(moved) == ["offload: master weights and optimizer state of 2 of 8 layers stand in host memory"]
    assert described(dataclasses.replace(run, memory=MemoryConfig())) == []


def test_on_a_cpu_everything_is_in_host_memory_already(run):
    entries, grid = manifest(ALL["mistral"], run.model), resolve_grid(run.parallel, 1)
    assert resolve_offload(run, entries, grid, torch.device("cpu")).optimizer_offload_policy == "none"
