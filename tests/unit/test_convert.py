import contextlib
import errno
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoint import CONFIG_JSON, hf_tensors, write_directory

from megatron_patch import convert
from megatron_patch.checkpoint import hf, stream
from megatron_patch.checkpoint.atomic import replaced_directory
from megatron_patch.checkpoint.layouts import part_shapes
from megatron_patch.families import ALL
from megatron_patch.families.manifest import manifest
from megatron_patch.families.mistral import MISTRAL

ASSETS = {
    "tokenizer.model": b"\x00binary",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "words.tiktoken": b"IQ== 0",
    "modeling_remote.py": b"raise SystemExit('run')",
}


@pytest.fixture
def source(tmp_path):
    """A Hugging Face directory with tokenizer files, in float32."""
    directory = write_directory(tmp_path / "hf", hf_tensors())
    for name, content in ASSETS.items():
        (directory / name).write_bytes(content)
    return directory


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def tensors_of(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


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


def test_values_that_fp16_cannot_hold_are_refused_and_nothing_is_left(tmp_path, capsys):
    tensors = hf_tensors()
    tensors["model.norm.weight"][3] = 1e5
    write_directory(tmp_path / "hf", tensors)
    assert run(tmp_path / "hf", tmp_path / "half", "--format", "hf", "--dtype", "fp16") == 1
    assert "decoder.final_layernorm.weight has values beyond fp16" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


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


def test_nan_weights_are_named_and_kept(tmp_path, capsys):
    tensors = hf_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    source = write_directory(tmp_path / "hf", tensors)
    assert run(source, tmp_path / "mcore", "--format", "mcore", "--tp", 2, "--verify") == 0
    output = capsys.readouterr()
    assert output.err == ("warning: 1 tensors hold NaN, written as they are: decoder.layers.1.mlp.linear_fc1.weight\n")
    assert "bits verified" in output.out
    run(tmp_path / "mcore", tmp_path / "back", "--format", "hf")
    assert tensors_of(tmp_path / "back")["model.layers.1.mlp.up_proj.weight"].isnan().nonzero().tolist() == [[3, 2]]


@pytest.mark.parametrize("options", [["--verify"], ["--verify-logits", 5]])
def test_a_result_that_is_not_the_source_is_not_kept(source, tmp_path, capsys, monkeypatch, options):
    """A writer that flips a bit of the first number in whatever it writes."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, _damaged(data), offset))
    assert run(source, tmp_path / "out", "--format", "mcore", "--tp", 2, *options) == 1
    assert "convert: verification failed: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def _damaged(data):
    data = bytearray(data)
    data[3] ^= 0x40  # a high bit of the first float's exponent
    return memoryview(data)


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"]])
def test_a_good_result_passes_both_proofs(source, tmp_path, capsys, dtype):
    options = ["--tp", 2, "--verify", "--verify-logits", 5, *dtype]
    assert run(source, tmp_path / "out", "--format", "mcore", *options) == 0
    assert "bits verified, logits of 5 tokens verified" in capsys.readouterr().out


def test_a_full_disk_leaves_a_clear_error_and_no_partial_target(source, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert run(source, tmp_path / "out", "--format", "mcore") == 1
    assert "writing stopped: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


SLOW = """
import os, runpy, sys, time
real = os.pwrite
os.pwrite = lambda *arguments: (time.sleep(0.3), real(*arguments))[1]
runpy.run_module("megatron_patch.convert", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def half_way(source, tmp_path):
    """A conversion to `out`, a while before its end."""
    command = [sys.executable, "-c", SLOW, source, tmp_path / "out", "--format", "mcore"]
    process = subprocess.Popen(  # what a shell starts in the background ignores SIGINT, and so would its children
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.partial/release/*/*")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended or never began"
        time.sleep(0.02)
    assert not (tmp_path / "out").exists()
    yield process
    process.kill()
    process.communicate()


def test_a_killed_conversion_shows_nothing_and_can_be_started_again(source, tmp_path, half_way):
    half_way.kill()
    half_way.wait()
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.*.partial"))
    assert run(source, tmp_path / "out", "--format", "mcore", "--verify") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_conversion_that_is_still_running_is_left_alone(source, tmp_path, half_way):
    assert run(source, tmp_path / "out", "--format", "hf") == 0
    assert half_way.poll() is None and list(tmp_path.glob(".out.*.partial/release/*/*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_cleans_up(tmp_path, half_way, number, status):
    half_way.send_signal(number)
    assert half_way.wait(timeout=60) == status
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert "Traceback" not in half_way.stderr.read()


def test_one_killed_between_two_renames_gives_back_what_stood_there(source, tmp_path):
    run(source, tmp_path / "out", "--format", "mcore")
    (tmp_path / "out").rename(tmp_path / ".out.0123abcd.old")
    assert run(source, tmp_path / "out", "--format", "hf", "--model-size", "7B") == 1
    assert not (tmp_path / "out").exists(), "refused before anything is touched"
    with replaced_directory(tmp_path / "other"):
        assert (tmp_path / ".out.0123abcd.old").exists(), "another target's"
    with contextlib.suppress(ZeroDivisionError), replaced_directory(tmp_path / "out"):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "release").is_dir()


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


def test_overwrite_replaces_the_whole_checkpoint(source, tmp_path):
    target = tmp_path / "out"
    assert run(source, target, "--format", "mcore", "--tp", 2) == 0
    assert run(source, target, "--format", "hf", "--overwrite") == 0
    assert not (target / "release").exists() and (target / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~_umask()


def test_a_linked_target_stays_a_link(source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert run(source, tmp_path / "link", "--format", "hf") == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "model.safetensors").is_file()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("message", ["tp 3", "truncated"])
def test_a_failed_conversion_keeps_what_stood_in_the_target(source, tmp_path, capsys, message):
    run(source, tmp_path / "out", "--format", "mcore")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    if message == "truncated":
        weights = source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    tp = 3 if message == "tp 3" else 1
    assert run(source, tmp_path / "out", "--format", "mcore", "--tp", tp, "--overwrite") == 1
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_an_interrupted_conversion_says_so_and_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_patch.convert.copy_assets", interrupted)
    assert run(source, tmp_path / "out", "--format", "mcore") == 130
    assert capsys.readouterr().err == f"convert: interrupted; {tmp_path / 'out'} is as it was\n"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_assets_serve_a_source_that_has_none(source, tmp_path, capsys):
    run(source, tmp_path / "mcore", "--format", "mcore")
    (tmp_path / "mcore" / "config.json").unlink()
    assert run(tmp_path / "mcore", tmp_path / "back", "--format", "hf") == 1
    assert "holds no config.json; pass --assets" in capsys.readouterr().err
    assert run(tmp_path / "mcore", tmp_path / "back", "--format", "hf", "--assets", source) == 0
    assert_equal_tensors(tensors_of(tmp_path / "back"), hf_tensors())


def test_assets_of_another_architecture_are_an_error_with_key_and_values(source, tmp_path, capsys):
    other = write_directory(tmp_path / "other", hf_tensors(), rope_theta=1e6)
    assert run(source, tmp_path / "out", "--format", "mcore", "--assets", other) == 1
    assert "rope_theta is 1000000.0 in" in (error := capsys.readouterr().err) and "5000.0" in error


def test_a_model_size_of_another_shape_is_an_error(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--format", "mcore", "--model-size", "7B") == 1
    assert "num_hidden_layers is 2" in (error := capsys.readouterr().err) and "32 in MODEL_SIZE 7B" in error


def test_the_module_is_the_command(source, tmp_path):
    command = [sys.executable, "-m", "megatron_patch.convert", source, tmp_path / "out", "--format", "mcore"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == "" and (tmp_path / "out" / "release" / "mp_rank_00").is_dir()


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
