"""Generation as people start and leave it: the script, a terminal, Ctrl-C, the end of the input."""

import shutil
import subprocess
import sys
import time

import pytest
from commands import ROOT, clean_environment, through_shell
from tiny import VOCABULARY, write_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_patch.evaluate.__main__ import LOCAL
from megatron_patch.generate import arguments
from megatron_patch.launch import evaluation_tables, generation, generation_tables

SCRIPT = ROOT / "examples/mistral/generate_mistral_7b_ptd.sh"
SECONDS = 60.0
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]
# Gives a command a terminal of its own, so that what is typed may be Ctrl-C, and answers with its exit status.
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
CTRL_C = b"\x03"
WAYS_OUT = {  # ranks, what is typed at the first question, at the second
    "Ctrl-C on one rank": (1, b"w3 w4\n", CTRL_C),
    "Ctrl-C on two": (2, b"w3 w4\n", CTRL_C),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_documented_generation_is_planned(shell, tmp_path):
    status, plan, err = through_shell(shell, SCRIPT, [], tmp_path, MP_DRY_RUN="1")
    assert status == 0, err
    command = plan["command"]
    assert command[1:3] == ["-m", "megatron_patch.train.agent"]
    assert command[command.index("--nproc-per-node") + 1] == "8"
    assert command[command.index("-m", 3) + 1] == "megatron_patch.generate"
    assert command[command.index("--tp") + 1] == "8" and command[command.index("--precision") + 1] == "bf16"
    first = command.index("--task") + 1
    assert command[first : first + 2] == ["greedy", "do_sample"] and "how are you?" in command


def test_the_launchers_name_what_the_commands_behind_them_do():
    flags = {name for action in arguments._reader()._actions for name in action.option_strings}
    decided = {"-h", "--help", "--checkpoint", "--tokenizer", "--tp", "--pp", "--ep", "--precision"}
    tabled = {arg.name for arg in generation_tables.GENERATION}
    assert {*generation.OPTIONS} <= flags - decided <= {*generation.OPTIONS, *tabled}
    assert generation.TASKS == arguments.TASKS
    assert tuple(evaluation_tables.TASKS.values()) == LOCAL


def test_what_follows_the_script_counts_and_one_rank_needs_no_agent(tmp_path):
    words = ["--task", "chat", "--inference-prompt-type", "mixtral"]
    status, plan, err = through_shell("sh", SCRIPT, words, tmp_path, MP_DRY_RUN="1", TP="1", GPUS_PER_NODE="1")
    assert status == 0, err
    assert plan["command"][1:3] == ["-m", "megatron_patch.generate"] and plan["command"][-4:] == words


@pytest.mark.parametrize(
    ("words", "variables", "sentence"),
    [
        ([], {}, "config.json does not exist"),
        (["--sing"], {}, "--sing"),
        ([], {"TP": "3"}, "num_attention_heads 4 is not a multiple of tensor_model_parallel_size 3"),
        ([], {"TP": "1", "GPUS_PER_NODE": "3", "PP": "2"}, "tp 1 × pp 2 × cp 1 = 2 does not divide 3 ranks"),
    ],
)
def test_a_script_that_cannot_run_is_refused(tmp_path, words, variables, sentence):
    if variables:
        write_model(tmp_path / "model", "mistral")
        variables = {"CHECKPOINT": "model", "TOKENIZER_MODEL": "model", "GPUS_PER_NODE": "3"} | variables
    status, out, err = through_shell("sh", SCRIPT, words, tmp_path, **variables)
    assert (status, out) == (2, "") and sentence in err


class Terminal:
    """The script on a terminal."""

    def __init__(self, folder, ranks):
        given = {"CHECKPOINT": "model", "TOKENIZER_MODEL": "model", "TP": str(ranks), "GPUS_PER_NODE": str(ranks)}
        command = ["sh", str(SCRIPT), "--task", "chat", "--max-new-tokens", "5", "--seed", "3"]
        self.output = folder / f"{time.monotonic_ns()}"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", TERMINAL, *command],
                cwd=folder,
                env=clean_environment(OMP_NUM_THREADS="1", **given),
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def types(self, keys, after, times):
        """Type `keys` once the terminal has shown `after` so often."""
        deadline = time.monotonic() + SECONDS
        while self.text().count(after) < times:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        self.process.stdin.write(keys)
        self.process.stdin.flush()

    def text(self):
        """What the terminal shows."""
        return self.output.read_bytes().decode("utf-8", "replace")


@pytest.fixture(scope="module")
def terminals(tmp_path_factory):
    """One for each way out, started together."""
    folder = tmp_path_factory.mktemp("terminals")
    write_model(folder / "model", "mistral")
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"unk_token": "w0", "bos_token": "w2", "eos_token": "w1"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder / "model")
    started = {name: Terminal(folder, ranks) for name, (ranks, _, _) in WAYS_OUT.items()}
    yield started
    for terminal in started.values():
        terminal.process.kill()
        terminal.process.wait()


@pytest.mark.parametrize("name", WAYS_OUT)
def test_a_conversation_is_left_cleanly(terminals, name):
    terminal, (_, first, second) = terminals[name], WAYS_OUT[name]
    terminal.types(first, "You: ", 1)
    terminal.types(second, "You: ", 2)
    assert "Answer: w" in terminal.text()
    status = terminal.process.wait(SECONDS)
    assert status == 0, terminal.text()
    assert "Traceback" not in terminal.text()


def test_two_ranks_speak_once_and_the_end_of_the_input_ends_their_conversation(terminals):
    folder = terminals["Ctrl-C on two"].output.parent
    how = ["--task", "greedy", "chat", "--prompt", "w5 w6", "--max-new-tokens", "4"]
    sizes = {"TP": "1", "PP": "2", "GPUS_PER_NODE": "2", "CHECKPOINT": "model", "TOKENIZER_MODEL": "model"}
    found = subprocess.run(
        ["sh", str(SCRIPT), *how],
        cwd=folder,
        env=clean_environment(OMP_NUM_THREADS="1", **sizes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("You: w5 w6\nAnswer: w") == 1 and found.stdout.endswith("begins anew)\nYou: \n")
