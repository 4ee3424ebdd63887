"""A rank's command line in process: its exit status, and one sentence for what the user can mend."""

import shlex
import threading

import pytest
import torch

from megatron_patch.parallel.progress import HungError
from megatron_patch.train import __main__ as command

FLAGS = shlex.split(
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2 "
    "--kv-channels 16 --vocab-size 100 --max-position-embeddings 64 --train-data-path d --valid-data-path d "
    "--seq-length 32 --max-padding-length 48 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 9 "
    "--save s --save-interval 5 --load c --family mistral --train-iters 9 --micro-batch-size 2 --global-batch-size 8"
)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


def started(monkeypatch, error):
    """Let the rank's first step into the group raise `error`."""

    def start(_):
        raise error

    monkeypatch.setattr(command, "start_process_group", start)


def test_a_broken_rule_ends_the_rank_before_it_joins_the_others(monkeypatch, capsys):
    started(monkeypatch, AssertionError("the group was started"))
    assert command.main([*FLAGS, "--micro-batch-size", "3"]) == 1
    assert capsys.readouterr().err.startswith("megatron_patch.train: rank 0: global_batch_size 8 is not a multiple")


@pytest.mark.parametrize("error", [ValueError, OSError, OverflowError, HungError])
def test_what_the_user_can_mend_or_another_rank_did_is_one_sentence_and_a_failure(monkeypatch, capsys, error):
    started(monkeypatch, error("what to do"))
    assert command.main(FLAGS) == 1
    assert capsys.readouterr().err == "megatron_patch.train: rank 0: what to do\n"


def test_an_interruption_is_one_sentence_and_the_shells_status(monkeypatch, capsys):
    started(monkeypatch, KeyboardInterrupt())
    assert command.main(FLAGS) == 130
    assert capsys.readouterr().err == "megatron_patch.train: rank 0: interrupted\n"


def no_memory():
    """The error of an allocation that no machine can make."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    return caught.value


@pytest.mark.parametrize(
    "error", [lambda: MemoryError("what was wanted"), lambda: torch.OutOfMemoryError("what was wanted"), no_memory]
)
def test_without_memory_the_plans_estimate_and_the_arguments_that_lower_it_are_named(monkeypatch, capsys, error):
    started(monkeypatch, error())
    assert command.main(FLAGS) == 1
    message = capsys.readouterr().err
    assert message.startswith("megatron_patch.train: rank 0: out of memory (") and message.count("\n") == 1
    for part in (
        "master_weights",
        "gradients",
        "optimizer",
        "activations",
        "AC=full: ",
        "BATCH_SIZE=1: ",
        "SEQ_LEN",
    ):
        assert part in message
    assert "(what was wanted)" in message or "(DefaultCPUAllocator: can't allocate memory" in message


def test_a_defect_of_ours_shows_its_traceback(monkeypatch, capsys):
    started(monkeypatch, KeyError("x"))
    assert command.main(FLAGS) == 1
    assert "Traceback" in (message := capsys.readouterr().err) and message.endswith("rank 0: KeyError: 'x'\n")


def test_a_rank_that_cannot_close_its_groups_leaves_all_the_same(monkeypatch):
    left = threading.Event()
    monkeypatch.setattr("os._exit", lambda status: left.set() if status == 0 else None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: left.wait(20))
    command._leave(0.001)
    assert left.is_set()
