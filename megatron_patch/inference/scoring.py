"""How likely a model finds given tokens. Shapes: B rows, L tokens, T scored tokens of all rows, V vocabulary."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megatron_patch.inference.forward import Forward

BLOCK = 1024  # tokens whose logits over the whole vocabulary are held at a time


def score(forward: Forward, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
    """For each row of tokens, of which the last `count` are scored: the sum of their log-probabilities, and whether
    each is the likeliest token where it stands. One pass of the model."""
    logits = forward.run(forward.padded([tokens[:-1] for tokens, _ in rows]))
    sums, greedy = forward.agree(lambda: _sums(forward, logits, rows), (len(rows),))[::-1]
    return [(value, bool(flag)) for value, flag in zip(sums.tolist(), greedy.tolist(), strict=True)]


def _sums(forward: Forward, logits: Tensor, rows: Sequence[tuple[Sequence[int], int]]) -> tuple[Tensor, Tensor]:
    parts = [logits[row, len(tokens) - 1 - count : len(tokens) - 1] for row, (tokens, count) in enumerate(rows)]
    wanted_T = torch.tensor([token for tokens, count in rows for token in tokens[-count:]], device=logits.device)
    found = [
        _log_probs(forward.whole(block), wanted)
        for block, wanted in zip(torch.cat(parts).split(BLOCK), wanted_T.split(BLOCK), strict=True)
    ]
    log_probs_T, is_best_T = (torch.cat(column) for column in zip(*found, strict=True))
    bounds = list(pairwise(accumulate((count for _, count in rows), initial=0)))
    sums = torch.stack([log_probs_T[begin:end].sum() for begin, end in bounds])
    return torch.stack([is_best_T[begin:end].all() for begin, end in bounds]).long(), sums


def _log_probs(logits_TV: Tensor, wanted_T: Tensor) -> tuple[Tensor, Tensor]:
    log_probs_TV = logits_TV.log_softmax(-1)
    return log_probs_TV.gather(1, wanted_T[:, None]).squeeze(1), log_probs_TV.argmax(-1) == wanted_T
