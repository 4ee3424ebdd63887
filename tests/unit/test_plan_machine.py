"""What a plan says of ranks and devices: what each holds, whether it fits, what would help, how long a step takes."""

import dataclasses

import pytest

from megatron_patch.config.checkpoint import CheckpointConfig
from megatron_patch.config.data import DataConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.parallel.grid import resolve_grid
from megatron_patch.plan.advice import advice
from megatron_patch.plan.describe import cautions, describe
from megatron_patch.plan.machine import Machine, host_memory, known_peak, resolve_machine
from megatron_patch.plan.memory import memory
from megatron_patch.plan.ranks import ranks
from megatron_patch.plan.table import render
from megatron_patch.train.out_of_memory import out_of_memory

GIB = 2**30
H200 = Machine("NVIDIA H200", 141 * GIB, known_peak("NVIDIA H200"), is_cpu=False)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
    ],
)
def test_a_device_has_its_own_peak_and_not_that_of_a_like_name(name, peak):
    assert known_peak(name) == peak


def run(family: str, size: str, *, length=4096, micro_batch=1, global_batch=64, **parallel) -> RunConfig:
    config = ALL[family].config(ALL[family].sizes[size])
    data = DataConfig(train_data_path=("d",), valid_data_path=("v",), seq_length=length, max_padding_length=length)
    return RunConfig(
        model=config,
        parallel=ParallelConfig(**parallel),
        data=dataclasses.replace(data, tokenizer_model="t"),
        optimizer=OptimizerConfig(lr=1e-5, min_lr=1e-6, lr_decay_iters=100),
        checkpoint=CheckpointConfig(save="out", save_interval=50),
        family=family,
        train_iters=100,
        micro_batch_size=micro_batch,
        global_batch_size=global_batch,
    )


def test_every_layer_and_expert_is_held_by_the_ranks_that_the_grid_says():
    whole = run("mixtral", "8x7B", pipeline_model_parallel_size=2, expert_model_parallel_size=4)
    rows = ranks(whole, resolve_grid(whole.parallel, 8))
    assert [row["layers"] for row in rows] == ["0–15"] * 4 + ["16–31"] * 4
    assert [row["experts"] for row in rows] == ["0–1", "2–3", "4–5", "6–7"] * 2
    assert [row["embedding"] for row in rows] == [True] * 4 + [False] * 4
    assert [row["output_layer"] for row in rows] == [False] * 4 + [True] * 4
    interleaved = run("mistral", "7B", pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=8)
    assert ranks(interleaved, resolve_grid(interleaved.parallel, 2))[1]["layers"] == "8–15, 24–31"


def test_a_step_takes_its_arithmetic_over_the_devices_share_of_their_peak():
    whole = run("mistral", "7B")
    section = describe(whole, ALL["mistral"], resolve_grid(whole.parallel, 8), H200)["speed"]
    assert section["model_flops_per_step"] == pytest.approx(6.4 * 7.11e9 * 4096 * 64, rel=0.1)
    assert section["seconds_per_step"] == pytest.approx(section["model_flops_per_step"] / (8 * 989e12 * 0.4), rel=0.01)
    unknown = describe(whole, ALL["mistral"], resolve_grid(whole.parallel, 8))
    assert unknown["speed"]["seconds_per_step"] is None and unknown["memory"]["fits"] is None
    of_memory, of_time = cautions(unknown)
    assert "memory a device has is unknown" in of_memory and "how long a step takes is unknown" in of_time


def test_a_run_that_does_not_fit_names_the_smallest_change_with_its_figure():
    whole = run("mistral", "7B", micro_batch=8)
    grid = resolve_grid(whole.parallel, 8)
    small = dataclasses.replace(H200, memory=80 * GIB)
    sections = describe(whole, ALL["mistral"], grid, small)
    assert not sections["memory"]["fits"] and sections["memory"]["total"] > 80 * GIB
    (warning,) = cautions(sections)
    assert "may not fit" in warning and "AC=full: " in warning
    first = sections["memory"]["advice"][0]
    assert "not enough" not in first
    full = dataclasses.replace(whole, memory=dataclasses.replace(whole.memory, recompute_granularity="full"))
    needed = memory(full, manifest(ALL["mistral"], full.model), grid)["total"]
    assert f"AC=full: {needed / GIB:.4g} GiB" in warning
    assert cautions(describe(full, ALL["mistral"], grid, H200)) == []


def test_two_changes_are_named_where_none_alone_is_enough():
    whole = run("mistral", "7B", micro_batch=4)
    grid, entries = resolve_grid(whole.parallel, 2), manifest(ALL["mistral"], whole.model)
    changes = advice(whole, entries, grid, 60 * GIB, on_cpu=False)
    assert " and " in changes[0] and "not enough" not in changes[0]
    assert all("not enough" in change for change in changes[1:])


