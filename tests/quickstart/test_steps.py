"""How the walk runs, reuses and stops at its steps, and what its summary accepts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart.memory import tree_memory
from examples.quickstart.steps import Step, StepError, run_all
from examples.quickstart.summary import check_gain, read_curve, unigram_entropy
from megatron_patch.data.indexed import IndexedDatasetBuilder


def step(title: str, made: Path, code: str = "import sys; open(sys.argv[1], 'a').write('x')") -> Step:
    """A step whose command runs `code` with the path of what it makes."""
    return Step(title, [sys.executable, "-c", code, str(made)], made)


def test_a_second_walk_reuses_every_step(tmp_path, capsys):
    steps = [step("first", tmp_path / "a"), step("second", tmp_path / "b")]
    before = run_all(steps, tmp_path / "log")
    capsys.readouterr()
    assert run_all(steps, tmp_path / "log") == before
    assert capsys.readouterr().out.count("reused") == 2
    assert (tmp_path / "a").read_text() == "x"


def test_when_a_result_is_gone_its_step_and_every_later_one_run_again(tmp_path, capsys):
    steps = [step(name, tmp_path / name) for name in ("a", "b", "c")]
    run_all(steps, tmp_path / "log")
    (tmp_path / "b").unlink()
    capsys.readouterr()
    run_all(steps, tmp_path / "log")
    assert capsys.readouterr().out.count("reused") == 1
    assert (tmp_path / "c").read_text() == "x"  # the old result was removed first


def test_a_failing_step_stops_the_walk_and_names_exit_code_and_log(tmp_path, capsys):
    failing = step("broken", tmp_path / "a", "print('the reason'); raise SystemExit(3)")
    with pytest.raises(StepError, match=r"'broken' ended with exit code 3") as error:
        run_all([failing, step("never", tmp_path / "b")], tmp_path / "log")
    log = tmp_path / "log" / "01-broken.log"
    assert str(log) in str(error.value) and "the reason" in str(error.value)
    assert log.read_text() == "the reason\n"
    assert not (tmp_path / "b").exists()
    assert failing.typed() in capsys.readouterr().out.replace("\n  ", "\n")


def test_what_is_printed_is_what_the_shell_would_run(tmp_path):
    words = ["sh", "train.sh", "dsw", "a b", "", "--eval-interval", "25"]
    typed = Step("t", words, tmp_path, variables={"MP_DATASET_TYPE": "raw"}).typed()
    assert typed.splitlines()[0] == "MP_DATASET_TYPE=raw sh train.sh \\"
    assert typed.splitlines()[-1] == "--eval-interval 25"
    shown = subprocess.run(
        ["dash", "-c", 'sh() { env | grep ^MP_DATASET_TYPE; printf "%s|" sh "$@"; }; ' + typed],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown == "MP_DATASET_TYPE=raw\n" + "".join(f"{word}|" for word in words)


def test_only_some_iterations_are_shown_and_only_their_interesting_fields(tmp_path, capsys):
    lines = [
        f" iteration {i:8d}/{40:8d} | consumed samples: 1 | tokens per second: 7 | lm loss: 5.0E+00 |"
        for i in range(1, 41)
    ]
    code = f"import sys; open(sys.argv[1], 'w'); print({chr(10).join(lines)!r})"
    made = tmp_path / "a"
    run_all([Step("t", [sys.executable, "-c", code, str(made)], made, shows="^ iteration")], tmp_path / "log")
    shown = [
        " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if "lm loss" in line and "/" in line
    ]
    shown = [line for line in shown if line.startswith("iteration")]
    assert shown == [f"iteration {i}/ 40 | tokens per second: 7 | lm loss: 5.0E+00" for i in (1, 25, 40)]
    assert len((tmp_path / "log" / "01-t.log").read_text().splitlines()) == 40


def test_memory_of_children_is_counted_and_mapped_files_are_not(tmp_path):
    hold = "import sys; x = bytearray(64 << 20); print('ready', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        before = tree_memory(child.pid)
        child.stdout.readline()
        assert 64 << 20 <= tree_memory(child.pid) < 128 << 20
        assert tree_memory(os.getpid()) >= tree_memory(child.pid) >= before
    finally:
        child.communicate()


def test_a_loss_that_falls_too_little_is_refused():
    with pytest.raises(ValueError, match=r"from 8\.300 to 6\.900 nats; it should fall by at least 1\.5"):
        check_gain(8.3, 6.9, entropy=9.0)


def test_a_loss_above_the_unigram_entropy_is_refused():
    with pytest.raises(ValueError, match=r"ended at 6\.200 nats, not below the corpus's unigram entropy of 6\.130"):
        check_gain(8.3, 6.2, entropy=6.13)
    check_gain(8.3, 6.1, entropy=6.13)


def test_a_loss_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="to nan nats"):
        check_gain(8.3, float("nan"), entropy=6.13)


def test_unigram_entropy_of_a_known_distribution(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "d", "uint16") as builder:
        builder.add([7, 7, 9, 4000], sequence_lengths=[3, 1], sequences_per_document=[1, 1])
    assert unigram_entropy(tmp_path / "d") == pytest.approx(1.0397207708)  # 1.5 bits


def test_a_curve_is_read_from_the_log_of_a_run(tmp_path):
    rows = [
        {"iteration": 0, "validation lm loss": 8.0},
        {"iteration": 1, "lm loss": 8.1, "tokens per second": 10.0},
        {"iteration": 2, "lm loss": 7.0, "tokens per second": 30.0, "validation lm loss": 7.5},
        {"iteration": 3, "lm loss": 6.0, "tokens per second": 20.0},
    ]
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = read_curve(tmp_path)
    assert curve.training == [(1, 8.1), (2, 7.0), (3, 6.0)]
    assert curve.validation == [(0, 8.0), (2, 7.5)]
    assert curve.tokens_per_second == 20.0
