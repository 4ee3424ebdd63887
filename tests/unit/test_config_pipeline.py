"""Pipeline rules, held to what they foresee: the arithmetic of stages, and what torch's schedules accept."""

import itertools
from types import SimpleNamespace

import pytest
from test_config_checks import run
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B

from megatron_patch.config.checks import problems
from megatron_patch.parallel.stages import resolve_stages

PP, CHUNK, FIRST = (
    "--pipeline-model-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
    "--decoder-first-pipeline-num-layers",
)


def piped(layers: int, pp: int, per_chunk: int | None = None, first: int | None = None, samples: int = 96):
    """A run of `samples` per step, two in a micro-batch."""
    flags = {"--num-layers": layers, PP: pp, CHUNK: per_chunk, FIRST: first, "--global-batch-size": samples}
    return run(*(str(word) for item in flags.items() if item[1] is not None for word in item))


def test_layers_are_refused_exactly_where_they_cannot_be_shared():
    refused = 0
    for layers, pp, per_chunk, first in itertools.product(range(1, 9), (1, 2, 3), (None, 1, 2), (None, 1, 2, 8)):
        whole = piped(layers, pp, per_chunk, first)
        try:
            stages = resolve_stages(layers, whole.parallel)
            fits = pp > 1 or (per_chunk is None and first is None)
            assert all(len(chunk) for stage in stages for chunk in stage)
        except ValueError:
            fits = False
        assert (problems(whole, world=pp) == []) == fits, (layers, pp, per_chunk, first, problems(whole, pp))
        refused += not fits
    assert refused > 100


@pytest.mark.parametrize("chunks", [1, 2])
def test_micro_batches_are_refused_exactly_where_torch_does(chunks):
    answers = set()
    for pp, count in itertools.product((2, 3, 4), range(1, 14)):
        stages = [
            SimpleNamespace(num_stages=pp * chunks, group_size=pp, group_rank=0, stage_index=pp * number)
            for number in range(chunks)
        ]
        try:
            ScheduleInterleaved1F1B(stages, count) if chunks > 1 else Schedule1F1B(stages[0], count)
            fits = True
        except ValueError:
            fits = False
        whole = piped(2 * pp, pp, 1 if chunks > 1 else None, samples=2 * count)
        assert (problems(whole, world=pp) == []) == fits, (pp, count, problems(whole, pp))
        answers.add(fits)
    assert answers == {True, False}


@pytest.mark.parametrize(
    ("whole", "world", "told"),
    [
        (piped(4, 1, per_chunk=1), 1, "num_layers_per_virtual_pipeline_stage 1 needs pipeline_model_parallel_size of"),
        (piped(4, 1, first=1), 1, "decoder_first_pipeline_num_layers 1 needs pipeline_model_parallel_size of at least"),
        (piped(4, 2, first=0), 2, "decoder_first_pipeline_num_layers 0 must be at least 1"),
        (piped(4, 2, per_chunk=0), 2, "num_layers_per_virtual_pipeline_stage 0 must be at least 1"),
        (piped(5, 2), 2, "num_layers 5 cannot be shared equally by 2 of the 2 stages of pipeline_model_parallel_size"),
        (piped(5, 3, first=2), 3, "num_layers 5 without the 2 of decoder_first_pipeline_num_layers cannot be shared"),
        (
            piped(4, 2, first=4),
            2,
            "decoder_first_pipeline_num_layers 4 of num_layers 4 leaves too few for the other stage",
        ),
        (
            piped(6, 4, first=4),
            4,
            "leaves too few for the other 3 stages of pipeline_model_parallel_size 4; use at",
        ),
        (piped(6, 2, per_chunk=2), 2, "num_layers_per_virtual_pipeline_stage 2 does not cut the 3 layers of a stage"),
        (
            piped(7, 2, 2, first=3),
            2,
            "does not cut the 4 layers of a stage and the 3 of the first into the same number",
        ),
        (
            piped(4, 2, samples=4),
            4,
            "micro-batches, global_batch_size 4 / (micro_batch_size 2 × 2 data-parallel ranks) = 1, are fewer than the "
            "stages of pipeline_model_parallel_size 2; raise the first or lower another",
        ),
        (
            piped(4, 2, per_chunk=1, samples=10),
            2,
            "= 5, cannot be run in 2 equal rounds, as num_layers_per_virtual_pipeline_stage needs; make them a "
            "multiple of pipeline_model_parallel_size 2",
        ),
    ],
)
def test_a_broken_pipeline_rule_is_told_with_its_values(whole, world, told):
    (found,) = problems(whole, world)
    assert told in found
