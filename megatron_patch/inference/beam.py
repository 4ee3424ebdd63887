"""Beam search: of all texts the likeliest that keeping the best `num_beams` beginnings finds. As transformers has it.

Shapes: P prompts, B beams of a prompt, V vocabulary, K candidates of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_patch.inference.decoding import Decoding, filtered
from megatron_patch.inference.forward import Forward
from megatron_patch.inference.rows import Ends


class Beam(NamedTuple):
    """A text so far. `total`: the sum of its log-probabilities."""

    tokens: tuple[int, ...] = ()
    total: float = 0.0
    log_probs: tuple[float, ...] = ()
    is_stopped: bool = False


@dataclass
class Search:
    """The beams of one prompt: those that go on, best first, and the best that are complete, with their scores."""

    limit: int
    options: Decoding
    generator: torch.Generator
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    complete: list[tuple[float, Beam]] = field(default_factory=list)
    is_over: bool = False

    def extend(self, candidates: Sequence[tuple[int, int, float]], ends: Ends) -> list[int]:
        """Take the best of `candidates` (beam, token, sum), best first; returns which beam each running one was.

        Only a complete text among the first `num_beams` counts. The rest are there to take the places of these.
        """
        length, width = len(self.running[0].tokens) + 1, self.options.num_beams
        running, origins = [], []
        for place, (origin, token, total) in enumerate(candidates):
            beam = self._grown(self.running[origin], token, total, ends)
            if not beam.is_stopped and length < self.limit:
                running.append(beam)
                origins.append(origin)
            elif place < width:
                self.complete.append((self._score(beam.total, length), beam))
        self.complete.sort(key=lambda scored: scored[0], reverse=True)
        del self.complete[width:]
        self.running = running[:width]
        self.is_over = not self.running or not self._can_improve(length)
        return origins[:width]

    def _grown(self, beam: Beam, token: int, total: float, ends: Ends) -> Beam:
        tokens = (*beam.tokens, token)
        return Beam(tokens, total, (*beam.log_probs, total - beam.total), ends(tokens))

    def _score(self, total: float, length: int) -> float:
        return total / length**self.options.length_penalty

    def _can_improve(self, length: int) -> bool:
        """Whether the best running beam, were it complete as it is, would be better than the worst complete one."""
        if len(self.complete) < self.options.num_beams:
            return True
        return self._score(self.running[0].total, length) > self.complete[-1][0]


def search_beams(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    options: Decoding,
    stop_ids: Sequence[int],
    ends: Ends,
) -> list[Search]:
    """The finished search of each prompt; `numbers` seed those that draw. Raises ValueError for too many beams."""
    candidates = max(2, 1 + len(stop_ids)) * options.num_beams
    if candidates > forward.config.vocab_size:
        raise ValueError(f"num_beams {options.num_beams} is too many for a vocabulary of {forward.config.vocab_size}")
    limits = [options.new_tokens(len(prompt), forward.config.max_position_embeddings) for prompt in prompts]
    cache, logits = forward.begin(prompts, max(len(p) + limit for p, limit in zip(prompts, limits, strict=True)))
    searches = [
        Search(limit, options, torch.Generator().manual_seed(options.seed + number))
        for limit, number in zip(limits, numbers, strict=True)
    ]
    held = searches
    while True:
        found, totals = forward.agree(partial(_best, logits, held, candidates), (len(held), candidates))
        rows, tokens, first = [], [], 0
        for search, numbers_K, totals_K in zip(held, found.tolist(), totals.tolist(), strict=True):
            count = len(search.running)
            if not search.is_over:
                origins = search.extend(_listed(numbers_K, totals_K, forward.config.vocab_size), ends)
            if not search.is_over:
                rows += [first + origin for origin in origins]
                tokens += [beam.tokens[-1] for beam in search.running]
            first += count
        going_on = [search for search in held if not search.is_over]
        if not forward.is_any_busy(bool(going_on)):
            return searches
        if not going_on:  # other data-parallel ranks need this one's passes
            going_on, rows, tokens = [held[0]], [0], [0]
            held[0].running = [Beam()]
        held = going_on
        cache.select(rows)
        logits = forward.step(tokens, cache)


def _best(logits: Tensor, searches: Sequence[Search], count: int) -> tuple[Tensor, Tensor]:
    """Of each search the `count` best continuations [P, K], as beam · V + token, and their sums [P, K]."""
    found = []
    for search, logits_BV in zip(searches, logits.split([len(s.running) for s in searches]), strict=True):
        sums_B = torch.tensor([beam.total for beam in search.running], device=logits.device)
        log_probs_BV = logits_BV.log_softmax(-1)
        if search.options.do_sample:
            log_probs_BV = filtered(log_probs_BV, search.options)
        sums = (log_probs_BV + sums_B[:, None]).flatten()
        found.append(_drawn(sums, count, search.generator) if search.options.do_sample else sums.topk(count))
    return torch.stack([indices for _, indices in found]), torch.stack([values for values, _ in found])


def _drawn(sums: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Drawn without replacement: the largest after adding Gumbel noise (arXiv:1903.06059), in the order drawn."""
    noise = -torch.empty(sums.shape).exponential_(generator=generator).log()
    indices = (sums + noise.to(sums.device)).topk(count).indices
    return sums[indices], indices


def _listed(numbers: Sequence[int], sums: Sequence[float], vocabulary: int) -> list[tuple[int, int, float]]:
    """Candidates, best first; a filter may have left fewer than there are places."""
    pairs = sorted(zip(sums, numbers, strict=True), key=lambda pair: pair[0], reverse=True)
    return [(*divmod(number, vocabulary), total) for total, number in pairs if total > -torch.inf]
