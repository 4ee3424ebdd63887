"""Which rank stands where: arithmetic on the parallel axes, with no process group and no torch."""

import math
from dataclasses import dataclass


def smallest_world(tp: int, cp: int, ep: int, pp: int) -> int:
    """Fewest ranks that fill every axis once; experts are cut tensor-parallel too (expert-TP = TP)."""
    return math.lcm(tp * cp * pp, tp * ep * pp)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rank order tp, cp, dp, pp with tp fastest, as in Megatron-Core (`tp-cp-ep-dp-pp`)."""

    tp: int
    cp: int
    ep: int
    pp: int
    world: int

    def __post_init__(self) -> None:
        product = self.tp * self.pp * self.cp
        if self.world % product:
            raise ValueError(
                f"tp {self.tp} × pp {self.pp} × cp {self.cp} = {product} does not divide {self.world} ranks"
            )
        if (self.dp * self.cp) % self.ep:
            raise ValueError(f"ep {self.ep} does not divide dp {self.dp} × cp {self.cp} of {self.world} ranks")

    @property
    def dp(self) -> int:
        """Data-parallel size: what the other axes leave of the world."""
        return self.world // (self.tp * self.pp * self.cp)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of `rank` on each axis."""
        place: dict[str, int] = {}
        for axis, size in (("tp", self.tp), ("cp", self.cp), ("dp", self.dp), ("pp", self.pp)):
            rank, place[axis] = divmod(rank, size)
        return place
