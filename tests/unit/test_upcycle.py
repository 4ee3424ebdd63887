import dataclasses
import json

import pytest
import torch
from beside_transformers import ours, peer
from safetensors.torch import load_file
from tiny_checkpoint import hf_tensors, write_directory
from transformers import AutoModelForCausalLM

from megatron_patch.checkpoint.formats import FORMATS
from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.checkpoint.upcycle import UpcycledSource, upcycle
from megatron_patch.convert import main
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.families.resolve import read_config
from megatron_patch.families.upcycle import Upcycling, check_upcycling, resolve_upcycled, upcycled_hf_config

COPIES = Upcycling(num_moe_experts=4, moe_router_topk=2)
LAYER = "decoder.layers.0."
EXPERT = LAYER + "mlp.experts.local_experts."


@dataclasses.dataclass(frozen=True)
class Memory:
    """A checkpoint of float32 tensors by mcore name."""

    tensors: dict
    dtype: torch.dtype = torch.float32

    def dtype_of(self, entry):
        return self.tensors[entry.mcore].dtype

    def read(self, entry):
        return self.tensors[entry.mcore]


def tiny(family="mistral", **changed):
    """A dense architecture of two layers, hidden 2 and an MLP 4 wide."""
    hf = {"num_hidden_layers": 2, "hidden_size": 2, "intermediate_size": 4, "num_attention_heads": 1}
    hf |= {"num_key_value_heads": 1, "vocab_size": 5, "max_position_embeddings": 8, "sliding_window": None}
    return ALL[family], ALL[family].config(hf | changed)


def numbered(upcycling, family="mistral", **changed):
    """The upcycled source of a dense model with gate rows 0…, up rows 100… and down columns 200…, and its entries."""
    dense_family, dense = tiny(family, **changed)
    entries = manifest(dense_family, dense)
    tensors = {entry.mcore: torch.zeros(entry.shape) for entry in entries}
    width = dense.ffn_hidden_size
    gate_up = torch.cat([torch.arange(width), 100 + torch.arange(width)]).float()
    tensors[LAYER + "mlp.linear_fc1.weight"] = gate_up[:, None].expand(-1, 2)
    tensors[LAYER + "mlp.linear_fc2.weight"] = (200 + torch.arange(width)).float().expand(2, -1)
    moe_family, config = resolve_upcycled(dense, upcycling)
    return upcycle(Memory(tensors), entries, upcycling), {e.mcore: e for e in manifest(moe_family, config)}


def read(source: UpcycledSource, entries, name):
    tensor = source.read(entries[name])
    assert tuple(tensor.shape) == entries[name].shape
    return tensor


def upcycle_directory(directory, target, upcycling):
    """Read a dense Hugging Face directory, write the mixture as another."""
    hf = read_config(directory)
    family = next(family for family in ALL.values() if family.architecture == hf["architectures"][0])
    dense = family.config(hf)
    source = upcycle(open_checkpoint(directory, family, dense), manifest(family, dense), upcycling)
    moe_family, config = resolve_upcycled(dense, upcycling)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(upcycled_hf_config(hf, moe_family, config, "float32")))
    FORMATS["hf"].write(target, manifest(moe_family, config), config, source, Target())
    return moe_family


@pytest.mark.parametrize(
    ("dense", "mixture"), [("mistral", "mixtral"), ("llama", "mixtral"), ("qwen1_5", "qwen1_5_moe")]
)
@torch.no_grad()
def test_copies_with_renormalised_weights_compute_what_the_dense_model_did(tmp_path, dense, mixture):
    torch.set_num_threads(1)
    model = peer(dense)
    model.save_pretrained(tmp_path / "dense")
    assert upcycle_directory(tmp_path / "dense", tmp_path / "moe", COPIES).name == mixture
    ids = torch.arange(24).view(2, 12)
    wanted = model(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="eager")(ids).logits
    assert (theirs - wanted).abs().max() < 1e-5 * wanted.abs().max()
    found = ours(tmp_path / "moe", mixture)(ids)[..., : wanted.shape[-1]]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_fine_grained_expert_is_a_part_of_gate_and_the_same_part_of_up_and_down():
    source, entries = numbered(Upcycling(num_moe_experts=6, moe_router_topk=2, num_splits=2))
    assert read(source, entries, EXPERT + "0.linear_fc1.weight")[:, 0].tolist() == [0, 1, 100, 101]
    assert read(source, entries, EXPERT + "0.linear_fc2.weight")[0].tolist() == [200, 201]
    for number in (1, 3, 5):
        assert read(source, entries, f"{EXPERT}{number}.linear_fc1.weight")[:, 0].tolist() == [2, 3, 102, 103]
    assert read(source, entries, EXPERT + "5.linear_fc2.weight")[0].tolist() == [202, 203]