def test_activations_are_offloaded_from_a_gpu_and_stay_with_a_cpu():
    whole = run("mistral", "7B")
    away = dataclasses.replace(whole, memory=dataclasses.replace(whole.memory, cpu_offloading_num_layers=32))
    entries, grid = manifest(ALL["mistral"], whole.model), resolve_grid(whole.parallel, 8)
    assert memory(whole, entries, grid)["activations"] > 0 == memory(away, entries, grid)["activations"]
    assert memory(whole, entries, grid, on_cpu=True) == memory(away, entries, grid, on_cpu=True)


def test_an_automatic_offload_is_planned_as_the_ranks_will_find_it():
    whole = run("mistral", "7B")
    auto = dataclasses.replace(whole, memory=dataclasses.replace(whole.memory, optimizer_offload_policy="auto"))
    grid, small = resolve_grid(whole.parallel, 8), dataclasses.replace(H200, memory=80 * GIB)
    before = describe(whole, ALL["mistral"], grid, dataclasses.replace(small, memory=10 * GIB))["memory"]
    tight = dataclasses.replace(small, memory=int(before["total"] / 0.9) - GIB)
    after = describe(auto, ALL["mistral"], grid, tight)["memory"]
    assert not describe(whole, ALL["mistral"], grid, tight)["memory"]["fits"] and after["fits"]
    assert after["host"] > 0 and before["optimizer"] > after["optimizer"] > 0


def test_what_was_typed_is_no_default():
    whole = run("mistral", "7B")
    grid = resolve_grid(whole.parallel, 1)
    section = describe(whole, ALL["mistral"], grid, H200, typed={"--clip-grad"})["defaults"]
    assert "--clip-grad" not in section and section["--weight-decay"] == 0.1
    assert "--lr" not in section and "--num-layers" not in section


def test_cpu_ranks_share_what_the_container_may_take(tmp_path):
    assert host_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    4194304 kB\n")
    assert resolve_machine(2, has_accelerator=False, root=tmp_path) == Machine("cpu", 2 * GIB, None, is_cpu=True)
    (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    limit = tmp_path / "sys" / "fs" / "cgroup" / "memory.max"
    limit.write_text("max\n")
    assert host_memory(tmp_path) == 4 * GIB
    limit.write_text(f"{GIB}\n")
    assert host_memory(tmp_path) == GIB


def test_a_gpu_is_known_by_its_driver(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 PCIe, 81559'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert resolve_machine(8, has_accelerator=True) == Machine("NVIDIA H100 PCIe", 81559 * 2**20, 756e12, is_cpu=False)
    tool.write_text("#!/bin/sh\nexit 9\n")
    folder = tmp_path / "proc" / "driver" / "nvidia" / "gpus" / "0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    assert resolve_machine(8, has_accelerator=True, root=tmp_path) == Machine("NVIDIA H200", None, 989e12, is_cpu=False)


def test_a_long_list_of_ranks_is_cut_for_people():
    rows = [{"rank": rank, "tp": rank % 2, "layers": "0–3" if rank < 20 else "4–7"} for rank in range(40)]
    lines = render({"ranks": rows, "warnings": [], "command": ["x"]}).splitlines()
    assert lines[:4] == ["ranks", "  rank   layers", "  0–19   0–3", "  20–39  4–7"]
    short = render({"ranks": rows[:3], "warnings": [], "command": ["x"]}).splitlines()
    assert short[2:5] == ["  0     0   0–3", "  1     1   0–3", "  2     0   0–3"]


def test_a_run_out_of_memory_is_told_what_would_need_less():
    whole = run("mistral", "7B", micro_batch=2, use_distributed_optimizer=False)
    told = out_of_memory(MemoryError("no more"), whole, resolve_grid(whole.parallel, 8))
    needed = dataclasses.replace(whole, parallel=ParallelConfig())
    total = memory(needed, manifest(ALL["mistral"], needed.model), resolve_grid(needed.parallel, 8), on_cpu=True)[
        "total"
    ]
    assert "out of memory (no more)" in told and f"DO=true: {total / GIB:.4g} GiB" in told and "SEQ_LEN" in told


def test_more_ranks_are_named_where_nothing_else_is_enough():
    whole = run("mistral", "7B", global_batch=4)
    entries = manifest(ALL["mistral"], whole.model)
    first, *others = advice(whole, entries, resolve_grid(whole.parallel, 1), 40 * GIB, on_cpu=False)
    kept = dataclasses.replace(whole.memory, optimizer_offload_policy="static", optimizer_offload_fraction=0.75)
    needed = memory(dataclasses.replace(whole, memory=kept), entries, resolve_grid(whole.parallel, 4))["total"]
    assert needed <= 40 * GIB and first == f"4 ranks and OPTIMIZER_OFFLOAD=0.75: {needed / GIB:.4g} GiB"
    assert others and all("not enough" in other for other in others)
