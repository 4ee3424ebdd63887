"""Every converter for real, at a tiny size: there, back, and what the files hold in between."""

import shutil

import pytest
import torch
from commands import ROOT, StartedError, through_shell
from tiny import are_equal, tensors_in, write_model

from megatron_patch import convert
from megatron_patch.checkpoint.formats import detect_format
from megatron_patch.families.resolve import from_checkpoint
from megatron_patch.launch.__main__ import main

CONVERTORS = ROOT / "toolkits/model_checkpoints_convertor"


@pytest.fixture
def run():
    """Launch in process, become the planned command, and return its exit status."""
    torch.set_num_threads(1)

    def run(launcher, *arguments):
        with pytest.raises(StartedError) as started:
            main([launcher, *map(str, arguments)])
        command = started.value.args[0]
        assert command[1:3] == ["-m", "megatron_patch.convert"]
        return convert.main(command[3:])

    return run


def test_mistral_goes_to_two_by_two_through_dash_and_back(run, tmp_path):
    hf, mcore, back = tmp_path / "h f", tmp_path / "m core", tmp_path / "back"
    tensors = write_model(hf, "mistral")
    script = CONVERTORS / "mistral/hf2mcore_convertor.sh"
    there = ["auto", hf, "", hf, mcore, 2, 2, 2, 0, 0, 0, "false"]
    status, _, err = through_shell("sh", script, list(map(str, there)), tmp_path)
    assert status == 0, err
    assert sorted(path.name for path in (mcore / "release").iterdir()) == [
        f"mp_rank_{tp:02d}_{pp:03d}" for tp in range(2) for pp in range(2)
    ]
    assert run("mistral-convert", *there[:3], mcore, back, *there[5:11], "true", "--verify") == 0
    assert are_equal(tensors_in(back), tensors)


def test_mixtral_takes_thirteen_arguments_both_ways(run, tmp_path):
    tensors = write_model(tmp_path / "hf", "mixtral")
    sizes = (2, 1, 0, 4, 2, 4)
    assert (
        run("mistral-convert", "auto", tmp_path / "hf", "", tmp_path / "hf", tmp_path / "mcore", *sizes, "false", 8)
        == 0
    )
    assert len(list((tmp_path / "mcore/release").iterdir())) == 8
    assert (
        run("mistral-convert", "auto", tmp_path / "hf", "", tmp_path / "mcore", tmp_path / "back", *sizes, "true", 8)
        == 0
    )
    assert are_equal(tensors_in(tmp_path / "back"), tensors)


def test_a_layout_that_the_checkpoint_has_not_is_told_with_both(run, tmp_path, capsys):
    write_model(tmp_path / "hf", "mistral")
    arguments = ("auto", tmp_path / "hf", "", tmp_path / "hf", tmp_path / "mcore", 2, 1, 0, 0, 0, 0)
    assert run("mistral-convert", *arguments, "false") == 0
    back = ("auto", tmp_path / "hf", "", tmp_path / "mcore", tmp_path / "back", 4, 1, 0, 0, 0, 0)
    assert run("mistral-convert", *back, "true") == 1
    message = capsys.readouterr().err
    assert "--tp is 4" in message and "tp 2" in message.lower()
    assert not (tmp_path / "back").exists()


def test_a_dense_mistral_becomes_a_mixtral_of_copies_and_goes_to_hugging_face(run, tmp_path):
    dense = write_model(tmp_path / "hf", "mistral")
    sizes = (1, 2, 0, 4, 2, 2)
    assert run("mistral-convert", "auto", tmp_path / "hf", "", tmp_path / "hf", tmp_path / "moe", *sizes, "false") == 0
    assert run("mistral-convert", "7B", tmp_path / "hf", "", tmp_path / "moe", tmp_path / "back", *sizes, "true") == 0
    resolved = from_checkpoint(("mixtral",), "auto", tmp_path / "back")
    assert (resolved.config.num_moe_experts, resolved.config.moe_router_topk) == (4, 2)
    tensors = tensors_in(tmp_path / "back")
    for expert in range(4):
        copy = tensors[f"model.layers.3.block_sparse_moe.experts.{expert}.w3.weight"]
        assert torch.equal(copy, dense["model.layers.3.mlp.up_proj.weight"])
    assert (tmp_path / "back/tokenizer.json").is_file()


