"""Distributed checkpoints against torch.distributed.checkpoint itself; Megatron-Core is in tests/megatron_core."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from layouts_of_mcore import CONFIGS, ENTRIES, RandomSource
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megatron_patch.checkpoint import distcp
from megatron_patch.checkpoint.formats import detect_format
from megatron_patch.checkpoint.interface import Target
from megatron_patch.checkpoint.torch_dist import open_torch_dist, write_torch_dist

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it should be
OUTPUT = next(entry for entry in ENTRIES["mistral"] if entry.mcore == "output_layer.weight")
LAST = {  # one tensor of the last layer: our name, Megatron-Core's, and the position in it
    "mistral": ("3.mlp.linear_fc2.weight", "mlp.linear_fc2.weight", (3,)),
    "qwen1_5": ("3.self_attention.linear_qkv.bias", "self_attention.linear_qkv.bias", (3,)),
    "mixtral": ("3.mlp.experts.local_experts.2.linear_fc1.weight", "mlp.experts.experts.linear_fc1.weight", (3, 2)),
    "deepseek_v2": (
        "3.mlp.experts.local_experts.2.linear_fc2.weight",
        "3.mlp.experts.experts.linear_fc2.weight",
        (2,),
    ),
}
EXTRA = "._extra_state/shard_"


def write(root, family="mistral", implementation="te"):
    """A random model on disk; returns its source."""
    source = RandomSource(family)
    target = Target(transformer_impl=implementation)
    root.mkdir(exist_ok=True)
    write_torch_dist(root, ENTRIES[family], CONFIGS[family], source, target)
    return source


def open_it(root, family="mistral"):
    return open_torch_dist(root, ENTRIES[family], CONFIGS[family])


def holds(root, source, family="mistral"):
    """Whether `root` holds exactly the tensors of `source`."""
    found = open_it(root, family)
    return all(torch.equal(found.read(entry), source.read(entry)) for entry in ENTRIES[family])


def read_by_torch(directory):
    """Every tensor and object, as torch.distributed.checkpoint reads them into plain memory."""
    index = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(found.size, dtype=found.properties.dtype) if hasattr(found, "size") else "absent"
        for name, found in index.items()
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return state


def rewrite_by_torch(root, change=lambda tensors: tensors):
    """Replace the tensors of `root` by torch's own writing of what it held, in several files and without boxes."""
    state = {name: value for name, value in read_by_torch(root / "release").items() if isinstance(value, torch.Tensor)}
    for name in (distcp.DATA, distcp.INDEX):
        (root / "release" / name).unlink()
    state = change(state) | {"rng_state/shard_0_1": b"an object"}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(root / "release", thread_count=2), no_dist=True)


def change_index(root, change):
    """Run `change` on the checkpoint's index."""
    path = root / "release" / distcp.INDEX
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))


@pytest.mark.parametrize(
    ("family", "implementation", "expected"),
    [
        ("mistral", "te", {"self_attention.linear_qkv.weight": (4, 32, 16), "mlp.linear_fc1.weight": (4, 48, 16)}),
        ("mistral", "te", {"self_attention.linear_qkv.layer_norm_weight": (4, 16)}),
        ("qwen1_5", "local", {"mlp.linear_fc1.layer_norm_weight": (4, 16), "self_attention.linear_qkv.bias": (4, 32)}),
        ("mixtral", "te", {"mlp.experts.experts.linear_fc1.weight": (4, 4, 48, 16), "mlp.router.weight": (4, 4, 16)}),
        (
            "mixtral",
            "te",
            {"mlp.experts.experts.linear_fc2.weight": (4, 4, 16, 24), "pre_mlp_layernorm.weight": (4, 16)},
        ),
        ("mixtral", "local", {"mlp.linear_fc1.layer_norm_weight": (4, 16)}),
        ("deepseek_v2", "te", {"0.mlp.linear_fc1.layer_norm_weight": (16,), "1.pre_mlp_layernorm.weight": (16,)}),
        ("deepseek_v2", "te", {"3.mlp.experts.experts.linear_fc1.weight": (4, 16, 16)}),
        ("deepseek_v2", "te", {"1.self_attention.linear_q_up_proj.layer_norm_weight": (12,)}),
        ("deepseek_v2", "local", {"1.self_attention.q_layernorm.weight": (12,), "0.pre_mlp_layernorm.weight": (16,)}),
        ("deepseek_v2", "local", {"2.self_attention.kv_layernorm.weight": (4,), "2.input_layernorm.weight": (16,)}),
    ],
)
def test_names_and_shapes_are_megatron_cores(tmp_path, family, implementation, expected):
    write(tmp_path, family, implementation)
    shapes = {name: stored.shape for name, stored in distcp.read_index(tmp_path / "release").items()}
    assert {f"decoder.layers.{name}": shape for name, shape in expected.items()}.items() <= shapes.items()
    assert shapes["embedding.word_embeddings.weight"] == (21, 16)


