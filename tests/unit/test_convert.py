"""What the converter writes, says and carries along."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from beside_transformers import TINY, peer
from conversions import ASSETS, assert_equal_tensors, run, tensors_of, write_source
from tiny_checkpoint import CONFIG_JSON, hf_tensors, write_directory

from megatron_patch.checkpoint import hf, stream
from megatron_patch.checkpoint.layouts import part_shapes
from megatron_patch.families.manifest import manifest
from megatron_patch.families.mistral import MISTRAL


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "hf")


@pytest.mark.parametrize("impl", ["te", "local"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_mcore_and_back_keeps_every_bit(tmp_path, dtype, tp, impl):
    source = write_directory(tmp_path / "hf", hf_tensors(dtype), torch_dtype=str(dtype).removeprefix("torch."))
    assert run(source, tmp_path / "mcore", "--format", "mcore", "--tp", tp, "--transformer-impl", impl) == 0
    assert run(tmp_path / "mcore", tmp_path / "back", "--format", "hf") == 0
    assert_equal_tensors(tensors_of(tmp_path / "back"), hf_tensors(dtype))
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_resharding_needs_no_detour(source, tmp_path):
    assert run(source, tmp_path / "one", "--format", "mcore") == 0
    assert run(tmp_path / "one", tmp_path / "two", "--format", "mcore", "--tp", 2, "--transformer-impl", "local") == 0
    assert run(tmp_path / "two", tmp_path / "back", "--format", "hf") == 0
    assert_equal_tensors(tensors_of(tmp_path / "back"), hf_tensors())


def test_several_shards_come_back_too(source, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 2000)
    assert run(source, tmp_path / "sharded", "--format", "hf") == 0
    assert (tmp_path / "sharded" / hf.INDEX).is_file()
    assert_equal_tensors(tensors_of(tmp_path / "sharded"), hf_tensors())


def test_tokenizer_and_config_files_travel_and_weights_do_not(source, tmp_path):
    (source / "notes.bin").write_bytes(b"not an asset")
    run(source, tmp_path / "mcore", "--format", "mcore")
    run(tmp_path / "mcore", tmp_path / "back", "--format", "hf")
    for name, content in ASSETS.items():
        assert (tmp_path / "back" / name).read_bytes() == content
    assert {path.name for path in (tmp_path / "mcore").iterdir()} == {
        *ASSETS,
        "config.json",
        "release",
        "latest_checkpointed_iteration.txt",
    }


@pytest.mark.parametrize("family", list(TINY))
@torch.no_grad()
def test_transformers_computes_from_what_comes_back_what_it_did(tmp_path, family):
    torch.set_num_threads(1)
    theirs = peer(family)
    theirs.save_pretrained(tmp_path / "hf")
    assert run(tmp_path / "hf", tmp_path / "mcore", "--format", "mcore", "--tp", 2) == 0
    assert run(tmp_path / "mcore", tmp_path / "back", "--format", "hf") == 0
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, experts_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(back(tokens).logits, theirs.eval()(tokens).logits)


def test_transformers_loads_what_comes_back(tmp_path):
    """transformers wrote the source, so its names, shapes and config spellings are the witness."""
    config = transformers.MistralConfig(
        **{key: value for key, value in CONFIG_JSON.items() if key not in ("torch_dtype", "model_type")}
    )
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "mcore", "--format", "mcore", "--tp", 2)
    run(tmp_path / "mcore", tmp_path / "back", "--format", "hf")
    back, info = transformers.MistralForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and back.dtype == torch.bfloat16
    assert_equal_tensors(back.state_dict(), model.state_dict())


def test_dtype_converts_every_tensor_and_config_json_says_so(source, tmp_path):
    run(source, tmp_path / "mcore", "--format", "mcore", "--dtype", "bf16")
    run(tmp_path / "mcore", tmp_path / "back", "--format", "hf")
    assert_equal_tensors(tensors_of(tmp_path / "back"), hf_tensors(torch.bfloat16))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_source_is_only_read(source, tmp_path):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    run(source, tmp_path / "mcore", "--format", "mcore", "--tp", 2)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before


def test_one_closing_line_and_no_progress_bar_in_a_log(source, tmp_path, capsys):
    run(source, tmp_path / "mcore", "--format", "mcore", "--tp", 2)
    output = capsys.readouterr()
    size = sum(tensor.nbytes for tensor in hf_tensors().values())
    assert output.err == "" and output.out.count("\n") == 1
    assert "mcore, 15 tensors" in output.out
    replicated_norms, padding_rows = 5 * 16 * 4, 2 * 16 * 4
    assert f"{size + replicated_norms + padding_rows:,} bytes" in output.out
    assert re.search(r", \d+\.\d s, peak memory [1-9]\d* MiB, manifest sha256 [0-9a-f]{64}\n$", output.out)


def test_the_manifest_hash_tells_types_and_architectures_apart_but_not_layouts(source, tmp_path, capsys):
    def hash_of(directory, *options):
        capsys.readouterr()
        run(source, tmp_path / directory, "--format", "mcore", *options)
        return capsys.readouterr().out.split()[-1]

    whole = hash_of("whole")
    assert whole == hash_of("cut", "--tp", 2)
    assert whole != hash_of("half", "--dtype", "bf16")


def test_a_terminal_gets_a_progress_bar_in_bytes_with_the_time_left(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stream, "_is_watched", lambda: True)
    run(source, tmp_path / "mcore", "--format", "mcore")
    assert re.search(r"writing:.*\d.*B/s", capsys.readouterr().err)


def test_nan_weights_are_named_and_kept(source, tmp_path, capsys):
    tensors = hf_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    write_directory(source, tensors)
    assert run(source, tmp_path / "mcore", "--format", "mcore", "--tp", 2, "--verify") == 0
    output = capsys.readouterr()
    assert output.err == ("warning: 1 tensors hold NaN, written as they are: decoder.layers.1.mlp.linear_fc1.weight\n")
    assert "bits verified" in output.out
    run(tmp_path / "mcore", tmp_path / "back", "--format", "hf")
    assert tensors_of(tmp_path / "back")["model.layers.1.mlp.up_proj.weight"].isnan().nonzero().tolist() == [[3, 2]]


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A model of 0.7 GB whose largest tensor is 0.13 GB; zeros, so that the source is a sparse file."""
    changed = {"hidden_size": 2048, "intermediate_size": 16000, "vocab_size": 32000, "head_dim": 64}
    config = MISTRAL.config(CONFIG_JSON | changed)
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG_JSON | changed))
    header, end = {}, 0
    for entry in manifest(MISTRAL, config):
        for name, shape in zip(entry.hf, part_shapes(entry, config), strict=True):
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    largest = 2 * 32000 * 2048
    command = [sys.executable, "-m", "megatron_patch.convert", directory, tmp_path / "out", "--format", "mcore"]
    result = subprocess.run([*command, "--tp", "2"], capture_output=True, text=True, timeout=300, check=True)
    peak = int(re.search(r"peak memory (\d+) MiB", result.stdout)[1]) << 20
    bound = 1.5 * largest / 2 + 400e6
    assert end > bound + 100e6, "a converter that loads everything would pass"
    assert peak <= bound


