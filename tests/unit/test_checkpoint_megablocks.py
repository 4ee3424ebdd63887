import json
from pathlib import Path

import pytest
import torch
from legacy_checkpoint import encoder, payload, rewrite, tiny
from torch.nn.functional import silu
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from megatron_patch.checkpoint.formats import detect_format

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mixtral_train_packing.json").read_text())
EXPERT = "decoder.layers.0.mlp.experts.local_experts."


def numbered():
    """The model that the golden file describes."""
    model = tiny("mixtral", num_hidden_layers=1, hidden_size=2, intermediate_size=4, num_local_experts=2, head_dim=2)
    for expert in range(2):
        w1 = 1000.0 * expert + torch.arange(8)
        model.tensors[f"{EXPERT}{expert}.linear_fc1.weight"] = torch.cat([w1, w1 + 500]).view(8, 2)
        model.tensors[f"{EXPERT}{expert}.linear_fc2.weight"] = (w1 + 900).view(2, 4)
    return model


def test_mixtral_train_packs_experts_as_its_own_converter_did(tmp_path):
    model = numbered()
    directory = model.write(tmp_path / "m", "mixtral_train", tp=2)
    for rank in range(2):
        flat = encoder(directory, f"mp_rank_0{rank}")
        weight1, weight2 = (flat[f"layers.0.mlp.experts.weight{number}"] for number in (1, 2))
        assert tuple(weight1.shape) == (2, 8) and tuple(weight2.shape) == (4, 2)
        assert weight1.flatten().tolist() == GOLDEN["weight1"][rank]
        assert weight2.flatten().tolist() == GOLDEN["weight2"][rank]
    model.assert_held_by(model.open(directory))


def test_megablocks_stacks_gates_ups_and_transposed_downs(tmp_path):
    model = numbered()
    directory = model.write(tmp_path / "m", "megablocks")
    flat = encoder(directory, "mp_rank_00_000")
    experts = "layers.0.mlp.moe.experts."
    assert flat[f"{experts}mlp.w1"].flatten().tolist() == [*range(8), *range(1000, 1008)]
    assert flat[f"{experts}mlp.v1"].flatten().tolist() == [*range(500, 508), *range(1500, 1508)]
    downs = [900, 904, 901, 905, 902, 906, 903, 907]
    assert flat[f"{experts}mlp.w2"].flatten().tolist() == downs + [1000 + down for down in downs]
    assert {tuple(flat[f"{experts}mlp.{name}"].shape) for name in ("w1", "v1", "w2")} == {(8, 2)}
    assert flat[f"{experts}bias"].tolist() == [0, 0] and tuple(flat["layers.0.mlp.moe.router.layer.weight"].shape) == (
        2,
        2,
    )


