"""Losses that a person should look at: the first one of loaded weights, and sudden jumps."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

RANDOM_SHARE = 0.9  # of ln(vocabulary): a loss above it is a model's that knows nothing
WINDOW, FEWEST = 100, 20  # losses that say what is usual, and how many are needed to say anything
DEVIATIONS, LEAST_RISE = 6.0, 0.1  # a jump is beyond both: standard deviations, and a share of the mean


def first_loss_warning(loss: float, vocab_size: int) -> str | None:
    """A sentence, if the first loss of loaded weights is what random weights have; None if it is not."""
    random = math.log(vocab_size)
    if loss <= RANDOM_SHARE * random:
        return None
    return (
        f"the first loss, {loss:.3f}, is near that of random weights or above it, ln({vocab_size}) = {random:.3f}, as "
        "if the loaded weights had no effect. Likely causes: another tokenizer or vocabulary than theirs, rotary_base "
        "(rope theta) or its scaling, the attention window or mask, or data that is no natural text"
    )


def is_spike(usual: Sequence[float], loss: float) -> bool:
    """Whether `loss` lies far above the `usual` ones; never while these are fewer than 20."""
    if len(usual) < FEWEST:
        return False
    mean = fmean(usual)
    return loss > mean + max(DEVIATIONS * pstdev(usual, mean), LEAST_RISE * abs(mean))


@dataclass
class LossWatch:
    """What the last losses were. A jump is one event until losses are as before, or have stayed at the new level."""

    usual: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    unusual: list[float] = field(default_factory=list)

    def warning(self, loss: float) -> str | None:
        """A sentence at the beginning of an event, None at every other loss, and at one that is not finite."""
        if not math.isfinite(loss):
            return None
        if not is_spike(self.usual, loss):
            self.usual.append(loss)
            self.unusual.clear()
            return None
        self.unusual.append(loss)
        if len(self.unusual) == FEWEST:  # it came to stay
            self.usual.clear()
            self.usual.extend(self.unusual)
            self.unusual.clear()
            return None
        if len(self.unusual) > 1:
            return None
        return (
            f"the loss jumps to {loss:.3f} from {fmean(self.usual):.3f} ± {pstdev(self.usual):.3f}. Likely causes: "
            "a learning rate (LR) that is too high, a broken stretch of data, or clip_grad off"
        )
