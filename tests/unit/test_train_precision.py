"""What of precision, offloading and compilation a run shows: its log, its start, what overflows do not end."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from tiny_training import iterations_saved, lines, tiny_run

from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.parallel.mesh import build_mesh, single_process
from megatron_patch.train import loop
from megatron_patch.train.loss_scale import INITIAL


@pytest.fixture
def run(tmp_path, tokenizer_directory):
    torch.set_num_threads(1)
    return dataclasses.replace(tiny_run(tmp_path, tokenizer_directory), train_iters=3)


@pytest.fixture
def one_rank(tmp_path):
    """The mesh of a rank without companions, which a launcher would have started."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    alone = resolve_grid(ParallelConfig(), 1)
    yield build_mesh(alone, torch.device("cpu"), sharded=True, sequence_parallel=False, timeout_minutes=1.0)
    dist.destroy_process_group()


def test_overflows_of_a_loss_scale_are_skipped_and_counted_and_no_failure(run, one_rank):
    loop.train(dataclasses.replace(run, precision="fp16", max_nonfinite_steps=1), one_rank)
    steps = lines(run)[1:]
    assert [line["loss scale"] for line in steps] == [INITIAL, INITIAL, INITIAL / 2]
    assert [line["number of skipped iterations"] for line in steps] == [1, 1, 1]
    assert [line["number of nan iterations"] for line in steps] == [0, 0, 0]
    assert iterations_saved(run)[-1] == 3


def test_the_log_says_what_stands_in_host_memory(run, one_rank, capsys):
    moved = MemoryConfig(optimizer_offload_policy="static", optimizer_offload_fraction=0.5)
    loop.train(dataclasses.replace(run, memory=moved), one_rank)
    assert "of 1 of 1 layers stand in host memory" in capsys.readouterr().out


def test_an_automatic_offload_is_resolved_before_the_model_is_built(run, capsys, monkeypatch):
    policies, build = [], loop.build_model

    def noted(model, parallel, precision, mesh, memory):
        policies.append(memory.optimizer_offload_policy)
        return build(model, parallel, precision, mesh, memory)

    monkeypatch.setattr(loop, "build_model", noted)
    loop.train(dataclasses.replace(run, memory=MemoryConfig(optimizer_offload_policy="auto")), single_process())
    assert policies == ["none"]  # all memory of a CPU is the host's
    assert "host memory" not in capsys.readouterr().out


@pytest.mark.parametrize(("choice", "compiled"), [("on", 1), ("auto", 0)])
def test_layers_are_compiled_if_asked(run, monkeypatch, choice, compiled):
    calls = []
    monkeypatch.setattr(loop, "compile_layers", calls.append)
    loop.train(dataclasses.replace(run, torch_compile=choice), single_process())
    assert len(calls) == compiled
