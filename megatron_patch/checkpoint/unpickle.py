"""Reading a `.pt` that somebody else wrote, without running anything that it names.

A Megatron checkpoint pickles its whole `args`, with classes this machine need not have. Tensors and plain containers
are resolved; every other class becomes an inert stand-in; what has no place in a checkpoint and could run code is
refused by name. The few mutable objects a pickle can reach are made afresh for each file, because a pickle can also
assign attributes.
"""

import argparse
import collections
import io
import mmap
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_patch.checkpoint.mapping import map_pages

# Real checkpoints hold these in `args` or `rng_state`; they are read as inert stand-ins, never resolved.
_INERT_MODULES = frozenset({"collections", "datetime", "decimal", "enum", "fractions", "pathlib", "signal", "uuid"})
_INERT_NAMES = frozenset(
    {"_codecs.encode", "_io.BytesIO", "copyreg._reconstructor", "functools.partial"}
    | {f"builtins.{name}" for name in ("bool", "bytearray", "bytes", "dict", "float", "int", "list", "object")}
    | {f"builtins.{name}" for name in ("range", "slice", "str", "tuple")}
)
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PYTHON2_MODULES = types.MappingProxyType({"__builtin__": "builtins", "copy_reg": "copyreg"})


class Inert:
    """An instance of a class that was not resolved: it takes whatever the pickle gives it and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class RestrictedUnpickler(pickle.Unpickler):
    """Resolves tensors and plain containers; everything else is inert or refused with UnpicklingError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resolved = _fresh_names()

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle may use for `module.name`."""
        module = _PYTHON2_MODULES.get(module, module)
        full = f"{module}.{name}"
        if full not in self._resolved:
            self._resolved[full] = _dtype(module, name) or _stand_in(module, name)
        return self._resolved[full]


class MappedUnpickler(RestrictedUnpickler):
    """Makes tensors of the pages of their file; a storage is one without a shape."""

    def __init__(self, reader: torch._C.PyTorchFileReader, pages: mmap.mmap) -> None:
        super().__init__(io.BytesIO(reader.get_record("data.pkl")), encoding="utf-8")
        self._reader, self._pages = reader, pages

    def find_class(self, module: str, name: str) -> Any:
        """A storage's class as the type of its elements."""
        if module in ("torch", "torch.cuda") and name.endswith("Storage"):
            return torch.storage._get_dtype_from_pickle_storage_type(name)
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """The storage that `pid` describes: its kind, elements' type, record, device and number of elements."""
        _, dtype, record, _, count = pid
        if not count:
            return torch.empty(0, dtype=dtype)
        offset = record_offset(self._reader, f"data/{record}", count * dtype.itemsize)
        return torch.frombuffer(self._pages, dtype=dtype, count=count, offset=offset)


def read_pt(path: Path) -> Any:
    """The object in a zip-format `.pt`, tensors memory-mapped on the CPU.

    Raises FileNotFoundError, or ValueError in one sentence for a file that is damaged or names code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        _check_age(path)
        reader = torch._C.PyTorchFileReader(str(path))
        if reader.has_record("constants.pkl"):
            raise pickle.UnpicklingError("it is a TorchScript program, not a checkpoint")
        check_byte_order(reader)
        _check_stored(path)
        with path.open("rb") as file:
            return MappedUnpickler(reader, map_pages(file)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: {reason(error)}") from None
    except OSError as error:  # says nothing about what the file holds
        raise OSError(error.errno, error.strerror, str(path)) from None
    except Exception as error:  # a damaged pickle raises whatever its last readable instruction leads to
        raise ValueError(f"{path} is truncated or not a torch checkpoint: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The first sentence of what an exception says, in one line."""
    return " ".join((str(error) or type(error).__name__).split()).partition(". ")[0].rstrip(".")


def record_offset(reader: torch._C.PyTorchFileReader, record: str, size: int) -> int:
    """Where the `size` bytes of a record start. Raises UnpicklingError where it holds another number of bytes."""
    if reader.get_record_size(record) != size:
        raise pickle.UnpicklingError(f"{record} holds {reader.get_record_size(record)} bytes, and {size} are meant")
    return reader.get_record_offset(record)


def _check_age(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP:
            raise pickle.UnpicklingError("torch before 1.6 wrote it; torch.load and torch.save it once more")


def _check_stored(path: Path) -> None:
    """Raise UnpicklingError where values are compressed, so that pages of the file are not the values."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise pickle.UnpicklingError("it is compressed; torch.save never does that")


def check_byte_order(reader: torch._C.PyTorchFileReader) -> None:
    """Raise UnpicklingError where values stand in the order of another kind of machine."""
    if reader.has_record("byteorder") and reader.get_record("byteorder").decode() != sys.byteorder:
        raise pickle.UnpicklingError("it was written on a machine of the other byte order")


def _fresh_names() -> dict[str, Any]:
    def tensor(storage: torch.Tensor, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
        return storage.as_strided(size, stride, offset)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    def member(owner: Any, *_: Any) -> Any:  # how Python 3.11.0 to 3.11.3 pickles a member of an enum
        if not (isinstance(owner, type) and issubclass(owner, Inert)):
            raise pickle.UnpicklingError(_could_run("builtins.getattr"))
        return owner()

    return {
        "builtins.getattr": member,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch.storage.UntypedStorage": torch.uint8,
        "torch.Size": torch.Size,
        "argparse.Namespace": type("Namespace", (argparse.Namespace,), {}),
        "types.SimpleNamespace": types.SimpleNamespace,
        "collections.OrderedDict": collections.OrderedDict,
        "builtins.set": set,
        "builtins.frozenset": frozenset,
        "builtins.complex": complex,
    }


def _dtype(module: str, name: str) -> torch.dtype | None:
    found = vars(torch).get(name) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _stand_in(module: str, name: str) -> type[Inert]:
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names and root not in _INERT_MODULES and f"{module}.{name}" not in _INERT_NAMES:
        raise pickle.UnpicklingError(_could_run(f"{module}.{name}"))
    return type(name, (Inert,), {"__module__": module})


def _could_run(name: str) -> str:
    return f"it names {name}, which could run code (nothing was run)"
