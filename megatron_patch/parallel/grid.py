"""Which rank stands where: arithmetic on the parallel axes, with no process group and no torch."""

import math
from dataclasses import dataclass

from megatron_patch.config.parallel import ParallelConfig

# The same ranks seen three ways, the fastest axis first, as Megatron-Core orders them (`tp-cp-ep-dp-pp`). Experts are
# spread over what the dense layers use for tensor, context and data parallelism.
VIEWS = (("tp", "cp", "dp", "pp"), ("tp", "dp_cp", "pp"), ("etp", "ep", "edp", "pp"))


def smallest_world(tp: int, cp: int, ep: int, pp: int, etp: int | None = None) -> int:
    """Fewest ranks that fill every axis once; experts are cut as the dense layers are where `etp` is None."""
    return math.lcm(tp * cp * pp, (tp if etp is None else etp) * ep * pp)


def resolve_grid(parallel: ParallelConfig, world: int) -> "Grid":
    """The grid of `world` ranks that a run asks for."""
    tp, etp = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    return Grid(
        tp=tp,
        cp=parallel.context_parallel_size,
        ep=parallel.expert_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        etp=tp if etp is None else etp,
        world=world,
    )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Sizes of the axes, and where each rank stands on them. Raises ValueError where they do not fill `world`."""

    tp: int
    cp: int
    ep: int
    pp: int
    etp: int
    world: int

    def __post_init__(self) -> None:
        dense, experts = self.tp * self.pp * self.cp, self.etp * self.ep * self.pp
        if self.world % dense:
            raise ValueError(f"tp {self.tp} × pp {self.pp} × cp {self.cp} = {dense} does not divide {self.world} ranks")
        if self.etp not in (1, self.tp):
            raise ValueError(f"experts are cut over 1 tensor-parallel rank or all {self.tp}, not {self.etp}")
        if self.world % experts:
            raise ValueError(
                f"expert tp {self.etp} × ep {self.ep} × pp {self.pp} = {experts} does not divide {self.world} ranks"
            )

    @property
    def dp(self) -> int:
        """Data-parallel size: what the other axes leave of the world."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def dp_cp(self) -> int:
        """Ranks that hold the same part of a dense parameter, each for other tokens."""
        return self.dp * self.cp

    @property
    def edp(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self.world // (self.etp * self.ep * self.pp)

    def coordinate(self, rank: int, axis: str) -> int:
        """Position of `rank` on `axis`."""
        stride, size = self._stride_and_size(axis)
        return rank // stride % size

    def peers(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` in their position on `axis` alone, in order of it."""
        stride, size = self._stride_and_size(axis)
        first = rank - self.coordinate(rank, axis) * stride
        return tuple(first + position * stride for position in range(size))

    def _stride_and_size(self, axis: str) -> tuple[int, int]:
        view = next(view for view in VIEWS if axis in view)
        faster = view[: view.index(axis)]
        return math.prod(getattr(self, name) for name in faster), getattr(self, axis)
