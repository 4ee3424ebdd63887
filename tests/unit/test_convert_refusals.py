"""What the converter refuses: one sentence, and nothing is touched."""

import json

import pytest
from conversions import run, write_source
from safetensors.torch import save_file
from tiny_checkpoint import hf_tensors, write_directory

from megatron_patch.families import ALL


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "hf")


def test_values_that_fp16_cannot_hold_are_refused_and_nothing_is_left(tmp_path, capsys):
    tensors = hf_tensors()
    tensors["model.norm.weight"][3] = 1e5
    write_directory(tmp_path / "hf", tensors)
    assert run(tmp_path / "hf", tmp_path / "half", "--format", "hf", "--dtype", "fp16") == 1
    assert "decoder.final_layernorm.weight has values beyond fp16" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("new", ["--tp", "0"], "--tp: 0 is not a count; it must be at least 1"),
        ("hf", [], "lies inside SRC"),
        ("hf/inner", ["--overwrite"], "lies inside SRC"),
        (".", ["--overwrite"], "lies inside DST"),
        ("full", [], "is not empty; choose another directory or pass --overwrite"),
        ("full", ["--overwrite"], "holds no checkpoint; --overwrite replaces checkpoints only"),
        ("file", [], "is a file; name a directory"),
        ("x" * 300, [], "File name too long"),
    ],
)
def test_a_command_that_cannot_work_exits_2_and_touches_nothing(source, tmp_path, capsys, target, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        run(source, tmp_path / target, "--format", "mcore", *options)
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_assets_of_another_architecture_are_an_error_with_key_and_values(source, tmp_path, capsys):
    other = write_directory(tmp_path / "other", hf_tensors(), rope_theta=1e6)
    assert run(source, tmp_path / "out", "--format", "mcore", "--assets", other) == 1
    assert "rope_theta is 1000000.0 in" in (error := capsys.readouterr().err) and "5000.0" in error


def test_a_model_size_of_another_shape_is_an_error(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--format", "mcore", "--model-size", "7B") == 1
    assert "num_hidden_layers is 2" in (error := capsys.readouterr().err) and "32 in MODEL_SIZE 7B" in error


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "moe_router_topk 9 is more than the"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}, "groups must be equal"),
    ],
)
def test_routing_that_no_token_could_follow_is_told_before_anything_is_written(tmp_path, capsys, family, change, told):
    source = tmp_path / "hf"
    source.mkdir()
    size = next(iter(ALL[family].sizes.values()))
    config = {"architectures": [ALL[family].architecture], **size, **change}
    (source / "config.json").write_text(json.dumps(config))
    save_file({}, source / "model.safetensors")
    assert run(source, tmp_path / "out", "--format", "mcore") == 1
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