@pytest.mark.parametrize("family", ENTRIES)
@pytest.mark.parametrize("implementation", ["te", "local"])
def test_torch_reads_what_is_written_and_so_do_we(tmp_path, family, implementation):
    source = write(tmp_path, family, implementation)
    state = read_by_torch(tmp_path / "release")
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in tensors) == sum(tensor.numel() for tensor in source.tensors.values())
    ours, theirs, position = LAST[family]
    assert torch.equal(state[f"decoder.layers.{theirs}"][position], source.tensors[f"decoder.layers.{ours}"])
    assert holds(tmp_path, source, family)
    assert open_it(tmp_path, family).describe().startswith("torch_dist release, ")
    assert detect_format(tmp_path).name == "torch_dist"


def test_every_linear_has_the_empty_state_that_megatron_core_asks_for(tmp_path):
    write(tmp_path, "mixtral", "local")
    states = {name: value for name, value in read_by_torch(tmp_path / "release").items() if EXTRA in name}
    assert set(map(str, states.values())) == {"[None]"}
    assert f"decoder.layers.self_attention.linear_qkv{EXTRA}3_4" in states
    assert f"decoder.layers.mlp.experts.experts.linear_fc2{EXTRA}2.3_4.4" in states
    assert len(states) == 4 * (2 + 4 * 2)
    write(tmp_path / "te", "deepseek_v2", "te")
    states = read_by_torch(tmp_path / "te" / "release")
    assert {f"decoder.layers.3.self_attention.core_attention{EXTRA}0_1", f"decoder.final_layernorm{EXTRA}0_1"} <= set(
        states
    )


def test_a_stack_that_is_one_box_is_read_layer_by_layer(tmp_path):
    source = write(tmp_path, "mixtral")
    rewrite_by_torch(tmp_path)
    assert len(list((tmp_path / "release").glob("*.distcp"))) == 2
    assert holds(tmp_path, source, "mixtral")


def test_the_padding_of_a_vocabulary_is_left_out_and_an_optimizer_not_read(tmp_path):
    source, padding = write(tmp_path), torch.full((11, 16), 7.0)

    def padded(tensors):
        names = ("embedding.word_embeddings.weight", "output_layer.weight")
        moments = {f"optimizer.state.exp_avg.{name}": tensor for name, tensor in tensors.items()}
        return tensors | moments | {name: torch.cat([tensors[name], padding]) for name in names}

    rewrite_by_torch(tmp_path, padded)
    assert holds(tmp_path, source)


def boxes(*extents):
    return [distcp.Box(start, shape, None, 0, 0) for start, shape in extents]


