import argparse
import io
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from megatron_patch.checkpoint.unpickle import Inert, read_pt, reason


def rezip(path: Path, change=lambda name, data: data, compression=zipfile.ZIP_STORED) -> Path:
    """The file with its records changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))
    return path


def write_pickle(path: Path, program: bytes) -> Path:
    """A `.pt` whose object is the raw pickle `program`."""
    torch.save({"model": {}}, path)
    return rezip(path, lambda name, data: program if name.endswith("data.pkl") else data)


def call(module: str, name: str, *arguments: str) -> bytes:
    """The pickle that calls `module.name(*arguments)` when it is read."""
    packed = b"".join(b"V" + argument.encode() + b"\n" for argument in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + packed + b"tR."


def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    """Its tensors are holes in the file."""
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = sum(int(memory[name].split()[0]) for name in ("MemTotal", "SwapTotal")) * 1024
    path, count = tmp_path / "large.pt", total // 2**30 + 1
    with torch.serialization.skip_data():
        torch.save([torch.empty(2**30, dtype=torch.uint8) for _ in range(count)], path)
    assert path.stat().st_size > total and path.stat().st_blocks * 512 < total // 100
    tensors = read_pt(path)
    assert len(tensors) == count and tensors[-1][-1] == 0


def test_a_tensor_is_the_part_of_its_storage_that_it_was(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    kinds = [torch.bool, torch.int64, torch.bfloat16, torch.float64, torch.complex64, torch.uint8]
    saved = {
        "shares": [whole, whole[1:3, ::2].t()],
        "kinds": [torch.ones(3).to(kind) for kind in kinds],
        "others": [torch.empty(0, 5), torch.tensor(7.0), torch.nn.Parameter(whole)],
    }
    unread = {"storage": torch.ones(3).untyped_storage(), "new": torch.ones(3, dtype=torch.uint16)}
    torch.save(saved | unread, tmp_path / "a.pt")
    read = read_pt(tmp_path / "a.pt")
    for name, tensors in saved.items():
        for ours, theirs in zip(read[name], tensors, strict=True):
            assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride()) and torch.equal(ours, theirs)


def test_reading_never_writes_to_the_file(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "a.pt")
    read_pt(tmp_path / "a.pt").fill_(1)
    assert not read_pt(tmp_path / "a.pt").any()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    torch.save(torch.zeros(4), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    assert content.count(b"K\x04\x85") == 1  # its size, (4,)
    (tmp_path / "a.pt").write_bytes(content.replace(b"K\x04\x85", b"K\x05\x85"))
    with pytest.raises(ValueError, match=r"a.pt is truncated or not a torch checkpoint: .* out of bounds"):
        read_pt(tmp_path / "a.pt")


def test_values_that_are_not_where_they_are_said_to_be_are_refused(tmp_path):
    """Pages of such a file would be read as numbers that nobody wrote."""
    torch.save({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / "whole.pt")
    shorter = rezip(
        shutil.copy(tmp_path / "whole.pt", tmp_path / "short.pt"), lambda n, d: d[:-4] if "data/0" in n else d
    )
    with pytest.raises(ValueError, match=r"short.pt is refused: data/0 holds 3996 bytes, and 4000 are meant$"):
        read_pt(shorter)
    with pytest.raises(ValueError, match=r"whole.pt is refused: it is compressed"):
        read_pt(rezip(tmp_path / "whole.pt", compression=zipfile.ZIP_DEFLATED))


def test_a_file_of_old_torch_says_what_to_do(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"a.pt is refused: torch before 1.6 wrote it; torch.load and torch.save it"):
        read_pt(tmp_path / "a.pt")


def test_a_refusal_is_one_line():
    told = pickle.UnpicklingError("A load persistent id instruction was encountered,\nbut nothing. A second sentence.")
    assert reason(told) == "A load persistent id instruction was encountered, but nothing"
    assert reason(EOFError()) == "EOFError"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("__builtin__", "eval"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("subprocess", "check_output"),
        ("runpy", "run_path"),
        ("importlib", "import_module"),
        ("pickle", "loads"),
        ("operator", "attrgetter"),
        ("shutil", "rmtree"),
        ("_io", "open"),
    ],
)
def test_a_pickle_that_names_code_is_refused_and_nothing_runs(tmp_path, module, name):
    marker = tmp_path / "marker"
    path = write_pickle(tmp_path / "hostile.pt", call(module, name, f"touch {marker}"))
    named = module.replace("__builtin__", "builtins")
    with pytest.raises(ValueError, match=rf"hostile.pt is refused: it names {named}.{name}, which could run code"):
        read_pt(path)
    assert not marker.exists()


def test_an_enum_member_is_inert_in_the_spelling_of_every_python(tmp_path):
    """Python 3.11.0 to 3.11.3, Debian 12's among them, pickles one as getattr(class, name)."""
    member = b"\x80\x02cbuiltins\ngetattr\n(cmegatron.core.enums\nModelType\nVencoder\ntR."
    result = read_pt(write_pickle(tmp_path / "enum.pt", member))
    assert isinstance(result, Inert) and type(result).__name__ == "ModelType"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.storage", "_load_from_bytes"),
        ("torch.hub", "load"),
        ("numpy.testing._private.utils", "runstring"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
        ("code_that_is_not_installed", "run"),
    ],
)
def test_a_foreign_callable_is_never_resolved(tmp_path, module, name):
    result = read_pt(write_pickle(tmp_path / "foreign.pt", call(module, name, "x")))
    assert isinstance(result, Inert) and type(result).__name__ == name


