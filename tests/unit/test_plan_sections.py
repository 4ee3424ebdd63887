"""The plan's numbers against known answers, and its memory against tensors that PyTorch really allocates."""

import dataclasses
import json
import shlex
import struct
from dataclasses import asdict

import pytest
import torch

from megatron_patch.config.flags import from_flags
from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.model.build import build_model
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.mesh import single_process
from megatron_patch.plan.describe import describe
from megatron_patch.plan.disk import look
from megatron_patch.plan.memory import local_shape, memory
from megatron_patch.plan.schedule import iterations, schedule
from megatron_patch.plan.start import resolve_start, start
from megatron_patch.plan.table import render
from megatron_patch.train.optimizer import build_optimizer

MISTRAL = ALL["mistral"]


def run(tmp_path, *flags: str) -> RunConfig:
    base = shlex.split(
        "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2 "
        "--kv-channels 16 --vocab-size 101 --max-position-embeddings 64 --seq-length 32 --max-padding-length 48 "
        "--lr 1e-3 --min-lr 1e-4 --lr-decay-iters 9 --save-interval 5 --family mistral "
        "--train-iters 9 --micro-batch-size 2 --global-batch-size 8 --precision fp32"
    )
    paths = [
        "--train-data-path",
        f"{tmp_path}/d",
        "--valid-data-path",
        f"{tmp_path}/d",
        "--save",
        f"{tmp_path}/out/run",
    ]
    return from_flags([*base, *paths, "--load", f"{tmp_path}/start", *flags])


ENOUGH = [10] * 100  # documents: 99 to train on, 1 to validate on


def write_dataset(prefix, lengths: list[int]) -> None:
    """A .bin/.idx pair of uint16 tokens, one sequence per document, byte by byte from the format's description."""
    count = len(lengths)
    offsets = [2 * sum(lengths[:i]) for i in range(count)]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    body = struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *offsets, *range(count + 1))
    prefix.with_suffix(".idx").write_bytes(head + body)
    prefix.with_suffix(".bin").write_bytes(b"\x01\x00" * sum(lengths))


@pytest.mark.parametrize(
    ("amount", "warmup", "per_iteration", "is_fine_tuning", "expected"),
    [
        (10_000, 100, 8 * 128, False, (9, 0, 9)),
        (10_000, 100, 8 * 128, True, (10_000, 100, 9_900)),
        (10_000_000_000, 100_000, 8 * 2048, False, (610_351, 6, 610_351)),
        (1023, 0, 1024, False, (0, 0, 0)),
    ],
)
def test_iterations_are_the_documents(amount, warmup, per_iteration, is_fine_tuning, expected):
    assert iterations(amount, warmup, per_iteration, is_fine_tuning=is_fine_tuning) == expected


def test_the_schedule_counts_what_training_consumes(tmp_path):
    write_dataset(tmp_path / "d", ENOUGH)
    section = schedule(run(tmp_path), dp=2)
    assert (section["micro_batches"], section["samples"], section["tokens"]) == (2, 72, 72 * 32)
    assert section["dataset_tokens"] == 990  # 99 of 100 parts
    assert section["epochs"] == pytest.approx(72 * 32 / 990, abs=1e-4)
    assert schedule(run(tmp_path, "--valid-data-path", f"{tmp_path}/v"), dp=2)["dataset_tokens"] == 1000
    assert schedule(run(tmp_path, "--dataset", "JSON-SFT"), dp=2)["tokens"] == 72 * 48


def test_every_dataset_of_a_blend_has_its_own_epochs(tmp_path):
    write_dataset(tmp_path / "a", ENOUGH)
    write_dataset(tmp_path / "b", ENOUGH[:50])
    blend = ("--train-data-path", "3", f"{tmp_path}/a", "1", f"{tmp_path}/b", "--valid-data-path", f"{tmp_path}/v")
    section = schedule(run(tmp_path, *blend), dp=2)
    epochs = section["epochs_of_datasets"]
    assert epochs[f"{tmp_path}/a"] == pytest.approx(0.75 * 72 * 32 / 1000, abs=1e-4)
    assert epochs[f"{tmp_path}/b"] == pytest.approx(0.25 * 72 * 32 / 500, abs=1e-4)
    assert section["epochs"] is None
    (tmp_path / "b.idx").unlink()
    assert schedule(run(tmp_path, *blend), dp=2)["epochs_of_datasets"][f"{tmp_path}/b"] is None
    assert schedule(run(tmp_path), dp=2)["epochs_of_datasets"] == {}


