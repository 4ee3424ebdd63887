"""Which tokens of a sample each context-parallel rank holds: arithmetic, with no process group and no torch.

A sample is cut into 2n equal chunks for n ranks, and rank r holds chunks r and 2n − 1 − r: causal attention then costs
every rank the same (arXiv:2407.21783, section 3.3.2).
"""


def held(rank: int, size: int, length: int) -> tuple[range, ...]:
    """Positions of the tokens on `rank` among the `length` of a sample, as ranges with a gap between them.

    Raises ValueError where the chunks would not be equal.
    """
    if size == 1:
        return (range(length),)
    if length % (2 * size):
        raise ValueError(
            f"context_parallel_size {size} cuts a sample into {2 * size} equal chunks, and {length} tokens are not a "
            f"multiple of {2 * size}"
        )
    chunk = length // (2 * size)
    early = range(rank * chunk, (rank + 1) * chunk)
    late = range(length - early.stop, length - early.start)
    return (range(early.start, late.stop),) if early.stop == late.start else (early, late)


def gathered_order(size: int) -> list[int]:
    """For each chunk of a sample, in order, its number among the chunks of rank 0, of rank 1, and so on."""
    return [2 * chunk if chunk < size else 2 * (2 * size - 1 - chunk) + 1 for chunk in range(2 * size)]
