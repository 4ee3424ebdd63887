import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import CONFIG, ENTRIES, hf_tensors, write_directory

from megatron_patch.checkpoint.hf import open_hf, write_safetensors
from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.families.mistral import MISTRAL

INDEX = "model.safetensors.index.json"


def write_sharded(directory, tensors, shard_bytes):
    directory.mkdir()
    outline = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_safetensors(directory, outline, tensors.values(), shard_bytes)


def open_it(directory, config=CONFIG):
    return open_checkpoint(directory, MISTRAL, config)


def test_shards_stay_below_the_limit_and_hold_every_tensor_once(tmp_path):
    tensors = hf_tensors(torch.bfloat16)
    total = write_sharded(tmp_path / "hf", tensors, shard_bytes=2000)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    headers = [int.from_bytes((tmp_path / "hf" / file).read_bytes()[:8], "little") for file in files]
    assert all(length % 8 == 0 for length in headers), "tensors start on 8 bytes, as safetensors itself writes them"
    read = {file: load_file(tmp_path / "hf" / file) for file in files}
    assert {name: file for file in files for name in read[file]} == index["weight_map"]
    assert all(torch.equal(read[index["weight_map"][name]][name], tensor) for name, tensor in tensors.items())
    assert max(sum(tensor.nbytes for tensor in held.values()) for held in read.values()) <= 2000
    assert total == index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_sharded_directory_reads_like_a_single_file(tmp_path):
    write_sharded(tmp_path / "sharded", hf_tensors(), shard_bytes=2000)
    sharded, single = open_it(tmp_path / "sharded"), open_it(write_directory(tmp_path / "single", hf_tensors()))
    assert all(torch.equal(sharded.read(entry), single.read(entry)) for entry in ENTRIES)


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(tmp_path / "hf", hf_tensors(), shard_bytes=2000)
    (second,) = (tmp_path / "hf").glob("model-00002-of-*.safetensors")
    second.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{second.name} does not exist"):
        open_it(tmp_path / "hf")


def test_a_truncated_file_is_named(tmp_path):
    path = write_directory(tmp_path / "hf", hf_tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not safetensors"):
        open_it(tmp_path / "hf")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", 7])
def test_an_index_cannot_point_outside_its_directory(tmp_path, name):
    save_file(hf_tensors(), tmp_path / "outside.safetensors")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(hf_tensors(), name)}))
    with pytest.raises(ValueError, match=r"shards must be plain file names"):
        open_it(tmp_path / "hf")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_an_index_that_is_none_is_named(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index.json is not an index of tensors"):
        open_it(tmp_path)


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path):
    write_sharded(tmp_path / "hf", hf_tensors(), shard_bytes=2000)
    path = tmp_path / "hf" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"which model.safetensors.index.json does not place there"):
        open_it(tmp_path / "hf")


def test_a_stale_single_file_beside_an_index_is_refused(tmp_path):
    write_sharded(tmp_path / "hf", hf_tensors(), shard_bytes=2000)
    save_file(hf_tensors(), tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds both model.safetensors and model.safetensors.index.json"):
        open_it(tmp_path / "hf")


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
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head.weight differs"):
        open_it(write_directory(tmp_path / "differs", tensors), tied)
    equal = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    del tensors["lm_head.weight"]
    for held in (equal, tensors):
        source = open_it(write_directory(tmp_path / str(len(held)), held), tied)
        assert "lm_head.weight" not in source.files


def test_an_old_rotary_buffer_is_ignored(tmp_path):
    tensors = hf_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert open_hf(write_directory(tmp_path / "hf", tensors), ENTRIES, CONFIG).dtype == torch.float32


def test_a_directory_without_a_checkpoint_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of model.safetensors .*, latest_checkpointed_iteration.txt"):
        open_it(tmp_path)
