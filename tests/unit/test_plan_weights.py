"""A damaged or incomplete checkpoint is told before any worker starts; a whole one passes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_patch.plan.weights import check_weights


@pytest.fixture
def megatron(tmp_path):
    for rank in (0, 1):
        directory = tmp_path / "iter_0000012" / f"mp_rank_0{rank}"
        directory.mkdir(parents=True)
        torch.save({"model": {"w": torch.ones(1000)}}, directory / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    return tmp_path


@pytest.fixture
def hugging_face(tmp_path):
    save_file({"a": torch.ones(7), "b": torch.ones(3, 5)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def cut_short(path, bytes_kept):
    path.write_bytes(path.read_bytes()[:bytes_kept])


def test_whole_checkpoints_pass(megatron):
    check_weights(megatron)


def test_whole_safetensors_pass(hugging_face):
    check_weights(hugging_face)


@pytest.mark.parametrize("kept", [0, 5, 3000, -1])
def test_a_truncated_rank_file_is_named(megatron, kept):
    path = megatron / "iter_0000012" / "mp_rank_01" / "model_optim_rng.pt"
    cut_short(path, kept)
    with pytest.raises(ValueError, match=r"mp_rank_01/model_optim_rng.pt is truncated"):
        check_weights(megatron)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_truncated_safetensors_file_is_named(hugging_face, kept):
    cut_short(hugging_face / "model.safetensors", kept)
    with pytest.raises(ValueError, match=r"model.safetensors is (truncated|not a safetensors file)"):
        check_weights(hugging_face)


def test_a_tracker_that_names_a_missing_iteration_says_so(megatron):
    (megatron / "latest_checkpointed_iteration.txt").write_text("13")
    with pytest.raises(FileNotFoundError, match=r"says '13', but .*iter_0000013 holds neither .metadata nor mp_rank"):
        check_weights(megatron)


@pytest.fixture
def trained(tmp_path):
    directory = tmp_path / "iter_0000007"
    directory.mkdir()
    for name, content in {".metadata": b"index", "__0_0.distcp": b"weights"}.items():
        (directory / name).write_bytes(content)
    files = {path.name: {"bytes": path.stat().st_size, "crc32": "0"} for path in directory.iterdir()}
    (directory / "run.json").write_text(json.dumps({"files": files}))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    return tmp_path


def test_what_training_wrote_passes(trained):
    check_weights(trained)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("__0_0.distcp", b"weight", "__0_0.distcp is truncated: 6 bytes, and 7 were written"),
        ("__0_0.distcp", None, "__0_0.distcp does not exist, but run.json names it"),
        (".metadata", b"", ".metadata is truncated"),
        ("run.json", b"{", "run.json is damaged"),
        ("run.json", b"[]", "run.json is damaged"),
    ],
)
def test_a_file_of_an_own_checkpoint_that_is_not_whole_is_named(trained, name, content, told):
    path = trained / "iter_0000007" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        check_weights(trained)


def test_a_shard_that_the_index_names_must_be_there(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002.safetensors does not exist"):
        check_weights(tmp_path)


def test_a_directory_without_weights_is_told_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="or none to start from random ones"):
        check_weights(tmp_path)