def test_boxes_line_up_along_the_axis_that_cuts_them():
    found = boxes(((1, 4, 0), (1, 4, 6)), ((1, 0, 0), (1, 4, 6)), ((0, 0, 0), (1, 8, 6)))
    parts = distcp.resolve_parts(found, torch.float32, (1, 0, 0), (1, 7, 6))
    assert [part.box.start for part in parts] == [(1, 0, 0), (1, 4, 0)]
    assert parts[1].slices == (slice(0, 1), slice(0, 3), slice(0, 6))
    [part] = distcp.resolve_parts(boxes(((0, 0, 0), (4, 8, 6))), torch.float32, (2, 0, 0), (1, 8, 6))
    assert part.slices == (slice(2, 3), slice(0, 8), slice(0, 6))


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [((0, 0), (4, 6))],  # the rest is missing
        [((0, 0), (3, 6)), ((4, 0), (4, 6))],  # a gap
        [((0, 0), (5, 6)), ((4, 0), (4, 6))],  # an overlap
        [((0, 0), (8, 6)), ((0, 0), (8, 6))],  # twice
        [((0, 0), (5, 6)), ((4, 0), (3, 6))],  # as many elements as there are, one row twice and one not at all
        [((0, 0), (4, 3)), ((0, 3), (4, 3)), ((4, 0), (4, 3)), ((4, 3), (4, 3))],  # a grid
    ],
)
def test_boxes_that_do_not_hold_everything_once_are_refused(extents):
    with pytest.raises(ValueError, match=r"\(8, 6\) elements from \(0, 0\) on are not stored once each"):
        distcp.resolve_parts(boxes(*extents), torch.float32, (0, 0), (8, 6))


def test_what_lies_in_several_boxes_is_joined(tmp_path):
    """As tensor parallelism of 2 leaves it: [gate_0, gate_1, up_0, up_1], and columns of a row-parallel layer."""
    write(tmp_path)
    release = tmp_path / "release"
    whole = {n: v for n, v in read_by_torch(release).items() if isinstance(v, torch.Tensor)}
    cuts = {"mlp.linear_fc1.weight": (1, 4), "mlp.linear_fc2.weight": (2, 2), "linear_proj.weight": (2, 2)}
    blanks, values = [], []
    for name, tensor in whole.items():
        axis, count = next((cut for end, cut in cuts.items() if name.endswith(end)), (0, 1))
        for number, value in enumerate(tensor.chunk(count, axis)):
            start = [0] * tensor.dim()
            start[axis] = number * value.shape[axis]
            blanks.append(distcp.BlankBox(name, tuple(start), tuple(value.shape), value.dtype))
            values.append(value.contiguous())
    offsets = distcp.lay_out(release, {name: tuple(tensor.shape) for name, tensor in whole.items()}, blanks, [])
    with (release / distcp.DATA).open("r+b") as file:
        for offset, value in zip(offsets, values, strict=True):
            file.seek(offset)
            file.write(value.view(torch.uint8).numpy())
    assert len(blanks) == len(whole) + 3 + 1 + 1
    assert holds(tmp_path, RandomSource("mistral"))


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w')",)


