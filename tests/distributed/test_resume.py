"""What ranks save is one set of whole tensors, and a run goes on from it: the same on any layout, exact on its own."""

import dataclasses
from pathlib import Path

import pytest
import torch

from kill_rounds import kill_rounds
from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.model.build import build_model
from megatron_patch.parallel.agreement import host_group
from megatron_patch.parallel.mesh import single_process
from megatron_patch.parallel.progress import Progress
from megatron_patch.train.loop import train
from megatron_patch.train.optimizer import build_optimizer
from megatron_patch.train.resume import begin, find_beginning
from megatron_patch.train.save import Saver
from ranks import run_ranks
from tiny_run import check_same_tensors, go_back, losses, mesh_of, saved, tiny_run, train_on_ranks


def layout(**sizes) -> ParallelConfig:
    """Parallel sizes by their short names."""
    names = {"tp": "tensor", "pp": "pipeline", "ep": "expert"}
    sizes = {f"{names[key]}_model_parallel_size" if key in names else key: size for key, size in sizes.items()}
    return ParallelConfig(**sizes)


ALONE = ParallelConfig()


def resaved_on_ranks(run, world: int, target: str) -> list[str]:
    """Load the run's checkpoint on this layout and save it again without a step; what was said."""
    mesh = mesh_of(run, world)
    progress, said = Progress(host_group(mesh)), []
    entries = manifest(ALL[run.family], run.model)
    beginning = find_beginning(run, progress)
    chunks = build_model(run.model, run.parallel, run.precision, mesh)
    optimizer = build_optimizer(run.optimizer, chunks)
    begin(run, beginning, chunks, optimizer, entries, mesh, progress)
    elsewhere = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, save=target))
    saver = Saver(elsewhere, chunks, optimizer, entries, mesh, progress, said.append)
    saver.save(beginning.iteration, {})
    saver.finish()
    return said


ROUNDS = {
    "mistral": [(layout(tp=2, sequence_parallel=True), 4), (layout(tp=2, use_distributed_optimizer=False), 4)],
    "llama": [(ALONE, 3), (layout(pp=2, tp=2), 4), (layout(context_parallel_size=2), 4)],
    "qwen1_5 tied": [(layout(pp=2, use_distributed_optimizer=False), 4), (layout(tp=4), 4)],
    "mixtral": [(layout(ep=2, tp=2, sequence_parallel=True), 4), (layout(ep=4), 4)],
    "deepseek_v2": [
        (layout(ep=2, tp=2, expert_tensor_parallel_size=1, sequence_parallel=True), 4),
        (layout(pp=2, ep=2), 4),
    ],
}


@pytest.mark.parametrize("name", ROUNDS)
def test_weights_and_optimizer_pass_through_every_layout_bit_for_bit(name, tmp_path):
    run = tiny_run(tmp_path, name)
    train(dataclasses.replace(run, train_iters=2), single_process())
    first = current = Path(run.checkpoint.save) / "iter_0000002"
    for number, (parallel, world) in enumerate(ROUNDS[name]):
        target = tmp_path / str(number)
        target.mkdir()
        checkpoint = dataclasses.replace(run.checkpoint, save=str(tmp_path / "none"), resume=str(current))
        loading = dataclasses.replace(run, parallel=parallel, checkpoint=checkpoint)
        said, *_ = run_ranks(resaved_on_ranks, world, loading, world, str(target))
        assert said == [f" saved checkpoint of iteration 2 in {target}"]
        current = target / "iter_0000002"
        check_same_tensors(first, current)
        assert saved(current)["random.cpu"].shape[0] == world


def test_a_run_continues_bit_for_bit_on_its_layout_and_closely_on_another(tmp_path):
    run = tiny_run(tmp_path, parallel=layout(tp=2, sequence_parallel=True))
    run_ranks(train_on_ranks, 4, run, 4)
    whole = losses(run)
    assert list(whole) == [1, 2, 3, 4]
    same = go_back(run, 2, tmp_path / "same")
    run_ranks(train_on_ranks, 4, same, 4)
    assert losses(same) == whole
    check_same_tensors(Path(run.checkpoint.save) / "iter_0000004", Path(same.checkpoint.save) / "iter_0000004")
    other = dataclasses.replace(go_back(run, 2, tmp_path / "other"), parallel=layout(use_distributed_optimizer=False))
    run_ranks(train_on_ranks, 2, other, 2)
    assert losses(other) == pytest.approx(whole, rel=1e-5)