def test_gate_and_up_are_widened_each_for_itself():
    """Qwen1.5's original widened them together, so that 32 of 1376 up rows fell into the gate."""
    options = {"num_moe_experts": 2, "moe_router_topk": 1, "num_splits": 2, "moe_ffn_hidden_size": 3}
    source, entries = numbered(Upcycling(**options, padding="zeros"))
    assert read(source, entries, EXPERT + "1.linear_fc1.weight")[:, 0].tolist() == [2, 3, 0, 102, 103, 0]
    assert read(source, entries, EXPERT + "1.linear_fc2.weight")[0].tolist() == [202, 203, 0]
    source, entries = numbered(Upcycling(**options))
    drawn = read(source, entries, EXPERT + "1.linear_fc1.weight")
    assert drawn[[0, 1, 3, 4], 0].tolist() == [2, 3, 102, 103] and drawn[[2, 5]].abs().max() < 0.1
    assert len(set(drawn[[2, 5]].flatten().tolist())) == 4


@torch.no_grad()
def test_zero_padding_leaves_the_parts_adding_up_to_the_dense_mlp():
    torch.manual_seed(0)
    family, dense = tiny(intermediate_size=6)
    entries = manifest(family, dense)
    tensors = {entry.mcore: torch.randn(entry.shape) for entry in entries}
    options = Upcycling(num_moe_experts=3, moe_router_topk=3, num_splits=3, moe_ffn_hidden_size=5, padding="zeros")
    source, (moe_family, config) = upcycle(Memory(tensors), entries, options), resolve_upcycled(dense, options)
    mixture = {entry.mcore: entry for entry in manifest(moe_family, config)}

    def swiglu(fc1, fc2):
        gate, up = (x @ fc1.T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ fc2.T

    x = torch.randn(7, 2)
    experts = [
        swiglu(*(read(source, mixture, f"{EXPERT}{number}.linear_fc{n}.weight") for n in (1, 2))) for number in range(3)
    ]
    whole = swiglu(tensors[LAYER + "mlp.linear_fc1.weight"], tensors[LAYER + "mlp.linear_fc2.weight"])
    torch.testing.assert_close(sum(experts), whole)


def test_what_the_dense_model_lacks_is_drawn_from_the_seed_and_the_name():
    options = Upcycling(num_moe_experts=64, moe_router_topk=4, moe_shared_expert_intermediate_size=32)
    source, entries = numbered(options, "qwen1_5", hidden_size=64, intermediate_size=2)
    names = ["mlp.router.weight", "mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"]
    for name in names:
        assert 0.018 < read(source, entries, LAYER + name).std() < 0.022
    router = LAYER + names[0]
    assert torch.equal(read(source, entries, router), read(source, entries, router))
    assert not torch.equal(read(source, entries, router), read(source, entries, router.replace("0", "1", 1)))
    other, _ = numbered(dataclasses.replace(options, seed=1), "qwen1_5", hidden_size=64, intermediate_size=2)
    assert not torch.equal(read(source, entries, router), read(other, entries, router))
    assert read(source, entries, LAYER + "mlp.shared_experts.gate_weight").shape == (1, 64)


def test_the_expert_layout_of_qwen1_5_moe_is_reproduced():
    family, dense = ALL["qwen1_5"], ALL["qwen1_5"].config(ALL["qwen1_5"].sizes["1.8B"])
    moe_family, config = resolve_upcycled(
        dense,
        Upcycling(
            num_moe_experts=60,
            moe_router_topk=4,
            num_splits=4,
            moe_ffn_hidden_size=1408,
            moe_shared_expert_intermediate_size=5632,
            moe_router_pre_softmax=True,
        ),
    )
    published = moe_family.config(moe_family.sizes["A2.7B"])
    shapes = {entry.mcore: entry.shape for entry in manifest(moe_family, published)}
    assert {entry.mcore: entry.shape for entry in manifest(moe_family, config)} == shapes
    assert config.moe_router_pre_softmax and family.name == "qwen1_5" and moe_family.name == "qwen1_5_moe"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"moe_router_topk": 0}, "moe_router_topk is 0; 1 to 4 experts"),
        ({"moe_router_topk": 5}, "moe_router_topk is 5; 1 to 4 experts"),
        ({"num_splits": 3}, "num_splits 3 does not divide the MLP's width 4"),
        ({"num_splits": 8}, "num_splits is 8; 4 experts can hold 1 to as many parts"),
        ({"moe_ffn_hidden_size": 3}, "moe_ffn_hidden_size 3 is below a part's width 4"),
        ({"padding": "ones"}, "padding is 'ones'"),
        ({"moe_shared_expert_intermediate_size": -1}, "moe_shared_expert_intermediate_size is -1"),
    ],
)
def test_numbers_that_cannot_work_are_told(changed, message):
    with pytest.raises(ValueError, match=message):
        check_upcycling(tiny()[1], dataclasses.replace(COPIES, **changed))


