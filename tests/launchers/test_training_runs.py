"""Every training launcher for real, at a tiny size: what it starts learns, saves and says what it was told to."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from commands import ROOT, StartedError, clean_environment, through_shell
from tiny import RECORDS, SCRIPTS, script_of, tiny_command, write_material

from megatron_patch.config.flags import from_flags
from megatron_patch.config.run import RunConfig
from megatron_patch.launch.__main__ import main
from megatron_patch.launch.tables import LAUNCHERS
from megatron_patch.parallel.mesh import single_process
from megatron_patch.train.loop import train

PATIENCE = 180  # seconds, for a busy machine
# What no other launcher does, and the scripts that people edit, through the shell; the others in this process.
THROUGH_DASH = ("qwen-megablocks-pretrain",)
SHORT = [*("--seq-length", "16", "--train-iters", "2", "--global-batch-size", "2", "--precision", "fp32")]
SCRIPT_FLAGS = {
    "mistral/pretrain_mistral_7b_ptd.sh": [
        *SHORT,
        *("--load", "mistral", "--finetune", "--model-size", "auto", "--use-mc2", "--pre-tockens", "65536"),
        *("--sliding-window", "4", "--eval-iters", "1", "--split", "90,10,0"),
    ],
}
MIXTRAL_FLAGS = [*SHORT, "--model-size", "auto", "--lr-warmup-iters", "0", "--tokenizer-model", "words"]
VALUES = {
    "DATA_PATH": "tokens", "TOKENIZER_MODEL": "words", "CKPT_SAVE_DIR": "out", "CHECKPOINT_PATH": "mixtral",
    "BLENDED_DATA": "0.6 tokens 0.4 tokens", "SAVE_PATH": "out", "GPUS_PER_NODE": "1", "TP": "1", "PP": "1",
    "WORLD_SIZE": "7",
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("material")
    write_material(folder, "mistral", "mixtral", "llama", "qwen1_5", "deepseek_v2")
    return folder


@pytest.fixture(scope="module")
def through_dash(material, tmp_path_factory):
    """Exit status, output and folder of each command that runs through the shell, all started together."""
    running = {}
    for name in (*THROUGH_DASH, *SCRIPT_FLAGS):
        folder = tmp_path_factory.mktemp(name.replace("/", "-"))
        for file in material.iterdir():
            (folder / file.name).symlink_to(file)
        is_table = name in SCRIPTS
        script = script_of(name) if is_table else ROOT / "examples" / name
        arguments = tiny_command(LAUNCHERS[name].tables[0], SCRIPTS[name][1]) if is_table else SCRIPT_FLAGS[name]
        variables = {"OMP_NUM_THREADS": "1", **({} if is_table else VALUES)}
        with (folder / "said").open("w") as said:
            command = ["sh", str(script), *arguments]
            process = subprocess.Popen(
                command, cwd=folder, env=clean_environment(**variables), stdout=said, stderr=subprocess.STDOUT
            )
        running[name] = process, folder
    yield running
    for process, _ in running.values():
        process.kill()
        process.wait()


def ended(through_dash, name: str) -> tuple[str, Path]:
    """What a command said, having succeeded, and where."""
    process, folder = through_dash[name]
    status, said = process.wait(PATIENCE), (folder / "said").read_text()
    assert status == 0, said
    return said, folder


def learned(run: RunConfig, folder: Path) -> list[dict]:
    """The lines of a run's log, every iteration with a loss."""
    lines = [json.loads(line) for line in (folder / run.log_file).read_text().splitlines()]
    assert [line["iteration"] for line in lines if "lm loss" in line] == list(range(1, run.train_iters + 1))
    return lines


def trained(launcher: str, arguments: list[str]) -> RunConfig:
    """Launch in this process, and become the one rank of the planned command."""
    with pytest.raises(StartedError) as started:
        main([launcher, *arguments])
    run = planned_run(started.value.args[0])
    train(run, single_process())
    return run


def planned_run(command: list[str]) -> RunConfig:
    """What the one rank of a planned command is told."""
    assert command[command.index("--nproc-per-node") + 1] == "1"
    return from_flags(command[command.index("megatron_patch.train") + 1 :])


IN_PROCESS = [
    (name, number) for name in SCRIPTS if name not in THROUGH_DASH for number in range(len(LAUNCHERS[name].tables))
]


