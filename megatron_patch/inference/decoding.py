"""How the next token is chosen, and what becomes of a prompt. Shapes: B rows, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen: the likeliest, one drawn (`do_sample`), or the likeliest of whole texts (`num_beams`).

    Raises ValueError for a value out of range. `max_length` bounds a row with its prompt, where `max_new_tokens` is 0.
    `top_k` 0 and `top_p` 1 leave the distribution whole. A row draws from a generator of its own, of `seed` and its
    number, so that a batch draws what its rows alone would. `stop_ids` None: those of the checkpoint.
    """

    max_new_tokens: int = 128
    max_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int = 1234
    stop_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = (
            (self.max_new_tokens >= 0, f"max_new_tokens {self.max_new_tokens} must be 0 or more"),
            (self.max_new_tokens or self.max_length > 0, "max_new_tokens is 0 and max_length too; give one of them"),
            (0 < self.temperature < float("inf"), f"temperature {self.temperature} must be a number above 0"),
            (self.top_k >= 0, f"top_k {self.top_k} must be 0 (all tokens) or more"),
            (0 < self.top_p <= 1, f"top_p {self.top_p} must be above 0 and at most 1"),
            (self.num_beams >= 1, f"num_beams {self.num_beams} must be at least 1"),
            (self.num_return_sequences >= 1, f"num_return_sequences {self.num_return_sequences} must be at least 1"),
            (
                self.num_beams == 1 or self.num_return_sequences <= self.num_beams,
                f"num_return_sequences {self.num_return_sequences} is more than num_beams {self.num_beams}",
            ),
            (
                self.num_beams > 1 or self.do_sample or self.num_return_sequences == 1,
                f"num_return_sequences {self.num_return_sequences}: a greedy answer is one; sample, or use beams",
            ),
            ("" not in self.stop_strings, "a stop string is empty"),
        )
        broken = [sentence for holds, sentence in rules if not holds]
        if broken:
            raise ValueError("; ".join(broken))

    def new_tokens(self, prompt: int, longest: int) -> int:
        """The most tokens that may follow a prompt of so many, in a model for `longest`.

        Raises ValueError where that is none.
        """
        limit = min(self.max_new_tokens or self.max_length - prompt, longest - prompt)
        if limit <= 0:
            bound = longest if self.max_new_tokens or self.max_length > longest else self.max_length
            raise ValueError(f"a prompt of {prompt} tokens leaves no room for an answer within {bound}; shorten it")
        return limit


@dataclass(frozen=True)
class Completion:
    """What follows a prompt: `tokens` with the one that ended it, `text` without it or from the stop string on.

    `log_probs` are the model's own, before temperature and the like; of beams, what each token added to the sum.
    `score`, of beams: that sum / length^length_penalty. `is_stopped`: it ended by itself, not for its length.
    """

    tokens: tuple[int, ...]
    text: str
    log_probs: tuple[float, ...]
    is_stopped: bool
    score: float | None = None


def filtered(logits_BV: Tensor, options: Decoding) -> Tensor:
    """Logits at the temperature, −inf for all but the `top_k` best, and of these the fewest that hold `top_p`."""
    logits_BV = logits_BV / options.temperature
    if options.top_k:
        worst_B1 = logits_BV.topk(min(options.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < worst_B1, -torch.inf)
    if options.top_p < 1:
        ascending_BV, order_BV = logits_BV.sort()
        is_out_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - options.top_p
        is_out_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(is_out_BV.scatter(1, order_BV, is_out_BV), -torch.inf)
    return logits_BV


def choose(logits_BV: Tensor, options: Decoding, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """The next token of each row [B], and its log-probability [B]."""
    tokens_B = _draw(filtered(logits_BV, options), generators) if options.do_sample else logits_BV.argmax(-1)
    log_probs_B = logits_BV.log_softmax(-1).gather(1, tokens_B[:, None]).squeeze(1)
    return tokens_B, log_probs_B


def _draw(logits_BV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One number from each row's generator decides, so that rows do not depend on each other, nor on the device."""
    reached_BV = logits_BV.softmax(-1).cpu().double().cumsum(-1)
    numbers = [torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators]
    wanted_B1 = torch.stack(numbers) * reached_BV[:, -1:]
    return torch.searchsorted(reached_BV, wanted_B1, right=True).squeeze(1).to(logits_BV.device)
