"""Wrong command lines for the programs that launchers start, and that people start without them."""

from pathlib import Path

import pytest
from mutations import COUNT, PRECISION, RATE, TEXTS, WHOLE, Flags, mutations
from test_mutations import SEED

from megatron_patch import convert
from megatron_patch.data import __main__ as datasets
from megatron_patch.data import merge, preprocess, preprocess_instructions, preprocess_sft
from megatron_patch.doctor import __main__ as doctor
from megatron_patch.generate.arguments import read_arguments
from megatron_patch.train import agent

EACH = 50
SIZES = dict.fromkeys(("--tp", "--pp", "--ep", "--etp", "--upcycle-experts", "--upcycle-topk"), COUNT)
LIMITS = dict.fromkeys(("--max-length", "--max-new-tokens", "--top-k", "--seed"), WHOLE)
COMMANDS = {  # program → what it is called with, its positionals, its flags, and what of these its parser must refuse
    "convert": (
        convert.main,
        ["source", "target"],
        "--format mcore --tp 2 --pp 1 --ep 1 --etp 1 --transformer-impl te --dtype bf16 --upcycle-experts 8 "
        "--upcycle-topk 2",
        SIZES | {"--format": "--format", "--transformer-impl": "--transformer-impl", "--dtype": PRECISION},
    ),
    "generate": (
        read_arguments,
        [],
        "--checkpoint c --tp 2 --pp 1 --ep 1 --precision bf16 --prompt hello --task greedy --max-length 256 "
        "--max-new-tokens 128 --temperature 0.7 --top-k 50 --top-p 0.95 --length-penalty 1.0 --seed 3 --stop a",
        SIZES | LIMITS | {"--precision": PRECISION, "--task": "--task", "--top-p": RATE},
    ),
    "inspect": (
        datasets.main,
        ["inspect", "prefix"],
        "--seq-length 8 --train-iters 9 --global-batch-size 4 --iteration 7 --rank 3 --data-parallel-size 4 "
        "--documents 3 --tokenizer-model words",
        {},
    ),
    "cache": (
        datasets.main,
        ["cache", "prefix"],
        "--seq-length 8 --train-iters 9 --global-batch-size 4 --eval-iters 1 --data-cache-path indices --split 99,1,0",
        {},
    ),
    "documents": (
        preprocess.main,
        [],
        "--input text --output-prefix out --tokenizer-model words --json-keys text --append-eod --seq-length 8 "
        "--workers 1",
        {},
    ),
    "records": (
        preprocess_sft.main,
        [],
        "--input text --output-prefix out --tokenizer-model words --seq-length 8 --pack --workers 1",
        {},
    ),
    "instructions": (
        preprocess_instructions.main,
        [],
        "--input text --output-prefix out --tokenizer-model words --handler GeneralInstructionHandler --seq-length 8 "
        "--pack --prompt-type alpaca --workers 1",
        {},
    ),
    "merge": (merge.main, [], "--input in --output-prefix out", {}),
    "agent": (
        agent.parser().parse_args,
        [],
        "--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 --nnodes 1 --nproc-per-node 2 -m name",
        {},
    ),
}


def flags(text: str, kinds: dict[str, str]) -> Flags:
    """A command line as what mutations are drawn of; nothing in `kinds` may stand without a value."""
    given: list[tuple[str, list[str]]] = []
    for word in text.split():
        if word.startswith("--"):
            given.append((word, []))
        else:
            given[-1][1].append(word)
    needed = frozenset({"--format", "--checkpoint"} & {name for name, _ in given})
    return Flags(given, kinds, frozenset(kinds), frozenset(), needed, frozenset(), frozenset({"--task", "--stop"}))


def status_of(program, arguments: list[str]) -> int:
    """What the shell would see; 0 for a parser that is content."""
    try:
        status = program(arguments)
    except SystemExit as end:
        status = end.code
    return status if isinstance(status, int) else 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_changed_command_is_refused_in_one_sentence(command, capsys, tmp_path):
    program, positionals, text, kinds = COMMANDS[command]
    line = flags(text, kinds)
    for mutation in mutations(line, SEED, EACH):
        arguments = [*positionals, *mutation.arguments]
        status = status_of(program, arguments)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert status == 2 or not (kinds and mutation.told), mutation
        if status:
            assert captured.err.count("rror: ") <= 1
            parts = [part for text in arguments for part in (text, *text.split("="))]
            named = [*filter(str.strip, parts), *map(repr, parts), *(name for name, _ in line.given)]
            assert any(name in captured.err for name in named), captured.err
            assert "Traceback" not in captured.err
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_the_doctor_names_what_is_no_directory(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda directory: [])
    monkeypatch.setattr(doctor, "table", lambda findings: "")
    for text in TEXTS:
        for arguments in ([text], [text, "--json"], ["--json", text]):
            status = status_of(doctor.main, arguments)
            told = capsys.readouterr().err
            assert status == (0 if Path(text or ".").name[:1] in ("", ".") else 2), text
            assert not status or repr(text) in told or f"unrecognized arguments: {text}" in told, told