def test_no_module_is_imported_for_a_name(tmp_path, monkeypatch):
    (tmp_path / "booby_trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(read_pt(write_pickle(tmp_path / "a.pt", call("booby_trap", "Thing"))), Inert)


def test_a_pickle_cannot_change_the_functions_it_reaches(tmp_path):
    """BUILD with a slot state assigns attributes; aimed at torch's own functions it would outlive the file."""
    set_attribute = b"\x80\x02c" + b"torch._utils\n_rebuild_tensor_v2\n" + b"(N}Vtampered\nV1\nstb."
    read_pt(write_pickle(tmp_path / "a.pt", set_attribute))
    assert not hasattr(torch._utils._rebuild_tensor_v2, "tampered")
    read_pt(
        write_pickle(
            tmp_path / "b.pt", set_attribute.replace(b"torch._utils\n_rebuild_tensor_v2", b"argparse\nNamespace")
        )
    )
    assert not hasattr(argparse.Namespace, "tampered")


def test_a_torchscript_program_is_not_loaded(tmp_path):
    torch.save({"model": {}}, tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "a") as archive:
        archive.writestr("script/constants.pkl", b"")  # what torch.load tells a program by
    with pytest.raises(ValueError, match=r"script.pt is refused: it is a TorchScript program"):
        read_pt(tmp_path / "script.pt")


FOREIGN = """
import dataclasses, enum

class AttnBackend(enum.Enum):
    flash = 1
    auto = 5

@dataclasses.dataclass
class Strategy:
    steps: list

class Table(dict):
    pass

class Items(list):
    pass

def activation(x):
    return x
"""

WRITER = """
import argparse, collections, io, pathlib, random, signal, sys
import foreign, numpy, torch

args = argparse.Namespace(
    num_layers=2, attention_backend=foreign.AttnBackend.auto, params_dtype=torch.bfloat16, names={"x"}, blob=b"bytes",
    strategy=foreign.Strategy([1]), table=foreign.Table(a=1), items=foreign.Items([1, 2]), save=pathlib.Path("x"),
    activation=foreign.activation, data_path=["a", None], betas=(0.9, 0.95), exit_signal=signal.SIGTERM,
    by_name=collections.OrderedDict(a=1), default=collections.defaultdict(list, a=[1]), device=torch.device("cuda:0"),
)
weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
model = {
    "a.weight": torch.nn.Parameter(weight), "transposed": weight.t(), "b._extra_state": None,
    "a._extra_state": io.BytesIO(b"fp8"),
}
rng = {
    "random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state(), "scalar": numpy.float64(1.5),
    "torch_rng_state": torch.get_rng_state(),
}
torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": model, "rng_state": [rng],
            "optimizer": {"param_groups": [{"lr": 1e-4}], "state": {0: {"exp_avg": weight}}}}, sys.argv[1])
"""


def test_a_file_like_megatrons_own_is_read(tmp_path):
    """Written by a process that has the foreign classes; this one has not."""
    (tmp_path / "foreign.py").write_text(FOREIGN)
    (tmp_path / "writer.py").write_text(WRITER)
    path = tmp_path / "model_optim_rng.pt"
    subprocess.run([sys.executable, tmp_path / "writer.py", path], check=True, timeout=60)
    read = read_pt(path)
    weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    assert torch.equal(read["model"]["a.weight"], weight) and torch.equal(read["model"]["transposed"], weight.t())
    args = read["args"]
    assert isinstance(args, argparse.Namespace)
    assert (args.num_layers, args.params_dtype, args.betas, args.names) == (2, torch.bfloat16, (0.9, 0.95), {"x"})
    assert type(args.attention_backend).__name__ == "AttnBackend" and isinstance(args.attention_backend, Inert)
    assert isinstance(args.strategy, Inert) and isinstance(args.activation, type)
    assert read["optimizer"]["param_groups"] == [{"lr": 1e-4}]
    assert isinstance(args.table, Inert) and isinstance(args.items, Inert) and args.by_name == {"a": 1}
    assert read["rng_state"][0]["torch_rng_state"].dtype == torch.uint8
    assert isinstance(read["rng_state"][0]["np_rng_state"][1], Inert)
    assert "foreign" not in sys.modules


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"model": {"a": torch.ones(100)}}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model_optim_rng.pt is truncated or not a torch checkpoint"):
        read_pt(path)


def test_damaged_pickles_are_named(tmp_path):
    buffer = io.BytesIO()
    pickle.dump({"args": argparse.Namespace(a=1), "rng": numpy.ones(2)}, buffer, protocol=2)
    whole = buffer.getvalue()
    for length in range(0, len(whole) - 1, 7):
        with pytest.raises(ValueError, match=r"damaged.pt"):
            read_pt(write_pickle(tmp_path / "damaged.pt", whole[:length]))
