"""How a started command ends: asked to stop, asked twice, killed, or because a rank failed. All start at once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from commands import MISTRAL, PRETRAINING, changed, clean_environment
from tiny import VOCABULARY, write_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.indexed import IndexedDatasetBuilder

PATIENCE = 180.0  # seconds, for a busy machine
AGENT = [sys.executable, "-m", "megatron_patch.train.agent", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
TWO_RANKS = ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m"]


class Command(NamedTuple):
    """A running command, and the file that has its output."""

    process: subprocess.Popen
    output: Path

    def says(self, pattern: str, times: int = 1) -> list[str]:
        """Wait until it has said so; what was found."""
        deadline = time.monotonic() + PATIENCE
        while len(found := re.findall(pattern, text := self.output.read_text(), re.MULTILINE)) < times:
            is_waiting = self.process.poll() is None and time.monotonic() < deadline
            assert is_waiting, f"never said {pattern!r}: {text}"
            time.sleep(0.02)
        return found

    def ends(self) -> tuple[int, str]:
        """Exit status and output."""
        return self.process.wait(PATIENCE), self.output.read_text()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Every command of this file, started together: most of their time is torch's import."""
    folder = tmp_path_factory.mktemp("commands")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])

    def start(name: str, *argv: str, **variables: str) -> Command:
        environment = clean_environment(PYTHONPATH=path, OMP_NUM_THREADS="1", **variables)
        output = folder / f"{name}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(argv, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder)
        return Command(process, output)

    started = {"train": start("train", "sh", str(MISTRAL), *training(folder), NPROC_PER_NODE="2")}
    for name, what in (("twice", "wait"), ("kill", "wait"), ("hang", "hang"), ("die", "die"), ("refuse", "refuse")):
        started[name] = start(name, *AGENT, *TWO_RANKS, "restless", what)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for node in ("0", "1"):
        meeting = ["--nnodes", "2", "--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port]
        started[f"node {node}"] = start(f"node{node}", *AGENT[:3], *meeting, "-m", "restless", "die")
    yield started
    for command in started.values():
        command.process.kill()
        command.process.wait()


def training(folder: Path) -> list[str]:
    """The launcher's arguments of a run that would take days, of a tiny model."""
    write_model(folder / "model", "mistral")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder / "model")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (40, 64))
    with IndexedDatasetBuilder(folder / "data", "uint16") as builder:
        builder.add(tokens.ravel(), [64] * 40, [1] * 40)
    data = str(folder / "data")
    sizes = {"BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "2", "SEQ_LEN": "16", "PAD_LEN": "16", "TP": "2", "PR": "fp32"}
    paths = {"DATASET_PATH": data, "VALID_DATASET_PATH": data, "PRETRAIN_CHECKPOINT_PATH": str(folder / "model")}
    length = {"TRAIN_TOKENS_OR_ITERS": str(32 * 10**6), "WARMUP_TOKENS_OR_ITERS": "0", "OUTPUT_BASEPATH": str(folder)}
    return [
        *changed(PRETRAINING, MODEL_SIZE="auto", **sizes, **paths, **length),
        "--eval-iters",
        "1",
        "--split",
        "90,10,0",
    ]


def is_running(pid: str) -> bool:
    """Whether the process is there and no mere entry of one that ended."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def have_ended(pids: list[str]) -> bool:
    """Whether they do within a second."""
    for _ in range(50):
        if not any(is_running(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_the_launcher_asked_to_stop_saves_and_ends_with_status_0(commands):
    command = commands["train"]
    command.says(r"^ iteration +2/")
    command.process.send_signal(signal.SIGTERM)
    status, output = command.ends()
    assert status == 0, output
    assert "megatron_patch.train: SIGTERM: the ranks finish their step and save" in output
    last = re.findall(r"^ iteration +(\d+)/", output, re.MULTILINE)[-1]
    assert f"iteration {last} is the last" in output and "Traceback" not in output
    (tracker,) = command.output.parent.glob("checkpoint/*/latest_checkpointed_iteration.txt")
    assert tracker.read_text().strip() == last
    (log,) = command.output.parent.glob("log/*.jsonl")
    assert json.loads(log.read_text().splitlines()[-1])["iteration"] == int(last)


def test_a_second_signal_ends_it_at_once(commands):
    pids = commands["twice"].says(r"^up (\d+)$", 2)
    commands["twice"].process.send_signal(signal.SIGINT)
    commands["twice"].says("SIGINT: the ranks end")
    time.sleep(0.6)  # less would be the same request, sent twice
    assert all(is_running(pid) for pid in pids)
    commands["twice"].process.send_signal(signal.SIGINT)
    status, output = commands["twice"].ends()
    assert status == 128 + signal.SIGINT and "since the last checkpoint is lost" in output, output
    assert have_ended(pids)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent died")
def test_an_agent_that_is_killed_leaves_no_rank(commands):
    pids = commands["kill"].says(r"^up (\d+)$", 2)
    commands["kill"].process.kill()
    assert have_ended(pids)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hang", "rank 1 did not answer, at restless.py line 18 in hang; rank 0: waited too long"),
        ("die", "rank 1 was killed by SIGSEGV"),
        ("refuse", "ranks 0, 1: no such thing"),
        ("node 1", "rank 1 was killed by SIGSEGV"),
        ("node 0", "on another node: rank 1 was killed by SIGSEGV"),
    ],
)
def test_a_failure_is_one_line_with_the_rank_that_caused_it(commands, name, told):
    status, output = commands[name].ends()
    assert status == 1
    assert [line for line in output.splitlines() if not line.startswith("up ")] == [f"restless: {told}"]


def test_a_request_before_any_rank_was_started_ends_it_in_order(tmp_path):
    process = subprocess.Popen(
        [*AGENT, *TWO_RANKS, "restless", "wait"], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "stopped" in told
