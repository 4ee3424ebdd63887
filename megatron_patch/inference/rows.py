"""Rows that are written token by token, the likeliest or a drawn one, and end each by itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from megatron_patch.inference.decoding import Decoding, choose
from megatron_patch.inference.forward import Forward

Ends = Callable[[Sequence[int]], bool]  # whether what follows a prompt is complete
OnToken = Callable[[int, int], None]  # the number of a row, its new token


@dataclass
class Row:
    """What is written after a prompt so far, up to `limit` tokens; it draws from its own generator."""

    number: int
    limit: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    is_stopped: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether nothing more is written."""
        return self.is_stopped or len(self.tokens) == self.limit


def write_rows(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    options: Decoding,
    ends: Ends,
    on_token: OnToken,
) -> list[Row]:
    """`num_return_sequences` rows for each of `prompts`, in order; `numbers` are those of the first row of each.

    Finished rows leave the batch, but for one where other data-parallel ranks still need this one's passes.
    """
    limits = [options.new_tokens(len(prompt), forward.config.max_position_embeddings) for prompt in prompts]
    cache, logits = forward.begin(prompts, max(len(p) + limit for p, limit in zip(prompts, limits, strict=True)))
    copies = [place for place in range(len(prompts)) for _ in range(options.num_return_sequences)]
    cache.select(copies)
    logits = None if logits is None else logits[copies]
    rows = []
    for position, place in enumerate(copies):
        number = numbers[place] + position % options.num_return_sequences
        rows.append(Row(number, limits[place], torch.Generator().manual_seed(options.seed + number)))
    held = rows
    while True:
        generators = [row.generator for row in held]
        tokens, log_probs = forward.agree(partial(choose, logits, options, generators), (len(held),))
        for row, token, log_prob in zip(held, tokens.tolist(), log_probs.tolist(), strict=True):
            if not row.is_finished:
                _add(row, token, log_prob, ends, on_token)
        busy = [place for place, row in enumerate(held) if not row.is_finished]
        if not forward.is_any_busy(bool(busy)):
            return rows
        kept = busy or [0]
        cache.select(kept)
        held = [held[place] for place in kept]
        logits = forward.step(tokens[kept].tolist(), cache)


def _add(row: Row, token: int, log_prob: float, ends: Ends, on_token: OnToken) -> None:
    row.tokens.append(token)
    row.log_probs.append(log_prob)
    row.is_stopped = ends(row.tokens)
    on_token(row.number, token)
