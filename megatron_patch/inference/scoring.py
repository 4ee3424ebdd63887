"""How likely a model finds given tokens. Shapes: B rows, L tokens, T scored tokens of all rows, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megatron_patch.inference.forward import Forward

BLOCK = 1024  # tokens whose logits over the whole vocabulary are held at a time


@dataclass(frozen=True)
class Row:
    """Tokens, of which the last `count` are scored, and then each of `ends`: continuations that differ in one token."""

    tokens: Sequence[int]
    count: int
    ends: Sequence[int]


def score(forward: Forward, rows: Sequence[Row]) -> list[tuple[float, bool]]:
    """For each end of each row the sum of the scored tokens' log-probabilities and its own, and whether each of them is
    the likeliest token where it stands. One pass of the model."""
    logits = forward.run(forward.padded([row.tokens for row in rows]))
    answers = sum(len(row.ends) for row in rows)
    sums, greedy = forward.agree(lambda: _sums(forward, logits, rows), (answers,))[::-1]
    return [(value, bool(flag)) for value, flag in zip(sums.tolist(), greedy.tolist(), strict=True)]


def _sums(forward: Forward, logits: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    parts = [logits[number, _before(row)] for number, row in enumerate(rows)]
    wanted = [token for row in rows for token in (*row.tokens[len(row.tokens) - row.count :], *row.ends)]
    wanted_T = torch.tensor(wanted, device=logits.device)
    found = [
        _log_probs(forward.whole(block), wanted)
        for block, wanted in zip(torch.cat(parts).split(BLOCK), wanted_T.split(BLOCK), strict=True)
    ]
    log_probs_T, is_best_T = (torch.cat(column) for column in zip(*found, strict=True))
    bounds = pairwise(accumulate((row.count + len(row.ends) for row in rows), initial=0))
    spans = [(begin, begin + row.count, end) for row, (begin, end) in zip(rows, bounds, strict=True)]
    sums = [log_probs_T[begin:ends].sum() + log_probs_T[ends:end] for begin, ends, end in spans]
    greedy = [is_best_T[begin:ends].all() & is_best_T[ends:end] for begin, ends, end in spans]
    return torch.cat(greedy).long(), torch.cat(sums)


def _before(row: Row) -> list[int]:
    """Where in a row the logits of each scored token stand, and once for each end those of the ends."""
    last = len(row.tokens) - 1
    return [*range(last - row.count, last), *([last] * len(row.ends))]


def _log_probs(logits_TV: Tensor, wanted_T: Tensor) -> tuple[Tensor, Tensor]:
    log_probs_TV = logits_TV.log_softmax(-1)
    return log_probs_TV.gather(1, wanted_T[:, None]).squeeze(1), log_probs_TV.argmax(-1) == wanted_T
