"""The factor that keeps float16 gradients from vanishing, found by trying (arXiv:1710.03740)."""

from dataclasses import dataclass

INITIAL, LEAST = 2.0**32, 1.0
GROWTH_INTERVAL, HYSTERESIS = 1000, 2


@dataclass
class LossScale:
    """Multiplies the loss before the backward pass; gradients are divided by it before anything else is done to them.

    Constant 1 unless `is_dynamic`. A dynamic scale is halved at an overflow, once patience is used up, and doubled
    after a thousand steps without one: Megatron-Core's DynamicGradScaler with its default numbers.
    """

    is_dynamic: bool
    value: float = 1.0
    good_steps: int = 0
    patience: int = HYSTERESIS

    @classmethod
    def of(cls, precision: str) -> "LossScale":
        """What a run in `precision` starts with."""
        return cls(True, INITIAL) if precision == "fp16" else cls(False)

    def update(self, is_finite: bool) -> None:
        """Learn from a step whose gradients, over all ranks, are finite or not."""
        if not self.is_dynamic:
            return
        if is_finite:
            self.good_steps += 1
            if self.good_steps == GROWTH_INTERVAL:
                self.good_steps, self.patience = 0, HYSTERESIS
                self.value *= 2
            return
        self.good_steps, self.patience = 0, self.patience - 1
        if self.patience <= 0:
            self.value = max(self.value / 2, LEAST)
