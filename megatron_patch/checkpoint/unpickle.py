"""Reading a `.pt` that somebody else wrote, without running anything that it names.

A Megatron checkpoint pickles its whole `args`, with classes this machine need not have. Tensors and plain containers
are resolved; every other class becomes an inert stand-in; what has no place in a checkpoint and could run code is
refused by name. The few mutable objects a pickle can reach are made afresh for each file, because a pickle can also
assign attributes.
"""

import argparse
import collections
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import torch

# Real checkpoints hold these in `args` or `rng_state`; they are read as inert stand-ins, never resolved.
_INERT_MODULES = frozenset({"collections", "datetime", "decimal", "enum", "fractions", "pathlib", "signal", "uuid"})
_INERT_NAMES = frozenset(
    {"_codecs.encode", "_io.BytesIO", "copyreg._reconstructor", "functools.partial"}
    | {f"builtins.{name}" for name in ("bool", "bytearray", "bytes", "dict", "float", "int", "list", "object")}
    | {f"builtins.{name}" for name in ("range", "slice", "str", "tuple")}
)
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


def read_pt(path: Path) -> Any:
    """The object in a zip-format `.pt`, tensors memory-mapped on the CPU.

    Raises FileNotFoundError, or ValueError in one sentence for a file that is damaged or names code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise pickle.UnpicklingError("it is a TorchScript program, not a checkpoint")
        restricted = types.SimpleNamespace(__name__=__name__, Unpickler=RestrictedUnpickler)
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=restricted, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: {error}") from None
    except Exception as error:  # a damaged pickle raises whatever its last readable instruction leads to
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is truncated or not a torch checkpoint: {first_line}") from None


def _fresh_names() -> dict[str, Any]:
    def tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
        return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, None)

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
        "torch.storage.UntypedStorage": type("UntypedStorage", (Inert,), {"dtype": torch.uint8}),
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
