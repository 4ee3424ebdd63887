"""Which pipeline stage, and which virtual chunk of it, computes which layers: arithmetic, with no torch."""

from collections.abc import Sequence

from megatron_patch.config.parallel import ParallelConfig


def resolve_stages(num_layers: int, parallel: ParallelConfig) -> list[list[range]]:
    """Global layers by pipeline stage and virtual chunk, as a run asks. Raises ValueError as `stage_layers`."""
    pp, first = parallel.pipeline_model_parallel_size, parallel.decoder_first_pipeline_num_layers
    per_chunk, vp = parallel.num_layers_per_virtual_pipeline_stage, 1
    if per_chunk is not None:
        share = sum(stage_layers(num_layers, pp=pp, vp=1, first_stage_layers=first)[-1])
        vp, rest = divmod(share, per_chunk)
        if rest:
            raise ValueError(
                f"num_layers_per_virtual_pipeline_stage {per_chunk} does not divide the {share} layers of a stage"
            )
    return layer_ranges(stage_layers(num_layers, pp=pp, vp=vp, first_stage_layers=first))


def stage_layers(num_layers: int, *, pp: int, vp: int, first_stage_layers: int | None) -> list[list[int]]:
    """Number of layers by pipeline stage and virtual chunk.

    The first stage gets `first_stage_layers`, the others equal shares of the rest. Raises ValueError where a share is
    not whole or is empty.
    """
    first = first_stage_layers
    if pp == 1 and (first is not None or vp > 1):
        name, value = ("vp", vp) if vp > 1 else ("first_stage_layers", first)
        raise ValueError(f"{name} is {value}, which needs at least two pipeline stages; raise pp or leave it out")
    if first is not None and not 0 < first < num_layers:
        raise ValueError(f"first_stage_layers is {first}; it must leave some of the {num_layers} layers to each side")
    stages, layers = (pp, num_layers) if first is None else (pp - 1, num_layers - first)
    if layers % stages or layers < stages:
        raise ValueError(f"{layers} layers cannot be shared equally by {stages} pipeline stages")
    shares = [layers // stages] * stages if first is None else [first, *[layers // stages] * stages]
    for share in shares:
        if share % vp:
            raise ValueError(f"the {share} layers of a pipeline stage cannot be shared equally by vp {vp} chunks")
    return [[share // vp] * vp for share in shares]


def layer_ranges(counts: Sequence[Sequence[int]]) -> list[list[range]]:
    """Global layers by stage and chunk, of their numbers: every stage's first chunk, then every stage's second, …"""
    ranges: list[list[range]] = [[] for _ in counts]
    layer = 0
    for chunk in range(len(counts[0])):
        for stage, numbers in enumerate(counts):
            ranges[stage].append(range(layer, layer + numbers[chunk]))
            layer += numbers[chunk]
    return ranges
