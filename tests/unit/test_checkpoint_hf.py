import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import CONFIG, ENTRIES, hf_tensors, write_directory

from megatron_patch.checkpoint import hf
from megatron_patch.checkpoint.hf import open_hf
from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.layouts import merge
from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.families.mistral import MISTRAL

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensors:
    """A source of the tensors given."""

    tensors: dict

    def dtype_of(self, entry):
        return self.tensors[entry.hf[0]].dtype

    def read(self, entry):
        return merge(entry, [self.tensors[name] for name in entry.hf], CONFIG)


def write_sharded(directory, tensors, shard_bytes, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", shard_bytes)
    directory.mkdir()
    return hf.write_hf(directory, ENTRIES, CONFIG, Tensors(tensors), Target())


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """A float32 checkpoint in files of at most 2000 bytes."""
    write_sharded(tmp_path / "hf", hf_tensors(), 2000, monkeypatch)
    return tmp_path / "hf"


def open_it(directory, config=CONFIG):
    return open_checkpoint(directory, MISTRAL, config)


def test_shards_stay_below_the_limit_and_hold_every_tensor_once(tmp_path, monkeypatch):
    tensors = hf_tensors(torch.bfloat16)
    written = write_sharded(tmp_path / "hf", tensors, 2000, monkeypatch)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    headers = [int.from_bytes((tmp_path / "hf" / file).read_bytes()[:8], "little") for file in files]
    assert all(length % 8 == 0 for length in headers), "tensors start on 8 bytes, as safetensors itself writes them"
    read = {file: load_file(tmp_path / "hf" / file) for file in files}
    assert {name: file for file in files for name in read[file]} == index["weight_map"]
    assert all(torch.equal(read[index["weight_map"][name]][name], tensor) for name, tensor in tensors.items())
    assert max(sum(tensor.nbytes for tensor in held.values()) for held in read.values()) <= 2000
    assert written.bytes == index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert written.tensors == len(tensors)


def test_a_sharded_directory_reads_like_a_single_file(tmp_path, sharded):
    several, single = open_it(sharded), open_it(write_directory(tmp_path / "single", hf_tensors()))
    assert all(torch.equal(several.read(entry), single.read(entry)) for entry in ENTRIES)


def test_a_missing_shard_is_named(sharded):
    (second,) = sharded.glob("model-00002-of-*.safetensors")
    second.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{second.name} does not exist"):
        open_it(sharded)


def test_a_truncated_file_is_named(tmp_path):
    path = write_directory(tmp_path / "hf", hf_tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not safetensors"):
        open_it(tmp_path / "hf")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "", 7, "..", "a\0b"])
def test_an_index_cannot_point_outside_its_directory(tmp_path, name):
    save_file(hf_tensors(), tmp_path / "outside.safetensors")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(hf_tensors(), name)}))
    with pytest.raises(ValueError, match=r"shards must be plain file names"):
        open_it(tmp_path / "hf")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}', "[" * 100_000, "9" * 5000],
    ids=["open", "list", "number", "other", "nested", "digits"],
)
def test_an_index_that_is_none_is_named(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index.json is not an index of tensors"):
        open_it(tmp_path)


def test_an_index_that_misplaces_a_tensor_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"which model.safetensors.index.json does not place there"):
        open_it(sharded)


def test_a_tensor_in_two_files_is_refused(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    twice = "lm_head.weight"
    for file in (files[0], files[-1]):
        save_file(load_file(file) | {twice: hf_tensors()[twice]}, file)
    with pytest.raises(ValueError, match=r"lm_head.weight"):
        open_it(sharded)


def test_a_name_twice_in_one_header_is_refused(tmp_path):
    once = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = b"{" + once % (0, 4) + b"," + once % (4, 8) + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not safetensors"):
        open_it(tmp_path)


@pytest.mark.parametrize("length", [0, 7, 8, 60, 1 << 62])
def test_a_header_that_ends_early_is_named(tmp_path, length):
    path = write_directory(tmp_path / "hf", hf_tensors()) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + content[8:] if length > 60 else content[:length])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not safetensors"):
        open_it(tmp_path / "hf")