def test_a_model_that_no_family_can_hold_as_a_mixture_is_refused_with_the_reason():
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4}
    _, config = tiny("llama", rope_scaling=scaling | {"low_freq_factor": 1.0, "high_freq_factor": 4.0})
    with pytest.raises(ValueError, match=r"mixtral has no room for .*rope_type"):
        resolve_upcycled(config, COPIES)
    with pytest.raises(ValueError, match="already has 4 experts"):
        resolve_upcycled(resolve_upcycled(tiny()[1], COPIES)[1], COPIES)


def test_the_written_config_keeps_what_is_said_of_the_tokenizer():
    family, config = resolve_upcycled(tiny()[1], COPIES)
    hf = upcycled_hf_config({"eos_token_id": 2, "num_hidden_layers": 99}, family, config, "bfloat16")
    assert hf["eos_token_id"] == 2 and hf["num_local_experts"] == 4 and hf["torch_dtype"] == "bfloat16"
    assert family.config(hf) == config


def test_the_command_upcycles_into_any_format_and_proves_it(tmp_path, capsys):
    write_directory(tmp_path / "dense", hf_tensors())
    flags = ["--upcycle-experts", "4", "--upcycle-topk", "2", "--upcycle-splits", "2", "--upcycle-ffn", "16"]
    assert main([str(tmp_path / "dense"), str(tmp_path / "mb"), "--format", "megablocks", "--ep", "2", *flags]) == 0
    assert main([str(tmp_path / "mb"), str(tmp_path / "hf"), "--format", "hf", "--verify"]) == 0
    assert main([str(tmp_path / "dense"), str(tmp_path / "direct"), "--format", "hf", "--verify", *flags]) == 0
    read = {name: load_file(tmp_path / name / "model.safetensors") for name in ("dense", "hf", "direct")}
    assert read["hf"].keys() == read["direct"].keys()
    assert all(torch.equal(tensor, read["direct"][name]) for name, tensor in read["hf"].items())
    expert = read["hf"]["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    assert torch.equal(expert[:12], read["dense"]["model.layers.1.mlp.up_proj.weight"][12:]) and len(expert) == 16
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (hf["architectures"], hf["num_local_experts"], hf["intermediate_size"]) == (["MixtralForCausalLM"], 4, 16)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "dense"), str(tmp_path / "x"), "--format", "hf", "--upcycle-experts", "4"])
    assert "upcycling needs both --upcycle-experts and --upcycle-topk" in capsys.readouterr().err
    assert main([str(tmp_path / "hf"), str(tmp_path / "x"), "--format", "hf", *flags]) == 1
    assert "the model already has 4 experts" in capsys.readouterr().err and not (tmp_path / "x").exists()