def test_megatron_lm_takes_eight_arguments_and_a_source_named_with_its_release(run, tmp_path):
    tensors = write_model(tmp_path / "hf", "mistral")
    assert run("mistral-megatron", "", tmp_path / "hf", tmp_path / "megatron", 2, 1, "auto", 2, "false") == 0
    assert detect_format(tmp_path / "megatron").name == "megatron"
    release = tmp_path / "megatron/release"
    assert run("mistral-megatron", "", release, tmp_path / "back", 2, 1, "auto", 0, "true") == 0
    assert are_equal(tensors_in(tmp_path / "back"), tensors)


@pytest.mark.parametrize(
    ("launcher", "family"), [("llama-megatron", "llama"), ("qwen-megatron", "qwen1_5")], ids=["llama", "qwen"]
)
def test_other_families_go_to_megatron_lm_too(run, tmp_path, launcher, family):
    tensors = write_model(tmp_path / "hf", family)
    assert run(launcher, "", tmp_path / "hf", tmp_path / "megatron", 1, 2, "auto", 2, "false") == 0
    assert run(launcher, "", tmp_path / "megatron", tmp_path / "back", 1, 2, "auto", 2, "true") == 0
    assert are_equal(tensors_in(tmp_path / "back"), tensors)


def test_deepseek_has_an_uneven_first_stage_a_precision_and_its_own_names(run, tmp_path, monkeypatch, capsys):
    tensors = write_model(tmp_path / "hf", "deepseek_v2")
    monkeypatch.setenv("MP_PP0_LAYERS", "1")
    sizes = (2, 2, 2, "bf16", "false")
    assert run("deepseek-convert", "auto", tmp_path / "hf", tmp_path / "mcore", *sizes, "false") == 0
    file = tmp_path / "mcore/release/mp_rank_00_000_000/model_optim_rng.pt"
    model = torch.load(file, weights_only=False)["model"]
    assert {key.split(".")[2] for key in model if key.startswith("decoder.layers.")} == {"0"}
    assert model["decoder.layers.0.input_layernorm.weight"].dtype == torch.bfloat16
    assert run("deepseek-convert", "auto", tmp_path / "mcore", tmp_path / "back", *sizes, "true", tmp_path / "hf") == 0
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    assert are_equal(tensors_in(tmp_path / "back"), rounded)
    other = ("auto", tmp_path / "mcore", tmp_path / "other", *sizes[:4])
    assert run("deepseek-convert", *other, "true", "true", tmp_path / "hf") == 1
    assert "--transformer-impl is te, but SRC has local" in capsys.readouterr().err
    monkeypatch.setenv("MP_PP0_LAYERS", "2")
    assert run("deepseek-convert", *other, "false", "true", tmp_path / "hf") == 1
    assert "--first-stage-layers is 2, but SRC has 1" in capsys.readouterr().err


def test_megablocks_takes_ten_arguments_and_copies_the_mlp(run, tmp_path):
    dense = write_model(tmp_path / "hf", "qwen1_5")
    sizes = (1, 1, 2, 4, 2)
    assert run("qwen-megablocks", tmp_path / "hf", "", tmp_path / "hf", tmp_path / "mb", *sizes, "false") == 0
    assert detect_format(tmp_path / "mb").name == "megablocks"
    model = torch.load(tmp_path / "mb/release/mp_rank_00_001/model_optim_rng.pt", weights_only=False)["model"]
    encoder = model["language_model"]["encoder"]
    held = [encoder[f"layers.0.mlp.moe.experts.mlp.{name}"] for name in ("w1", "v1")]
    for part in ("gate", "up"):  # neither is lost; which is which is the format's own test
        copies = dense[f"model.layers.0.mlp.{part}_proj.weight"].repeat(2, 1)
        assert sum(torch.equal(copies, tensor) for tensor in held) == 1
    assert run("qwen-megablocks", tmp_path / "hf", "", tmp_path / "mb", tmp_path / "back", *sizes, "true") == 0
    tensors = tensors_in(tmp_path / "back")
    assert torch.equal(
        tensors["model.layers.2.mlp.experts.3.up_proj.weight"], dense["model.layers.2.mlp.up_proj.weight"]
    )


def test_qwen_moe_and_llama_go_to_megatron_core_and_back(run, tmp_path):
    for launcher, family, before, after in (
        ("qwen-moe", "qwen1_5_moe", (), (1, 2, 2)),
        ("qwen-dense", "qwen1_5", (), (2, 2)),
    ):
        base = tmp_path / family
        tensors = write_model(base / "hf", family)
        assert run(launcher, "auto", *before, base / "hf", base / "mcore", *after, "false") == 0
        assert run(launcher, "auto", *before, base / "mcore", base / "back", *after, "true", base / "hf") == 0
        assert are_equal(tensors_in(base / "back"), tensors)