def modellink(flat, moe, number, x):
    w1, w2, w3 = (flat[f"{moe}block.moe_layer.experts.experts.{number}.w{n}.weight"] for n in (1, 2, 3))
    return (silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def mixtral_train(flat, moe, number, x):
    hidden, count = x.shape[-1], 4
    gate, up = (x @ flat[f"{moe}experts.weight1"].view(count, hidden, -1)[number]).chunk(2, -1)
    return (silu(gate) * up) @ flat[f"{moe}experts.weight2"].view(count, -1, hidden)[number]


def megablocks(flat, moe, number, x):
    w1, v1, w2 = (flat[f"{moe}moe.experts.mlp.{name}"].chunk(4)[number] for name in ("w1", "v1", "w2"))
    return (silu(x @ w1.T) * (x @ v1.T)) @ w2


@pytest.mark.parametrize(
    ("format", "rank", "router", "expert"),
    [
        ("modellink", "mp_rank_00", "block.moe_layer.gate.weight.weight", modellink),
        ("mixtral_train", "mp_rank_00", "router.weight", mixtral_train),
        ("megablocks", "mp_rank_00_000", "moe.router.layer.weight", megablocks),
    ],
)
@torch.no_grad()
def test_the_layer_that_a_format_was_made_for_computes_transformers_block(tmp_path, format, rank, router, expert):
    torch.set_num_threads(1)
    model = tiny("mixtral", num_hidden_layers=1, num_local_experts=4)
    flat, moe = encoder(model.write(tmp_path / "m", format), rank), "layers.0.mlp."
    config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    block.gate.weight.copy_(model.tensors["decoder.layers.0.mlp.router.weight"])
    for number in range(4):
        block.experts.gate_up_proj[number] = model.tensors[f"{EXPERT}{number}.linear_fc1.weight"]
        block.experts.down_proj[number] = model.tensors[f"{EXPERT}{number}.linear_fc2.weight"]
    x = torch.randn(1, 7, 8)
    scores, chosen = (x[0] @ flat[moe + router].T).topk(2)
    weights = scores.softmax(-1)
    found = torch.stack(
        [sum(weights[row, k] * expert(flat, moe, int(chosen[row, k]), x[0, row]) for k in range(2)) for row in range(7)]
    )
    wanted = block(x)
    torch.testing.assert_close(found, (wanted[0] if isinstance(wanted, tuple) else wanted)[0])


def test_megablocks_shares_experts_over_data_parallel_ranks_and_does_not_cut_them(tmp_path):
    model = tiny("mixtral", num_local_experts=4)
    directory = model.write(tmp_path / "m", "megablocks", tp=2, pp=2, ep=2)
    names = sorted(path.name for path in (directory / "release").iterdir())
    assert names == [f"mp_rank_0{tp}_00{dp}_00{pp}" for tp in range(2) for dp in range(2) for pp in range(2)]
    flats = {name: encoder(directory, name) for name in names}
    w1 = "layers.1.mlp.moe.experts.mlp.w1"
    assert torch.equal(flats["mp_rank_00_001_001"][w1], flats["mp_rank_01_001_001"][w1])
    experts = [model.tensors[f"decoder.layers.3.mlp.experts.local_experts.{e}.linear_fc1.weight"] for e in (2, 3)]
    assert torch.equal(flats["mp_rank_00_001_001"][w1], torch.cat([expert[:12] for expert in experts]))
    args = vars(payload(directory, names[0])["args"])
    told = {"moe_num_experts": 4, "moe_top_k": 2, "moe_expert_model_parallelism": True, "ffn_hidden_size": 12}
    assert told.items() <= args.items() and args["moe_normalize_expert_weights"] == 1


def test_a_second_number_is_a_stage_or_an_expert_share_by_what_the_files_hold(tmp_path):
    model = tiny("mixtral", num_local_experts=4)
    for layout in ({"pp": 2}, {"ep": 2}):
        directory = model.write(tmp_path / next(iter(layout)), "modellink", **layout)
        assert sorted(path.name for path in (directory / "release").iterdir()) == ["mp_rank_00_000", "mp_rank_00_001"]
        for rank in ("mp_rank_00_000", "mp_rank_00_001"):
            rewrite(directory, lambda content: content.pop("args"), rank)
        source = model.open(directory)
        assert ({"tp": 1, "pp": 1, "ep": 1} | layout).items() <= source.layout.items()
        model.assert_held_by(source)


def test_a_trained_bias_has_no_place_elsewhere_and_is_refused(tmp_path):
    model = tiny("mixtral", num_local_experts=4)
    directory = model.write(tmp_path / "m", "megablocks")
    name = "layers.2.mlp.moe.experts.bias"
    rewrite(directory, lambda p: p["model"]["language_model"]["encoder"][name].add_(1), "mp_rank_00_000")
    with pytest.raises(ValueError, match=r"layers.2.mlp.moe.experts.bias is not zero"):
        model.open(directory)
    rewrite(directory, lambda p: p["model"]["language_model"]["encoder"].pop(name), "mp_rank_00_000")
    model.assert_held_by(model.open(directory))


def test_a_missing_share_of_experts_is_told(tmp_path):
    model = tiny("mixtral", num_local_experts=4)
    directory = model.write(tmp_path / "m", "megablocks", ep=4)
    held = detect_format(directory)
    (directory / "release" / "mp_rank_00_003" / "model_optim_rng.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"mp_rank_00_003/model_optim_rng.pt does not exist"):
        held.open(directory, model.entries, model.config)
    (directory / "release" / "mp_rank_00_003").rmdir()
    with pytest.raises(ValueError, match="holds 3 shares of 4 experts; one is missing"):
        held.open(directory, model.entries, model.config)


@pytest.mark.parametrize("format", ["mixtral_train", "megablocks"])
def test_experts_of_different_types_cannot_be_one_tensor(tmp_path, format):
    model = tiny("mixtral", num_local_experts=2)
    for name in ("linear_fc1", "linear_fc2"):  # as wide as each other: nothing but the type tells them apart
        for expert, dtype in enumerate((torch.float16, torch.bfloat16)):
            key = f"{EXPERT}{expert}.{name}.weight"
            model.tensors[key] = model.tensors[key].to(dtype)
    with pytest.raises(ValueError, match=r"experts.0.linear_fc1.* is torch.float16 and .*experts.1.* torch.bfloat16"):
        model.write(tmp_path / "m", format)
