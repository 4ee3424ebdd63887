"""The dynamic loss scale of float16 runs."""

from megatron_patch.train.loss_scale import INITIAL, LossScale


def test_other_precisions_are_never_scaled():
    scale = LossScale.of("bf16")
    scale.update(is_finite=False)
    assert scale.value == 1


def test_the_first_overflow_is_forgiven_and_each_further_one_halves():
    scale = LossScale.of("fp16")
    values = []
    for _ in range(4):
        scale.update(is_finite=False)
        values.append(scale.value / INITIAL)
    assert values == [1, 0.5, 0.25, 0.125]
    for _ in range(80):
        scale.update(is_finite=False)
    assert scale.value == 1


def test_a_thousand_good_steps_double_and_an_overflow_starts_the_count_again():
    scale = LossScale(True, 8.0)
    for _ in range(999):
        scale.update(is_finite=True)
    scale.update(is_finite=False)
    for _ in range(999):
        scale.update(is_finite=True)
    assert scale.value == 8
    scale.update(is_finite=True)
    assert scale.value == 16
    scale.update(is_finite=False)
    assert scale.value == 16  # the doubling restored its patience
