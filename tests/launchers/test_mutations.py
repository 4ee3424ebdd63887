"""Wrong command lines by the hundred: each is refused by the name of what is wrong, or is a run as it was said."""

import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import StartedError, clean_environment
from mutations import KINDS, Line, Mutation, mutations
from tiny import SCRIPTS, script_of, tiny_command, write_material

from megatron_patch.config.flags import from_flags
from megatron_patch.launch.__main__ import main
from megatron_patch.launch.tables import LAUNCHERS
from megatron_patch.launch.values import recomputation

IN_PROCESS, PER_SHELL, SEED = 300, 5, 20
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]
SEEN = {  # argument → what the started run says of it
    "BATCH_SIZE": lambda run: run.micro_batch_size,
    "GLOBAL_BATCH_SIZE": lambda run: run.global_batch_size,
    "LR": lambda run: run.optimizer.lr,
    "MIN_LR": lambda run: run.optimizer.min_lr,
    "SEQ_LEN": lambda run: run.data.seq_length,
    "PAD_LEN": lambda run: run.data.max_padding_length,
    "TP": lambda run: run.parallel.tensor_model_parallel_size,
    "PP": lambda run: run.parallel.pipeline_model_parallel_size,
    "CP": lambda run: run.parallel.context_parallel_size,
    "EP": lambda run: run.parallel.expert_model_parallel_size,
    "SAVE_INTERVAL": lambda run: run.checkpoint.save_interval,
    "TRAIN_ITERS": lambda run: run.train_iters,
}
SPELLED = {
    "PR": lambda run: run.precision,
    "DO": lambda run: str(run.parallel.use_distributed_optimizer).lower(),
    "FL": lambda run: str(run.use_flash_attn).lower(),
    "PRETRAIN_CHECKPOINT_PATH": lambda run: run.checkpoint.load or "none",
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_material(folder, *{family for _, family in SCRIPTS.values()})
    return folder


def names_of(launcher: str) -> list[str]:
    return [arg.name for arg in LAUNCHERS[launcher].tables[-1]]


def good(launcher: str) -> tuple[Line, list[str]]:
    """A command line that starts a run: the positionals, and the options behind them."""
    command, names = tiny_command(LAUNCHERS[launcher].tables[-1], SCRIPTS[launcher][1]), names_of(launcher)
    return Line(names, KINDS, command[: len(names)]), command[len(names) :]


def check_refusal(mutation: Mutation, names: list[str], told: str) -> None:
    """What must be named is, and nothing else is refused as unreadable; what only the plan refuses is named too."""
    assert "Traceback" not in told
    assert all(sentence in told for sentence in mutation.told), told
    if mutation.told:
        assert told.count("; allowed: ") == sum("; allowed: " in sentence for sentence in mutation.told), told
    else:
        flags = [text.split("=")[0] for text in (*names, *mutation.arguments) if text.startswith("--")]
        typed = [*mutation.arguments, *(word for text in mutation.arguments for word in text.split())]
        paths = [str(Path(text) / "config.json") for text in mutation.arguments] + [
            path.name for path in Path().glob("*.*")
        ]
        named = [*names, *flags, *(flag[2:].replace("-", "_") for flag in flags), *map(repr, typed), *paths]
        assert any(name in told for name in named), told


def check_start(mutation: Mutation, command: list[str]) -> None:
    """The run that would start is the one that was said."""
    assert not mutation.told
    run, texts = from_flags(command[command.index("megatron_patch.train") + 1 :]), mutation.texts
    for name, seen in SEEN.items():
        assert name not in texts or seen(run) == float(texts[name].strip()), name
    for name, seen in SPELLED.items():
        assert name not in texts or seen(run).lower() == texts[name].strip().lower(), name
    assert run.checkpoint.save.startswith(texts["OUTPUT_BASEPATH"].rstrip("/"))
    assert (run.memory.recompute_granularity == "full") == (recomputation(texts["AC"]) == "full")


@pytest.mark.parametrize("launcher", SCRIPTS)
def test_a_changed_command_is_refused_by_name_or_runs_as_it_says(material, monkeypatch, capsys, launcher):
    monkeypatch.chdir(material)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    line, options = good(launcher)
    before, started = sorted(material.iterdir()), 0
    for mutation in mutations(line, SEED, IN_PROCESS):
        try:
            status = main([launcher, *mutation.arguments, *options])
        except StartedError as become:
            check_start(mutation, become.args[0])
            started += 1
            capsys.readouterr()
            continue
        assert status == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        check_refusal(mutation, line.names, captured.err)
    assert 10 < started < IN_PROCESS / 2, "most are wrong, and some are not"
    assert sorted(material.iterdir()) == before


def test_a_changed_command_is_refused_through_the_shell_too(material):
    """Those that must be refused, so that nothing starts; a substring of an argument is never run."""
    jobs = []
    for launcher in SCRIPTS:
        line, options = good(launcher)
        wrong = [one for one in mutations(line, SEED + 1, 100) if one.told]
        for shell in SHELLS:
            picked = random.Random(f"{shell} {launcher}").sample(wrong, PER_SHELL)
            jobs += [(shell, launcher, line.names, one, options) for one in picked]
    before = sorted(material.iterdir())

    def run(job):
        shell, launcher, names, mutation, options = job
        command = [shell, str(script_of(launcher)), *mutation.arguments, *options]
        result = subprocess.run(command, cwd=material, env=clean_environment(), capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        check_refusal(mutation, names, result.stderr)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, jobs))
    assert len(jobs) == len(SCRIPTS) * len(SHELLS) * PER_SHELL
    assert sorted(material.iterdir()) == before