def test_an_index_that_names_code_is_refused_and_nothing_runs(tmp_path):
    write(tmp_path)
    change_index(tmp_path, lambda index: setattr(index, "planner_data", Hostile(tmp_path / "marker")))
    with pytest.raises(ValueError, match=r"\.metadata is refused: it names builtins.exec, which could run code"):
        open_it(tmp_path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("foreign", [b"Planned for 2031\n.", b"\nI am a note\n", b"", b"\x80\x02(lp0\n."])
def test_an_index_of_something_else_is_told_in_one_line(tmp_path, foreign):
    (tmp_path / ".metadata").write_bytes(foreign)
    with pytest.raises(
        ValueError, match=r"\.metadata is (refused|truncated or not a torch.distributed.*index): .+"
    ) as told:
        distcp.read_index(tmp_path)
    assert len(str(told.value).splitlines()) == 1


def test_a_box_that_names_code_is_refused_and_nothing_runs(tmp_path):
    write(tmp_path)
    path = tmp_path / "release" / distcp.DATA
    torch.save(Hostile(tmp_path / "marker"), tmp_path / "hostile.pt")
    hostile = (tmp_path / "hostile.pt").read_bytes()

    def replace(index):
        name = MetadataIndex("output_layer.weight", (0, 0))
        info = index.storage_data[name]
        info.offset, info.length = path.stat().st_size, len(hostile)
        path.write_bytes(path.read_bytes() + hostile)

    change_index(tmp_path, replace)
    source = open_it(tmp_path)
    with pytest.raises(ValueError, match=r"no tensor to read: it names builtins.exec, which could run code"):
        source.read(OUTPUT)
    assert not (tmp_path / "marker").exists()


def info_of(index, name="output_layer.weight"):
    return index.storage_data[MetadataIndex(name, (0, 0))]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda index: setattr(info_of(index), "relative_path", "../x.distcp"), "names '../x.distcp'"),
        (lambda index: setattr(info_of(index), "relative_path", "__9_0.distcp"), "__9_0.distcp does not exist"),
        (lambda index: setattr(info_of(index), "length", 10**6), "__0_0.distcp is truncated"),
        (lambda index: setattr(info_of(index), "offset", -1), "description of output_layer.weight is not that of"),
        (lambda index: setattr(info_of(index), "transform_descriptors", ["zstd"]), "transformed by .'zstd'."),
        (lambda index: index.storage_data.clear(), "not a torch.distributed.checkpoint index"),
        (lambda index: index.state_dict_metadata.pop("output_layer.weight"), "1 missing .output_layer.weight"),
        (
            lambda index: index.state_dict_metadata["output_layer.weight"].chunks.append(
                ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((21, 16)))
            ),
            "output_layer.weight: the .21, 16. elements from .0, 0. on are not stored once each",
        ),
    ],
)
def test_an_index_that_cannot_be_true_is_told(tmp_path, change, told):
    write(tmp_path)
    change_index(tmp_path, change)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        open_it(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: t | {"output_layer.weight": t["output_layer.weight"][:20]},
            "has shape .20, 16., config.json implies",
        ),
        (lambda t: t | {"output_layer.weight": t["output_layer.weight"].double()}, "is torch.float64; supported are"),
        (lambda t: t | {"mtp.weight": torch.zeros(2)}, "1 unknown .mtp.weight"),
    ],
)
def test_tensors_other_than_the_models_are_told(tmp_path, change, told):
    write(tmp_path)
    rewrite_by_torch(tmp_path, change)
    with pytest.raises(ValueError, match=told):
        open_it(tmp_path)


def test_a_box_other_than_the_index_says_is_told_when_it_is_read(tmp_path):
    write(tmp_path)

    def swap(index):
        norm = index.storage_data[MetadataIndex("decoder.final_layernorm.weight", (0,))]
        info_of(index).offset, info_of(index).length = norm.offset, norm.length

    change_index(tmp_path, swap)
    source = open_it(tmp_path)
    with pytest.raises(ValueError, match=r"FloatStorage \(16,\), but .metadata says torch.float32 \(21, 16\)"):
        source.read(OUTPUT)


def test_arguments_that_contradict_the_architecture_are_told(tmp_path):
    write(tmp_path)
    path = tmp_path / "release" / "common.pt"
    common = torch.load(path, weights_only=False)
    assert common["content_metadata"] == {"singleton_local_shards": False}
    common["args"].tensor_model_parallel_size = 8  # says nothing about the files
    common["args"].rotary_base = 77
    torch.save(common, path)
    with pytest.raises(ValueError, match=r"common.pt: args.rotary_base is 77, config.json says 10000"):
        open_it(tmp_path)


def test_the_arguments_make_megatron_core_look_for_the_names_that_are_there(tmp_path):
    for family, frequency in (("mixtral", 1), ("deepseek_v2", [0, 1, 1, 1])):
        write(tmp_path / family, family)
        common = torch.load(tmp_path / family / "release" / "common.pt", weights_only=False)
        assert common["args"].moe_layer_freq == frequency


def test_layers_of_different_types_cannot_be_one_tensor(tmp_path):
    source = RandomSource("mistral")
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    source.tensors[name] = source.tensors[name].half()
    with pytest.raises(ValueError, match=r"decoder.layers.mlp.linear_fc2.weight is one tensor for several layers"):
        write_torch_dist(tmp_path, ENTRIES["mistral"], CONFIGS["mistral"], source, Target())