def test_memory_of_one_process_is_what_pytorch_allocates(tmp_path):
    whole = run(tmp_path)
    (model,) = build_model(whole.model, whole.parallel, "fp32", single_process())
    optimizer = build_optimizer(whole.optimizer, [model])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = sum(parameter.nbytes for parameter in model.parameters())
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    section = memory(whole, manifest(MISTRAL, whole.model), Grid(tp=1, cp=1, ep=1, pp=1, etp=1, world=1))
    assert section["master_weights"] == section["gradients"] == held
    assert section["optimizer"] == moments
    assert section["working_copy"] == 0
    assert section["total"] >= 2 * held + moments
    assert section["total"] <= 2 * held + moments + 1.1 * (section["activations"] + section["logits"])


def test_a_tensor_parallel_rank_holds_equal_parts_and_padded_vocabulary(tmp_path):
    shapes = {entry.mcore: local_shape(entry, 2) for entry in manifest(MISTRAL, run(tmp_path).model)}
    assert shapes["embedding.word_embeddings.weight"] == (51, 64)
    assert shapes["decoder.layers.1.self_attention.linear_qkv.weight"] == (64, 64)
    assert shapes["decoder.layers.1.self_attention.linear_proj.weight"] == (64, 32)
    assert shapes["decoder.layers.1.mlp.linear_fc2.weight"] == (64, 48)
    assert shapes["decoder.final_layernorm.weight"] == (64,)


