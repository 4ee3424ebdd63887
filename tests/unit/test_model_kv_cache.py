"""A cached step is what the whole text gives, and remembers no more than it must."""

import pytest
import torch
from beside_transformers import ours, peer

from megatron_patch.model.kv_cache import KVCache

TOKENS = torch.randint(3, 101, (3, 26), generator=torch.Generator().manual_seed(0))
LENGTHS = [9, 4, 14]
CASES = [("mistral", {"sliding_window": 5}), ("deepseek_v2", {"q_lora_rank": 20})]


@pytest.mark.parametrize(("family", "options"), CASES)
@torch.no_grad()
def test_logits_of_every_step_are_those_of_the_whole_text_though_rows_move(tmp_path, family, options):
    torch.set_num_threads(1)
    peer(family, **options).save_pretrained(tmp_path)
    model = ours(tmp_path, family)
    whole = model(TOKENS)
    cache = KVCache(model.layers, LENGTHS, 26, model.config.window_size, torch.device("cpu"))
    rows, counts = [0, 1, 2], list(LENGTHS)
    logits = model(TOKENS[:, :14], cache=cache)[:, 0]
    for step in range(11):
        wanted = whole[rows, [count - 1 for count in counts]]
        assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
        if step == 4:
            cache.select([2, 0, 0])
            rows, counts = [2, 0, 0], [counts[2], counts[0], counts[0]]
        counts = [count + 1 for count in counts]
        cache.advance()
        logits = model(TOKENS[rows, [count - 1 for count in counts]][:, None], cache=cache)[:, 0]


@torch.no_grad()
def test_a_window_bounds_the_memory_and_a_latent_is_all_that_is_kept(tmp_path):
    sizes = {}
    for family, options in (("mistral", {"sliding_window": 5}), ("deepseek_v2", {})):
        peer(family, **options).save_pretrained(tmp_path / family)
        model = ours(tmp_path / family, family)
        cache = KVCache(model.layers, LENGTHS, 26, model.config.window_size, torch.device("cpu"))
        model(TOKENS[:, :14], cache=cache)
        begun = [tensor.shape for tensor in cache.layers["0"].stored]
        for step in range(12):
            cache.advance()
            model(TOKENS[:, 14 + step, None], cache=cache)
        assert [tensor.shape for tensor in cache.layers["0"].stored] == begun
        sizes[family] = begun
    assert sizes["mistral"] == [(3, 2, 5, 16)] * 2, "keys and values of two heads, five tokens each"
    assert sizes["deepseek_v2"] == [(3, 1, 26, 24 + 8)], "one latent and its rotated channels for all heads"