def test_a_stale_single_file_beside_an_index_is_refused(sharded):
    save_file(hf_tensors(), sharded / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds both model.safetensors and model.safetensors.index.json"):
        open_it(sharded)


def test_a_shape_that_config_json_does_not_imply_is_named(tmp_path):
    tensors = hf_tensors() | {"model.norm.weight": torch.ones(15)}
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(15,\), config.json implies \(16,\)"):
        open_it(write_directory(tmp_path / "hf", tensors))


def test_missing_and_unknown_tensors_are_listed(tmp_path):
    tensors = hf_tensors() | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(model.norm.weight\); 1 unknown \(model.*q_proj.bias\)"):
        open_it(write_directory(tmp_path / "hf", tensors))


def test_quantised_weights_are_refused(tmp_path):
    tensors = hf_tensors() | {"model.norm.weight": torch.ones(16, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"model.norm.weight is I8; supported are F32, F16, BF16"):
        open_it(write_directory(tmp_path / "hf", tensors))


def test_parts_of_one_tensor_have_one_dtype(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = hf_tensors() | {name: hf_tensors()[name].half()}
    with pytest.raises(ValueError, match=r"up_proj.weight become one tensor but differ in dtype"):
        open_it(write_directory(tmp_path / "hf", tensors))


def test_a_tied_output_on_disk_must_equal_the_embedding(tmp_path):
    tied = dataclasses.replace(CONFIG, share_embeddings_and_output_weights=True)
    tensors = hf_tensors()
    tensors["model.embed_tokens.weight"][3, 4] = float("nan")
    for kind in (torch.float32, torch.int8):
        other = tensors | {"lm_head.weight": tensors["lm_head.weight"].to(kind)}
        with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head.weight differs"):
            open_it(write_directory(tmp_path / str(kind), other), tied)
    equal = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    del tensors["lm_head.weight"]
    for held in (equal, tensors):
        source = open_it(write_directory(tmp_path / str(len(held)), held), tied)
        assert "lm_head.weight" not in source.files


def test_an_old_rotary_buffer_is_ignored(tmp_path):
    tensors = hf_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert open_hf(write_directory(tmp_path / "hf", tensors), ENTRIES, CONFIG).dtype == torch.float32


def test_a_directory_without_a_checkpoint_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of model.safetensors, .* latest_checkpointed_iteration.txt"):
        open_it(tmp_path)


def save_bins(directory, tensors, files=1):
    """What transformers 4 writes without safetensors: torch.save of the state dict, and an index of several."""
    directory.mkdir()
    names = list(tensors)
    shards = {f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin": names[i::files] for i in range(files)}
    if files == 1:
        shards = {"pytorch_model.bin": names}
    for file, held in shards.items():
        torch.save({name: tensors[name] for name in held}, directory / file)
    if files > 1:
        weight_map = {name: file for file, held in shards.items() for name in held}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("files", [1, 3])
def test_bin_files_read_like_safetensors(tmp_path, files):
    bins = open_it(save_bins(tmp_path / "bins", hf_tensors(torch.bfloat16), files))
    safe = open_it(write_directory(tmp_path / "safe", hf_tensors(torch.bfloat16)))
    assert bins.format == "hf" and bins.dtype == torch.bfloat16
    assert all(torch.equal(bins.read(entry), safe.read(entry)) for entry in ENTRIES)


def test_safetensors_are_preferred_to_bin_files_beside_them(tmp_path):
    directory = save_bins(tmp_path / "hf", {"rubbish": torch.ones(1)})
    assert open_it(write_directory(directory, hf_tensors())).dtype == torch.float32


def test_a_bin_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    save_bins(tmp_path / "hf", hf_tensors() | {"bomb": Bomb()})
    with pytest.raises(ValueError, match=r"pytorch_model.bin is refused: it names (posix|os).system"):
        open_it(tmp_path / "hf")
    assert not (tmp_path / "ran").exists()


def test_bin_files_are_held_to_the_same_rules(tmp_path):
    with pytest.raises(ValueError, match=r"model.norm.weight is torch.int8; supported are"):
        open_it(save_bins(tmp_path / "type", hf_tensors() | {"model.norm.weight": torch.ones(16, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(15,\)"):
        open_it(save_bins(tmp_path / "shape", hf_tensors() | {"model.norm.weight": torch.ones(15)}))
    for kind, held in (("nested", {"state_dict": hf_tensors()}), ("numbered", {7: torch.ones(16)})):
        with pytest.raises(ValueError, match=r"is not a dict of tensors"):
            open_it(save_bins(tmp_path / kind, held))
    path = save_bins(tmp_path / "cut", hf_tensors()) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is truncated or not a torch checkpoint"):
        open_it(tmp_path / "cut")
    index = save_bins(tmp_path / "trick", hf_tensors(), 2) / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00002", "../pytorch_model-00002"))
    with pytest.raises(ValueError, match=r"shards must be plain file names"):
        open_it(tmp_path / "trick")