@pytest.mark.parametrize(
    ("flag", "shards"), [("--use-distributed-optimizer", 4), ("--no-use-distributed-optimizer", 1)]
)
def test_only_the_distributed_optimizer_shards_memory(tmp_path, flag, shards):
    whole = run(tmp_path, flag, "--precision", "bf16")
    entries = manifest(MISTRAL, whole.model)
    section = memory(whole, entries, Grid(tp=1, cp=1, ep=1, pp=1, etp=1, world=4))
    rows = [entry.shape for entry in entries]
    elements = sum(-(-shape[0] // shards) * (shape[1] if len(shape) > 1 else 1) for shape in rows)
    assert section["master_weights"] == 4 * elements
    assert section["optimizer"] == 8 * elements
    assert section["working_copy"] == 2 * elements * shards
    many = memory(
        dataclasses.replace(whole, global_batch_size=64), entries, Grid(tp=1, cp=1, ep=1, pp=1, etp=1, world=4)
    )
    assert many["accumulated_gradients"] == 4 * elements * shards
    alone = dataclasses.replace(whole, global_batch_size=4 * whole.micro_batch_size)
    one_each = Grid(tp=1, cp=1, ep=1, pp=1, etp=1, world=4)
    assert memory(alone, entries, one_each)["accumulated_gradients"] == 0


def test_what_is_missing_and_what_is_wrong_are_told_apart(tmp_path):
    now, wrong = look(run(tmp_path))
    assert [sentence.split()[0] for sentence in now] == ["dataset", "checkpoint"]
    assert wrong == []
    write_dataset(tmp_path / "d", [400, 600])
    (tmp_path / "d.bin").write_bytes(b"")
    (tmp_path / "start").mkdir()
    now, wrong = look(run(tmp_path))
    assert "holds none of latest_checkpointed_iteration.txt" in now[0]
    assert "d.bin has 0 bytes" in wrong[0]


def test_a_run_ready_to_start_has_nothing_in_its_way(tmp_path):
    prepare(tmp_path)
    assert look(run(tmp_path)) == ([], [])


def test_an_earlier_runs_checkpoints_are_kept_unless_overwritten(tmp_path):
    prepare(tmp_path)
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "latest_checkpointed_iteration.txt").write_text("9")
    now, _ = look(run(tmp_path))
    assert "already holds checkpoints" in now[0]
    assert "--overwrite" in now[0]
    assert look(run(tmp_path, "--overwrite")) == ([], [])


def test_an_earlier_launch_of_the_run_is_continued_and_another_run_is_kept(tmp_path):
    prepare(tmp_path)
    ours = run(tmp_path)
    iteration = tmp_path / "out" / "run" / "iter_0000009"
    iteration.mkdir(parents=True)
    (iteration / "run.json").write_text(json.dumps({"iteration": 9, "files": {}, "run": asdict(ours)}))
    assert look(ours) == ([], [])
    assert resolve_start(ours).candidates[0].iteration == 9
    assert start(ours) == {"begins": "where it stopped", "iterations_done": 9, "weights": str(iteration)}
    now, wrong = look(run(tmp_path, "--seed", "3"))
    assert (
        wrong == [] and "checkpoints of another run" in now[0] and "seed: 1234 in the recorded run, 3 in this" in now[0]
    )
    assert set(start(run(tmp_path, "--seed", "3")).values()) == {None}
    anew = run(tmp_path, "--seed", "3", "--overwrite")
    assert look(anew) == ([], [])
    assert start(anew) == {"begins": "anew", "iterations_done": 0, "weights": f"{tmp_path}/start"}
    assert "--resume is never" in look(run(tmp_path, "--resume", "never"))[0][0]
    (iteration / "run.json").write_text("{}")
    assert "run.json is damaged: it does not say 'iteration'; --resume-previous continues" in look(ours)[1][0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction"', "d, line 2, column 15: Expecting ':' delimiter"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}', "d, line 2: no output or content or"),
        ('[{"instruction": "a", "output": "b"}, 3]', "d, record 2: int instead of an object"),
    ],
)
def test_raw_records_that_say_nothing_are_refused_with_their_place(tmp_path, text, told):
    prepare(tmp_path)
    (tmp_path / "d").write_text(text)
    now, wrong = look(run(tmp_path, "--dataset", "JSON-SFT"))
    assert now == [] and len(wrong) == 1 and wrong[0].startswith(f"{tmp_path}/{told}")


def test_an_output_below_a_file_is_refused(tmp_path):
    prepare(tmp_path)
    (tmp_path / "out").write_text("")
    now, _ = look(run(tmp_path))
    assert "is a file" in now[0]


def test_a_split_that_leaves_one_side_empty_is_wrong(tmp_path):
    prepare(tmp_path)
    write_dataset(tmp_path / "d", [400, 600])
    _, wrong = look(run(tmp_path))
    assert wrong == [
        f"split '99,1,0' leaves nothing of dataset '{tmp_path}/d' (2 documents) for valid; change --split, or name "
        "another validation dataset"
    ]
    assert look(run(tmp_path, "--split", "50,50,0"))[1] == []
    assert "not a list of numbers" in look(run(tmp_path, "--split", "most"))[1][0]


def prepare(tmp_path) -> None:
    write_dataset(tmp_path / "d", ENOUGH)
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # whole, with no tensor


def test_the_table_shows_every_setting_that_counts_every_warning_and_the_command(tmp_path):
    whole = run(tmp_path)
    sections = describe(whole, MISTRAL, Grid(tp=1, cp=1, ep=1, pp=1, etp=1, world=1))
    plan = {"arguments": {}, **sections, "command": ["python", "a b"], "warnings": ["mind the step"]}
    text = render(plan)
    unused = {"num_moe_experts", "kv_lora_rank", "rope_type"}  # of a dense model, with plain rotary embeddings
    for section in sections.values():
        named = section[0] if isinstance(section, list) else section
        shown = {key for key in named if key in text}
        assert shown == set(named) or (section is sections["model"] and {"num_layers", "hidden_size"} <= shown)
    assert not any(key in text for key in unused)
    assert "warning: mind the step" in text
    assert text.endswith("python 'a b'")
