"""Answers on several ranks: the tokens and scores of one process, on every one of them."""

import pytest
import torch

from answers import answers, write_checkpoint
from ranks import run_ranks

TP, PP, EP = ({name: 2} for name in ("tp", "pp", "ep"))


@pytest.mark.parametrize(
    ("name", "world", "sizes"),
    [
        ("mistral", 2, (TP, PP, {})),
        ("mistral", 4, (TP | PP, TP)),
        ("qwen1_5 tied", 2, (PP, TP)),
        ("mixtral", 2, (TP, EP)),
        ("deepseek_v2", 2, (TP, PP, EP)),
    ],
)
def test_every_rank_of_a_layout_answers_as_one_process(tmp_path, name, world, sizes):
    torch.set_num_threads(1)
    write_checkpoint(tmp_path, name)
    (wanted,) = answers(tmp_path)
    for found in run_ranks(answers, world, tmp_path, sizes):
        for ways, likelihoods in found:
            for completions, references in zip(ways, wanted[0], strict=True):
                for completion, reference in zip(completions, references, strict=True):
                    assert completion.tokens == reference.tokens
                    assert completion.log_probs == pytest.approx(reference.log_probs, abs=1e-4)
                    assert completion.score == pytest.approx(reference.score, abs=1e-4)
            for (value, is_greedy), reference in zip(likelihoods, wanted[1], strict=True):
                assert (pytest.approx(value, abs=1e-4), is_greedy) == reference
