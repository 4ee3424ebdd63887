"""Rank arithmetic, exhaustively and without a process group."""

import itertools

import pytest

from megatron_patch.parallel.grid import Grid, smallest_world

SHAPES = [
    (tp, cp, pp, dp)
    for tp, cp, pp, dp in itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2, 4))
    if tp * cp * pp * dp < 17
]


@pytest.mark.parametrize(("tp", "cp", "pp", "dp"), SHAPES)
def test_every_rank_has_its_own_place_and_tp_runs_fastest(tp, cp, pp, dp):
    grid = Grid(tp=tp, cp=cp, ep=1, pp=pp, etp=tp, world=tp * cp * pp * dp)
    places = [{axis: grid.coordinate(rank, axis) for axis in ("pp", "dp", "cp", "tp")} for rank in range(grid.world)]
    order = itertools.product(range(pp), range(dp), range(cp), range(tp))
    assert places == [{"pp": p, "dp": d, "cp": c, "tp": t} for p, d, c, t in order]


def test_a_world_that_the_axes_do_not_divide_is_refused_with_every_factor():
    with pytest.raises(ValueError, match=r"tp 2 × pp 2 × cp 1 = 4 does not divide 6 ranks"):
        Grid(tp=2, cp=1, ep=1, pp=2, etp=2, world=6)


def test_the_smallest_world_fills_dense_and_expert_axes():
    assert smallest_world(tp=2, cp=1, ep=1, pp=1) == 2
    assert smallest_world(tp=2, cp=1, ep=4, pp=1) == 8  # the documented TP2 EP4: dp 4
    assert Grid(tp=2, cp=1, ep=4, pp=1, etp=2, world=8).dp == 4