def test_a_dense_qwen_becomes_a_fine_grained_mixture(run, tmp_path):
    dense = write_model(tmp_path / "hf", "qwen1_5")
    assert run("qwen-dense-to-moe", "auto", tmp_path / "hf", tmp_path / "moe", 1, 1, 2, 8, 4, 8) == 0
    config = from_checkpoint(("qwen1_5_moe",), "auto", tmp_path / "moe").config
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size) == (8, 4, 8)
    assert config.moe_shared_expert_intermediate_size == 32
    assert run("qwen-moe", "auto", tmp_path / "moe", tmp_path / "back", 1, 1, 2, "true") == 0
    tensors = tensors_in(tmp_path / "back")
    for name in ("gate_proj", "up_proj"):  # expert 6 is part 2 of 4, rows 12 to 17, widened from 6 to 8
        expert = tensors[f"model.layers.1.mlp.experts.6.{name}.weight"]
        assert torch.equal(expert[:6], dense[f"model.layers.1.mlp.{name}.weight"][12:18])
        assert expert.shape == (8, 16)


def test_modellink_writes_its_format_and_exports_into_mg2hg(run, tmp_path):
    tensors = write_model(tmp_path / "hf", "mistral")
    flags = ("--model-type", "GPT", "--loader", "llama2_hf", "--saver", "megatron", "--load-dir", tmp_path / "hf")
    flags += ("--save-dir", tmp_path / "mg", "--tokenizer-model", tmp_path / "hf/tokenizer.json")
    assert run("convert-ckpt", *flags, "--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2) == 0
    assert detect_format(tmp_path / "mg").name == "modellink"
    again = ("--model-type", "GPT", "--load-dir", tmp_path / "mg")
    assert run("convert-ckpt", *again, "--save-dir", tmp_path / "mg1", "--target-pipeline-parallel-size", 1) == 0
    assert sorted(path.name for path in (tmp_path / "mg1/release").iterdir()) == ["mp_rank_00", "mp_rank_01"]
    shutil.rmtree(tmp_path / "mg1")
    export = ("--save-model-type", "save_huggingface_llama", "--save-dir", tmp_path / "hf")
    assert run("convert-ckpt", *again, *export) == 0
    assert are_equal(tensors_in(tmp_path / "hf/mg2hg"), tensors)
    assert are_equal(tensors_in(tmp_path / "hf"), tensors)


def test_mixtral_in_modellinks_spelling_changes_its_layout_and_goes_back(run, tmp_path):
    tensors = write_model(tmp_path / "hf", "mixtral")
    flags = ("--model-type", "GPT", "--saver", "mixtral")
    sizes = ("--target-tensor-parallel-size", 2, "--target-expert-parallel-size", 2)
    assert (
        run(
            "convert-ckpt",
            *flags,
            "--loader",
            "mixtral_hf",
            "--load-dir",
            tmp_path / "hf",
            "--save-dir",
            tmp_path / "mg",
            *sizes,
        )
        == 0
    )
    export = ("--save-model-type", "huggingface", "--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "hf")
    assert run("convert-ckpt", *flags, "--loader", "mixtral_mg", *export) == 0
    assert are_equal(tensors_in(tmp_path / "hf/mg2hg"), tensors)


def test_mixtral_train_goes_there_and_in_place_only_when_told(run, tmp_path, refused, capsys):
    tensors = write_model(tmp_path / "hf", "mixtral")
    flags = ("--model-type", "GPT", "--loader", "mixtral_hf", "--saver", "mixtral", "--load-dir", tmp_path / "hf")
    flags += ("--save-dir", tmp_path / "mg", "--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)
    assert run("checkpoint-util", *flags) == 0
    assert detect_format(tmp_path / "mg").name == "mixtral_train"
    export = ["--megatron-checkpoint-path", tmp_path / "mg", "--huggingface-config-path", tmp_path / "hf"]
    export += ["--huggingface-checkpoint-path", tmp_path / "hf"]
    export += ["--tensor-parallel-size", 2, "--pipeline-parallel-size", 2]
    capsys.readouterr()
    assert "name another directory, or pass --overwrite" in refused("mixtral-export", list(map(str, export)))
    (tmp_path / "hf/model.safetensors").write_bytes(b"older")
    assert run("mixtral-export", *export, "--overwrite") == 0
    assert are_equal(tensors_in(tmp_path / "hf"), tensors)