def test_assets_serve_a_source_that_has_none(source, tmp_path, capsys):
    run(source, tmp_path / "mcore", "--format", "mcore")
    (tmp_path / "mcore" / "config.json").unlink()
    assert run(tmp_path / "mcore", tmp_path / "back", "--format", "hf") == 1
    assert "holds no config.json; pass --assets" in capsys.readouterr().err
    assert run(tmp_path / "mcore", tmp_path / "back", "--format", "hf", "--assets", source) == 0
    assert_equal_tensors(tensors_of(tmp_path / "back"), hf_tensors())


def test_the_module_is_the_command(source, tmp_path):
    command = [sys.executable, "-m", "megatron_patch.convert", source, tmp_path / "out", "--format", "mcore"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == "" and (tmp_path / "out" / "release" / "mp_rank_00").is_dir()


def test_many_tensors_with_nan_are_counted_and_some_are_named(source, tmp_path, capsys):
    write_directory(source, {name: torch.full_like(tensor, float("nan")) for name, tensor in hf_tensors().items()})
    assert run(source, tmp_path / "mcore", "--format", "mcore", "--verify") == 0
    assert re.fullmatch(r"warning: 15 tensors hold NaN, .*(decoder\S+, ){3}\S+ and 11 more\n", capsys.readouterr().err)


def test_a_source_without_a_tokenizer_is_told(tmp_path, capsys):
    source = write_directory(tmp_path / "hf", hf_tensors())
    (source / "modeling_remote.py").write_text("")
    assert run(source, tmp_path / "out", "--format", "hf") == 0
    assert capsys.readouterr().err == (
        f"warning: {source} holds no tokenizer, so none travels along; training will need --tokenizer-model\n"
    )


def test_both_spellings_of_the_type_are_kept_true(tmp_path):
    source = write_directory(tmp_path / "hf", hf_tensors(), dtype="float32")
    run(source, tmp_path / "half", "--format", "hf", "--dtype", "bf16")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_closing_line_that_cannot_be_written_is_told_without_a_traceback(source, tmp_path):
    command = [sys.executable, "-m", "megatron_patch.convert", source, tmp_path / "out", "--format", "hf"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    told = f"convert: {tmp_path / 'out'} is complete, but the output could not say so: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, told)
    assert_equal_tensors(tensors_of(tmp_path / "out"), hf_tensors())