def test_a_float16_run_goes_on_with_the_loss_scale_that_it_had_found(tmp_path):
    run = dataclasses.replace(tiny_run(tmp_path), precision="fp16")
    run_ranks(train_on_ranks, 2, run, 2)
    assert losses(run, "loss scale")[1] > losses(run, "loss scale")[4], "nothing was to be remembered"
    same = go_back(run, 2, tmp_path / "same")
    run_ranks(train_on_ranks, 2, same, 2)
    for name in ("loss scale", "lm loss"):
        assert losses(same, name) == losses(run, name)
    check_same_tensors(Path(run.checkpoint.save) / "iter_0000004", Path(same.checkpoint.save) / "iter_0000004")


CLASSIC = {
    "mistral": (layout(tp=2, pp=2, decoder_first_pipeline_num_layers=1), 4, 4),
    "qwen1_5 tied": (layout(pp=2, num_layers_per_virtual_pipeline_stage=1), 2, 2),
    "mixtral": (layout(tp=2, ep=2, sequence_parallel=True), 4, 4),
    "deepseek_v2": (layout(tp=2, ep=4, expert_tensor_parallel_size=1, sequence_parallel=True), 4, 4),
}


@pytest.mark.parametrize("name", CLASSIC)
def test_classic_files_of_any_layout_hold_the_weights_that_were_trained(name, tmp_path):
    parallel, world, files = CLASSIC[name]
    run = dataclasses.replace(tiny_run(tmp_path, name), train_iters=2)
    if name == "mistral":  # 5 layers: 1 and 4
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=5))
    train(run, single_process())
    trained = Path(run.checkpoint.save) / "iter_0000002"
    checkpoint = dataclasses.replace(run.checkpoint, save=str(tmp_path / "none"), resume=str(trained))
    checkpoint = dataclasses.replace(checkpoint, ckpt_format="torch")
    classic = tmp_path / "classic"
    loading = dataclasses.replace(run, parallel=parallel, checkpoint=checkpoint)
    run_ranks(resaved_on_ranks, world, loading, world, str(classic))
    check_classic(run, classic, files, saved(trained))


def check_classic(run, root: Path, files: int, wanted: dict[str, torch.Tensor]) -> None:
    """Assert that `root` holds so many classic files, with these weights."""
    assert len(list(root.glob("iter_0000002/mp_rank_*/model_optim_rng.pt"))) == files
    source = open_checkpoint(root, ALL[run.family], run.model)
    for entry in manifest(ALL[run.family], run.model):
        assert torch.equal(source.read(entry), wanted[entry.mcore]), entry.mcore


def test_training_on_ranks_saves_classic_files_too(tmp_path):
    run = dataclasses.replace(tiny_run(tmp_path, parallel=layout(tp=2)), train_iters=2)
    classic = dataclasses.replace(run.checkpoint, save=str(tmp_path / "classic"), ckpt_format="torch")
    run_ranks(train_on_ranks, 4, run, 4)
    run_ranks(train_on_ranks, 4, dataclasses.replace(run, checkpoint=classic), 4)
    check_classic(run, Path(classic.save), 2, saved(Path(run.checkpoint.save) / "iter_0000002"))


def test_a_rank_whose_disk_is_full_fails_the_save_on_all_ranks_and_the_run_goes_on(tmp_path):
    run = tiny_run(tmp_path, save_interval=1)
    said = run_ranks(train_with_a_full_disk, 2, run, 2)
    assert [line for line in said[0] if "NOT saved" in line] == said[0][-2:-1]
    assert "File too large" in said[0][-2] and "training goes on" in said[0][-2]
    assert sorted(path.name for path in Path(run.checkpoint.save).glob("iter_*")) == [
        "iter_0000001",
        "iter_0000002",
        "iter_0000004",
    ]


def train_with_a_full_disk(run, world: int) -> list[str]:
    """Train, while rank 1 can write nothing of the third checkpoint; what was said of saving, on every rank."""
    import resource

    from megatron_patch.train import loop

    said = []

    class Recorded(Saver):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.say = said.append

        def save(self, iteration, state):
            self.wait()
            limit = 2000 if iteration == 3 and self.mesh.rank == 1 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            super().save(iteration, state)

    loop.Saver = Recorded
    train_on_ranks(run, world)
    return said


def test_a_run_killed_while_it_saves_goes_on_from_its_last_complete_checkpoint(tmp_path):
    assert len(kill_rounds(tmp_path, rounds=2, steps_a_round=4)) == 2