@pytest.mark.usefixtures("through_dash")  # which goes on beside these
@pytest.mark.parametrize(("launcher", "table"), IN_PROCESS, ids=lambda value: str(value))
def test_what_a_launcher_starts_learns(material, tmp_path, monkeypatch, launcher, table):
    monkeypatch.chdir(material)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    arguments = tiny_command(LAUNCHERS[launcher].tables[table], SCRIPTS[launcher][1], OUTPUT_BASEPATH=str(tmp_path))
    run = trained(launcher, arguments)
    learned(run, material)
    assert run.train_iters == (2 * -(-RECORDS // 2) if "EPOCH" in table_names(launcher, table) else 2)
    assert run.checkpoint.upcycle == ("MOE" in table_names(launcher, table))
    assert (Path(run.checkpoint.save) / "latest_checkpointed_iteration.txt").read_text() == str(run.train_iters)


def table_names(launcher: str, number: int) -> list[str]:
    return [arg.name for arg in LAUNCHERS[launcher].tables[number]]


def test_an_epoch_ends_with_a_checkpoint(material, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(material)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    table = LAUNCHERS["llama-finetune"].tables[0]
    run = trained("llama-finetune", tiny_command(table, "llama", OUTPUT_BASEPATH=str(tmp_path)))
    assert "an epoch is 5 iterations of 2 samples" in capsys.readouterr().err
    saved = sorted(path.name for path in Path(run.checkpoint.save).glob("iter_*"))
    assert saved == ["iter_0000005", "iter_0000010"]


def test_a_dense_checkpoint_becomes_experts_through_dash(through_dash):
    said, folder = ended(through_dash, "qwen-megablocks-pretrain")
    assert "qwen1_5 is dense: each of 8 experts starts as a copy of its MLP" in said
    assert "starting from hf, 51 tensors, float32, upcycled to 8 experts" in said
    (directory,) = (folder / "out/checkpoint").iterdir()
    hf = json.loads((directory / "config.json").read_text())
    assert (hf["architectures"], hf["num_experts"], hf["num_experts_per_tok"]) == (["Qwen2MoeForCausalLM"], 8, 1)


def test_modellinks_script_trains_through_dash(through_dash):
    said, folder = ended(through_dash, "mistral/pretrain_mistral_7b_ptd.sh")
    assert "validation loss at iteration 2" in said and "starting from hf" in said
    assert len((folder / "logs/pretrain_mistral_7b_ptd.jsonl").read_text().splitlines()) == 3
    assert (folder / "out/iter_0000002").is_dir()


def test_mixtral_trains_script_plans_through_dash_a_run_that_validates_nothing(material, tmp_path, monkeypatch):
    monkeypatch.chdir(material)
    script, variables = ROOT / "examples/mixtral/mixtral_4x7b_example.sh", VALUES | {"SAVE_PATH": str(tmp_path)}
    status, plan, said = through_shell("sh", script, MIXTRAL_FLAGS, material, MP_DRY_RUN="1", **variables)
    assert status == 0, said
    run = planned_run(plan["command"])
    assert run.data.train_data_path == ("0.6", "tokens", "0.4", "tokens")
    train(run, single_process())
    assert not any("validation lm loss" in line for line in learned(run, material))
    assert (tmp_path / "iter_0000002").is_dir()


def test_experts_made_while_loading_compute_what_the_dense_model_does(material, tmp_path, monkeypatch):
    """The first validation is of the start weights: a mixture of copies must be the dense model."""
    monkeypatch.chdir(material)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    table, losses = LAUNCHERS["llama-mcore-pretrain"].tables[0], []
    for moe in ("true", "false"):
        run = trained(
            "llama-mcore-pretrain",
            [*tiny_command(table, "llama", MOE=moe, OUTPUT_BASEPATH=str(tmp_path)), "--split", "90,10,0"],
        )
        losses.append(learned(run, material)[0]["validation lm loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_was_made_of_a_dense_checkpoint_is_a_mixture_to_the_next_run(material, tmp_path, monkeypatch):
    monkeypatch.chdir(material)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    table = LAUNCHERS["qwen-mcore-pretrain"].tables[0]
    first = trained("qwen-mcore-pretrain", tiny_command(table, "qwen1_5", OUTPUT_BASEPATH=str(tmp_path / "first")))
    paths = {"PRETRAIN_CHECKPOINT_PATH": first.checkpoint.save, "OUTPUT_BASEPATH": str(tmp_path / "second")}
    second = trained("qwen-mcore-pretrain", tiny_command(table, "qwen1_5", **paths))
    assert second.model == first.model and not second.checkpoint.upcycle


def test_what_training_wrote_becomes_experts_too(material, tmp_path, monkeypatch):
    monkeypatch.chdir(material)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    table, losses = LAUNCHERS["llama-mcore-pretrain"].tables[0], []
    start = "llama"
    for moe in ("false", "true"):
        paths = {"PRETRAIN_CHECKPOINT_PATH": start, "OUTPUT_BASEPATH": str(tmp_path / moe)}
        run = trained("llama-mcore-pretrain", [*tiny_command(table, "llama", MOE=moe, **paths), "--split", "90,10,0"])
        losses.append([line.get("validation lm loss") for line in learned(run, material)])
        start = run.checkpoint.save
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=1e-6)


def test_experts_of_another_width_than_the_dense_model_are_refused(material, tmp_path, monkeypatch):
    monkeypatch.chdir(material)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    command = tiny_command(LAUNCHERS["llama-mcore-pretrain"].tables[0], "llama", OUTPUT_BASEPATH=str(tmp_path))
    with pytest.raises(
        ValueError, match="an MLP 24 wide; the 8 experts of this run are made of a dense model's, 12 wide"
    ):
        trained("llama-mcore-pretrain", [*command, "--moe-ffn-hidden-size", "12", "--ffn-hidden-size", "12"])
    assert not list(tmp_path.rglob("iter_*"))
