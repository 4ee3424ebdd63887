"""Settings that follow a command's arguments: the same as if all had been given at once."""

import shlex

import pytest

from megatron_patch.config.flags import from_flags, to_flags, updated

BASE = from_flags(
    shlex.split(
        "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2 "
        "--kv-channels 16 --vocab-size 101 --max-position-embeddings 64 --seq-length 32 --max-padding-length 48 "
        "--lr 1e-3 --min-lr 1e-4 --lr-decay-iters 9 --save-interval 5 --family mistral --save out --train-data-path d "
        "--train-iters 9 --micro-batch-size 2 --global-batch-size 8 --valid-data-path d --tokenizer-model t"
    )
)


@pytest.mark.parametrize(
    "options",
    [
        "--lr 2e-3 --seed=7 --num-layers 4",
        "--no-use-flash-attn --sequence-parallel --precision fp32",
        "--train-data-path 0.3 'a b' 0.7 c --log-interval 3",
        "--lr 5e-3 --lr 6e-3",
    ],
)
def test_later_flags_replace_settings(options):
    later = shlex.split(options)
    assert updated(BASE, later) == from_flags([*to_flags(BASE), *later])
    assert updated(BASE, later) != BASE


@pytest.mark.parametrize("options", ["--lr fast", "--precision int8", "--lr 1e-3 stray", "--log-intervall 3", "--seed"])
def test_what_cannot_be_read_ends_the_program(options, capsys):
    with pytest.raises(SystemExit) as ended:
        updated(BASE, shlex.split(options))
    assert ended.value.code == 2
    assert options.split()[0] in capsys.readouterr().err or "stray" in options
