"""How a token is chosen, beside transformers' own filters."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_patch.inference.decoding import Decoding, choose, filtered


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 5, 1.0), (1.5, 0, 0.8), (0.5, 12, 0.6), (1.0, 0, 1)])
def test_filters_leave_what_those_of_transformers_leave(temperature, top_k, top_p):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 3
    wanted = TemperatureLogitsWarper(temperature)(None, logits)
    wanted = TopKLogitsWarper(top_k)(None, wanted) if top_k else wanted
    wanted = TopPLogitsWarper(top_p)(None, wanted) if top_p < 1 else wanted
    ours = filtered(logits, Decoding(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p))
    assert torch.equal(ours, wanted)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[0.0, 2.0, -torch.inf, 1.0]]).expand(4000, -1)
    generators = [torch.Generator().manual_seed(number) for number in range(4000)]
    tokens, log_probs = choose(logits, Decoding(do_sample=True), generators)
    likely = logits[0].softmax(-1)
    assert (tokens.bincount(minlength=4) / 4000 - likely).abs().max() < 0.03
    assert torch.allclose(log_probs, likely.log()[tokens])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0 and max_length too"),
        ({"temperature": 0.0}, "temperature 0.0 must be a number above 0"),
        ({"top_k": -1}, "top_k -1 must be 0"),
        ({"top_p": 1.5}, "top_p 1.5 must be above 0 and at most 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences 3 is more than num_beams 2"),
        ({"num_return_sequences": 2}, "a greedy answer is one"),
        ({"stop_strings": ("",)}, "a stop string is empty"),
    ],
)
def test_settings_out_of_range_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Decoding(**settings)
