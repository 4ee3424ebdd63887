"""Wrong command lines by the hundred: each is refused by the name of what is wrong, or is a run as it was said."""

import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import StartedError, clean_environment
from mutations import Mutation, mutations
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


def good(launcher: str) -> tuple[list[str], list[str]]:
    """A command line that starts a run: the positionals, and the options behind them."""
    command, count = tiny_command(LAUNCHERS[launcher].tables[-1], SCRIPTS[launcher][1]), len(names_of(launcher))
    return command[:count], command[count:]


def check_refusal(mutation: Mutation, names: list[str], told: str) -> None:
    """What must be named is; nothing else is refused as unreadable."""
    if mutation.is_count:
        assert "arguments are needed" in told
        return
    unreadable = {name for name in names if f"({name}) is " in told and "; allowed: " in told}
    for name in mutation.wrong:
        assert (
            f"argument {names.index(name) + 1} ({name}) is {mutation.arguments[names.index(name)]!r}; allowed" in told
        )
    if mutation.wrong:
        assert unreadable == set(mutation.wrong), told
        assert (f"{len(names):3d}  OUTPUT_BASEPATH" in told) == (len(mutation.wrong) >= 3)
    assert "Traceback" not in told and told.strip()


def check_start(mutation: Mutation, names: list[str], command: list[str]) -> None:
    """The run that would start is the one that was said."""
    assert not mutation.wrong and not mutation.is_count
    run, texts = (
        from_flags(command[command.index("megatron_patch.train") + 1 :]),
        dict(zip(names, mutation.arguments, strict=True)),
    )
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
    names, (arguments, options) = names_of(launcher), good(launcher)
    before, started = sorted(material.iterdir()), 0
    for mutation in mutations(names, arguments, SEED, IN_PROCESS):
        try:
            status = main([launcher, *mutation.arguments, *options])
        except StartedError as become:
            check_start(mutation, names, become.args[0])
            started += 1
            capsys.readouterr()
            continue
        assert status == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        check_refusal(mutation, names, captured.err)
    assert 10 < started < IN_PROCESS / 2, "most are wrong, and some are not"
    assert sorted(material.iterdir()) == before


def test_a_changed_command_is_refused_through_the_shell_too(material):
    """Those that must be refused, so that nothing starts; a substring of an argument is never run."""
    jobs = []
    for launcher in SCRIPTS:
        names, (arguments, options) = names_of(launcher), good(launcher)
        wrong = [one for one in mutations(names, arguments, SEED + 1, 100) if one.wrong or one.is_count]
        for shell in SHELLS:
            picked = random.Random(f"{shell} {launcher}").sample(wrong, PER_SHELL)
            jobs += [(shell, launcher, names, one, options) for one in picked]
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
