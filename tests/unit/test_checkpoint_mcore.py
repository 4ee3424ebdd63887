"""A classic checkpoint as training writes it, a rank at a time, and what a file of it may hold."""

import argparse
import dataclasses
import resource
import shutil

import pytest
import torch
from tiny_checkpoint import CONFIG, ENTRIES

from megatron_patch.checkpoint import mcore
from megatron_patch.checkpoint.atomic import move_directory
from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.layouts import cut
from megatron_patch.checkpoint.megatron_args import megatron_args
from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.families.mistral import MISTRAL


def whole_tensors():
    torch.manual_seed(0)
    return {entry.mcore: torch.randn(entry.shape) for entry in ENTRIES}


def save(root, tensors, tp=1, iteration=None, **changed_args):
    args = megatron_args(CONFIG, Target(tp=tp), torch.float32)
    vars(args).update(changed_args)
    for rank in range(tp):
        shards = {entry.mcore: cut(entry, tensors[entry.mcore], rank, tp) for entry in ENTRIES}
        mcore.write_rank(root, iteration, f"mp_rank_{rank:02d}", [shards], args)
    return mcore.publish(root, iteration, [f"mp_rank_{rank:02d}" for rank in range(tp)])


def open_it(root, config=CONFIG):
    return open_checkpoint(root, MISTRAL, config)


def rewrite(path, change):
    payload = torch.load(path, weights_only=False)
    change(payload)
    torch.save(payload, path)


@pytest.mark.parametrize("tp", [1, 2])
def test_what_ranks_wrote_reads_whole(tmp_path, tp):
    tensors = whole_tensors()
    assert save(tmp_path, tensors, tp, iteration=20) == tmp_path / "iter_0000020"
    source = open_it(tmp_path)
    assert all(torch.equal(source.read(entry), tensors[entry.mcore]) for entry in ENTRIES)
    assert source.describe() == f"mcore iter_0000020, tp {tp}, te names, float32"


def test_the_file_is_what_megatron_expects(tmp_path):
    directory = save(tmp_path, whole_tensors(), tp=2)
    assert (tmp_path / mcore.TRACKER).read_text() == "release" and directory.name == "release"
    payload = torch.load(directory / "mp_rank_01" / "model_optim_rng.pt", weights_only=False)
    assert type(payload["args"]) is argparse.Namespace and payload["checkpoint_version"] == 3.0
    assert payload["args"].padded_vocab_size == 22 and payload["args"].window_size == (3, 0)
    shapes = {name.removeprefix("decoder.layers.1."): tuple(tensor.shape) for name, tensor in payload["model"].items()}
    assert shapes["embedding.word_embeddings.weight"] == shapes["output_layer.weight"] == (11, 16)
    assert shapes["self_attention.linear_qkv.weight"] == (16, 16)
    assert shapes["mlp.linear_fc1.weight"] == (24, 16) and shapes["mlp.linear_fc2.weight"] == (16, 12)


def test_a_shard_that_is_a_view_is_saved_alone(tmp_path):
    whole = {entry.mcore: torch.randn(entry.shape) for entry in ENTRIES}
    one, two = save(tmp_path / "one", whole, 1), save(tmp_path / "two", whole, 2)
    size = [(directory / "mp_rank_00" / "model_optim_rng.pt").stat().st_size for directory in (one, two)]
    bytes_of_parameters = sum(tensor.nbytes for tensor in whole.values())
    assert size[0] - size[1] > 0.45 * bytes_of_parameters


def test_nothing_is_visible_before_publishing(tmp_path):
    save(tmp_path, whole_tensors(), iteration=10)
    mcore.write_rank(tmp_path, 20, "mp_rank_00", [{}], argparse.Namespace())
    assert open_it(tmp_path).directory == tmp_path / "iter_0000010"
    with pytest.raises(FileNotFoundError, match=r"mp_rank_01.* was not written"):
        mcore.publish(tmp_path, 20, ["mp_rank_00", "mp_rank_01"])
    assert (tmp_path / mcore.TRACKER).read_text() == "10" and not (tmp_path / "iter_0000020").exists()


