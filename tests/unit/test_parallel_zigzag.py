"""The zigzag: who holds which tokens, and how gathered chunks come back into order."""

from itertools import chain

import pytest

from megatron_patch.parallel.zigzag import gathered_order, held


def test_known_places():
    assert held(0, 1, 7) == (range(7),)
    assert held(0, 2, 8) == (range(0, 2), range(6, 8))
    assert held(1, 2, 8) == (range(2, 6),), "the two chunks in the middle touch"
    assert held(1, 3, 12) == (range(2, 4), range(8, 10))
    assert gathered_order(3) == [0, 2, 4, 5, 3, 1]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_token_is_held_once_each_rank_does_the_same_work_and_order_returns(size):
    length = 2 * size * 3
    ranks = [[position for run in held(rank, size, length) for position in run] for rank in range(size)]
    gathered = list(chain.from_iterable(ranks))
    assert sorted(gathered) == list(range(length))
    assert len({sum(positions) for positions in ranks}) == 1, "keys that a rank's queries see"
    chunks = [gathered[begin : begin + 3] for begin in range(0, length, 3)]
    assert list(chain.from_iterable(chunks[number] for number in gathered_order(size))) == list(range(length))


def test_chunks_that_would_not_be_equal_are_told():
    with pytest.raises(ValueError, match="context_parallel_size 2 cuts a sample into 4 equal chunks, and 10 tokens"):
        held(0, 2, 10)
