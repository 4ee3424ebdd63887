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


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (65520.0, "fp16", "has values beyond fp16's 65504; keep the dtype or use bf16"),
        (-1e5, "fp16", "has values beyond fp16's 65504; keep the dtype or use bf16"),
        (3.4e38, "bf16", "has values beyond bf16's 3.38953e+38; keep the dtype"),
    ],
)
def test_values_that_a_type_cannot_hold_are_refused_and_nothing_is_left(tmp_path, capsys, value, dtype, told):
    tensors = hf_tensors()
    tensors["model.norm.weight"][3] = value
    write_directory(tmp_path / "hf", tensors)
    assert run(tmp_path / "hf", tmp_path / "half", "--format", "hf", "--dtype", dtype) == 1
    assert f"decoder.final_layernorm.weight {told}\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("new", ["--tp", "0"], "--tp: 0 is not a count; it must be at least 1"),
        ("new", ["--tp", "9" * 5000], f"--tp: {'9' * 18}… is not a count; it must be at least 1"),
        ("loop", [], "is a link that leads to itself"),
        ("linked", ["--overwrite"], "tokenizer.model is a link into DST"),
        ("hf", [], "lies inside SRC"),
        ("hf/inner", ["--overwrite"], "lies inside SRC"),
        (".", ["--overwrite"], "lies inside DST"),
        ("full", [], "is not empty; choose another directory or pass --overwrite"),
        ("full", ["--overwrite"], "holds no checkpoint; --overwrite replaces checkpoints only"),
        ("file", [], "is a file; name a directory"),
        ("x" * 300, [], "File name too long"),
        ("\udcff", [], "is a name that is not UTF-8; rename it"),
    ],
)
def test_a_command_that_cannot_work_exits_2_and_touches_nothing(source, tmp_path, capsys, target, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    write_directory(tmp_path / "linked", hf_tensors())
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.model").symlink_to(tmp_path / "linked" / "config.json")
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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda hf: (hf / "tokenizer.model").unlink(), None),
        (lambda hf: (hf / "merges.txt").symlink_to("nowhere"), "merges.txt is a link to a file that does not exist"),
        (lambda hf: rename(hf, "\x1b[2J\n"), r"1 unknown ('\x1b[2J\n')"),
        (lambda hf: write_directory(hf, hf_tensors(), model_type="llama"), "model_type is 'llama', but Mistral"),
        (lambda hf: write_directory(hf, hf_tensors(), num_hidden_layers=10**7), "at most 262,144 are supported"),
        (lambda hf: write_directory(hf, hf_tensors(), quantization_config={"quant_method": "awq"}), "('awq')"),
    ],
    ids=["less", "dangling", "terminal codes", "model_type", "layers", "quantised"],
)
def test_a_source_that_cannot_be_used_ends_in_one_line(source, tmp_path, capsys, change, told):
    change(source)
    assert run(source, tmp_path / "out", "--format", "mcore") == (1 if told else 0)
    error = capsys.readouterr().err
    assert error == "" if told is None else told in error and error.count("\n") == 1
    assert (tmp_path / "out").exists() == (told is None)


def rename(hf, name):
    tensors = hf_tensors()
    write_directory(hf, tensors | {name: tensors.pop("model.norm.weight")})


def test_logits_that_cannot_be_computed_are_refused_before_anything_is_written(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--format", "mcore", "--verify-logits", 65) == 1
    assert "logits of 65 tokens cannot be compared: max_position_embeddings is 64" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