def test_an_iteration_that_cannot_be_put_in_place_is_not_named_and_the_one_before_stays(tmp_path, monkeypatch):
    tensors = whole_tensors()
    save(tmp_path, tensors, iteration=10)

    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr(mcore, "move_directory", refuse)
    with pytest.raises(OSError, match="no"):
        save(tmp_path, tensors, iteration=20)
    assert open_it(tmp_path).directory == tmp_path / "iter_0000010"


def test_what_cannot_be_replaced_stays(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "weights").write_text("years")
    with pytest.raises(FileNotFoundError):
        move_directory(tmp_path / "absent", tmp_path / "old")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["old", "old/weights"]


def test_publishing_again_replaces_and_leaves_no_rank_of_another_layout(tmp_path):
    mcore.write_rank(tmp_path, 10, "mp_rank_01", [{}], argparse.Namespace())  # an interrupted save at tp 2
    save(tmp_path, whole_tensors(), iteration=10)
    assert [path.name for path in (tmp_path / "iter_0000010").iterdir()] == ["mp_rank_00"]
    newer = {name: tensor + 1 for name, tensor in whole_tensors().items()}
    save(tmp_path, newer, iteration=10)
    source = open_it(tmp_path)
    assert source.layout["tp"] == 1 and torch.equal(source.read(ENTRIES[1]), newer[ENTRIES[1].mcore])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000010", mcore.TRACKER]


def test_extra_states_are_ignored_and_nothing_else_is(tmp_path):
    path = save(tmp_path, whole_tensors()) / "mp_rank_00" / "model_optim_rng.pt"
    rewrite(path, lambda payload: payload["model"].update({"decoder.layers.0.mlp.linear_fc1._extra_state": None}))
    assert open_it(tmp_path).describe() == "mcore release, tp 1, te names, float32"
    rewrite(path, lambda payload: payload["model"].update({"decoder.layers.0.mlp.linear_fc1.scale": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"1 unknown \(decoder.layers.0.mlp.linear_fc1.scale\)"):
        open_it(tmp_path)


def test_a_checkpoint_without_args_is_read_by_its_names_and_shapes(tmp_path):
    rewrite(save(tmp_path, whole_tensors()) / "mp_rank_00" / "model_optim_rng.pt", lambda payload: payload.pop("args"))
    assert open_it(tmp_path).dtype == torch.float32


def test_args_may_be_a_plain_dict_and_nothing_else(tmp_path):
    path = save(tmp_path, whole_tensors()) / "mp_rank_00" / "model_optim_rng.pt"
    rewrite(path, lambda payload: payload.update(args=vars(payload["args"]) | {"num_layers": 3}))
    with pytest.raises(ValueError, match=r"args.num_layers is 3, config.json says 2"):
        open_it(tmp_path)
    rewrite(path, lambda payload: payload.update(args=5))
    with pytest.raises(ValueError, match=r"args is int, not a namespace"):
        open_it(tmp_path)


def test_a_name_that_is_no_text_is_refused(tmp_path):
    path = save(tmp_path, whole_tensors()) / "mp_rank_00" / "model_optim_rng.pt"
    rewrite(path, lambda payload: payload["model"].update({5: torch.ones(1)}))
    with pytest.raises(ValueError, match=r"5 names a tensor, and a name is text"):
        open_it(tmp_path)


@pytest.mark.parametrize(
    "limit", [512, 20_000]
)  # inside the header, and inside a tensor: torch.save raises differently
def test_a_full_disk_is_told_as_one(tmp_path, limit):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*model_optim_rng.pt"):
            mcore.write_rank(tmp_path, None, "mp_rank_00", [{"x": torch.zeros(100_000)}], argparse.Namespace())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "release").exists()


def test_a_missing_tracker_or_iteration_is_named(tmp_path):
    save(tmp_path, whole_tensors(), iteration=10)
    (tmp_path / mcore.TRACKER).write_text("11\n")
    with pytest.raises(
        FileNotFoundError, match=r"iter_0000011 does not exist, but .*latest_checkpointed_iteration.txt"
    ):
        open_it(tmp_path)
    for text, told in (("../other", "'../other'"), ("9" * 5000, "'9+'")):
        (tmp_path / mcore.TRACKER).write_text(text)
        with pytest.raises(ValueError, match=rf"iteration.txt says {told}; it must be release or an iteration number"):
            open_it(tmp_path)
    (tmp_path / mcore.TRACKER).unlink()
    with pytest.raises(FileNotFoundError, match=r"latest_checkpointed_iteration.txt does not exist"):
        open_it(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_is_named(tmp_path, rank):
    directory = save(tmp_path, whole_tensors(), tp=2)
    (directory / f"mp_rank_0{rank}").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"mp_rank_0{rank} does not exist"):
        open_it(tmp_path)


def test_a_rank_too_many_is_refused(tmp_path):
    shutil.copytree(save(tmp_path, whole_tensors()) / "mp_rank_00", tmp_path / "release" / "mp_rank_01")
    with pytest.raises(ValueError, match=r"args.tensor_model_parallel_size is 1, the directory holds 2"):
        open_it(tmp_path)


@pytest.mark.parametrize("size", [10**30, float("inf"), 2.5, 0, -1])
def test_a_size_that_no_layout_has_is_named_with_the_file(tmp_path, size):
    path = save(tmp_path, whole_tensors(), tp=2) / "mp_rank_00" / "model_optim_rng.pt"
    rewrite(path, lambda payload: setattr(payload["args"], "tensor_model_parallel_size", size))
    with pytest.raises(ValueError, match=r"rng.pt: args.tensor_model_parallel_size is .*, the directory holds 2"):
        open_it(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"), [("mp_rank_99999", "mp_rank_01 does not"), ("mp_rank_999999", "not a rank's")]
)
def test_a_rank_far_beyond_the_others_is_told_at_once(tmp_path, name, told):
    shutil.copytree(save(tmp_path, whole_tensors()) / "mp_rank_00", tmp_path / "release" / name)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        open_it(tmp_path)


def test_wrong_shapes_and_names_are_named_with_the_file(tmp_path):
    path = save(tmp_path, whole_tensors()) / "mp_rank_00" / "model_optim_rng.pt"
    rewrite(path, lambda payload: payload["model"].update({"decoder.final_layernorm.weight": torch.ones(15)}))
    with pytest.raises(ValueError, match=r"model_optim_rng.pt: decoder.final_layernorm.weight has shape \(15,\)"):
        open_it(tmp_path)
    rewrite(path, lambda payload: payload["model"].pop("decoder.final_layernorm.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(decoder.final_layernorm.weight\)"):
        open_it(tmp_path)
    rewrite(path, lambda payload: payload.update(model=[1]))
    with pytest.raises(ValueError, match=r"holds no dict under 'model'"):
        open_it(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("rotary_base", 1e6), ("num_layers", 3), ("vocab_size", 20)])
def test_args_that_contradict_config_json_are_an_error_with_both_values(tmp_path, field, value):
    save(tmp_path, whole_tensors())
    other = dataclasses.replace(CONFIG, **{field: value})
    with pytest.raises(ValueError, match=rf"args.{field} is {getattr(CONFIG, field)}, config.json says {value}"):
        open_it(tmp_path, other)


def test_megatrons_default_of_one_query_group_without_gqa_is_understood(tmp_path):
    save(tmp_path, whole_tensors(), group_query_attention=False, num_query_groups=1)
    with pytest.raises(ValueError, match=r"args.num_query_groups is 4, config.json says 2"):
        open_it(tmp_path)
