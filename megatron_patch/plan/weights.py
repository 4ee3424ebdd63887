"""Whether the files of a checkpoint are there and whole, as far as sizes and headers tell without reading weights."""

import json
from pathlib import Path

from megatron_patch.config.checkpoint import RANK_FILE, RUN, TRACKER, why_unreadable

DISTRIBUTED_INDEX = ".metadata"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LENGTH_BYTES = 8  # a safetensors file begins with the length of its header


def check_weights(directory: Path) -> None:
    """Raise unless `directory` holds a whole Megatron or Hugging Face checkpoint.

    FileNotFoundError names what is missing, ValueError what is damaged.
    """
    if (directory / TRACKER).is_file():
        _check_megatron(directory)
    elif (directory / SINGLE).is_file() or (directory / INDEX).is_file():
        _check_hugging_face(directory)
    else:
        raise FileNotFoundError(
            f"checkpoint directory {str(directory)!r} holds none of {TRACKER}, {SINGLE}, {INDEX}; "
            "name a directory with weights, or none to start from random ones"
        )


def _check_megatron(root: Path) -> None:
    named = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    directory = root / (f"iter_{int(named):07d}" if named.isdecimal() else named)
    if (directory / RUN).is_file():
        _check_recorded(directory)
    if (directory / DISTRIBUTED_INDEX).is_file():
        return  # names and sizes stand in a pickle, which the ranks read
    from zipfile import is_zipfile  # slow to import, and most runs start from other files

    files = sorted(directory.glob(f"mp_rank_*/{RANK_FILE}"))
    if not files:
        raise FileNotFoundError(
            f"{root / TRACKER} says {named[:40]!r}, but {directory} holds neither {DISTRIBUTED_INDEX} nor "
            f"mp_rank_*/{RANK_FILE}"
        )
    for file in files:
        if not is_zipfile(file):  # the directory of a zip file stands at its end
            raise ValueError(f"{file} is truncated, or was not written by torch.save; copy or convert it again")


def _check_recorded(directory: Path) -> None:
    """Raise where a file of an iteration that training wrote has not the length that it had."""
    try:
        files = json.loads((directory / RUN).read_text(encoding="utf-8"))["files"]
        lengths = {name: files[name]["bytes"] for name in files}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory / RUN} is damaged: {why_unreadable(error)}; start from an earlier iteration, by its number in "
            f"{TRACKER}"
        ) from None
    for name, length in lengths.items():
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} does not exist, but {RUN} names it")
        if (size := (directory / name).stat().st_size) != length:
            raise ValueError(f"{directory / name} is truncated: {size:,} bytes, and {length:,} were written")


def _check_hugging_face(directory: Path) -> None:
    index = directory / INDEX
    names = [SINGLE]
    if index.is_file():
        try:
            names = sorted(
                {Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            )
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a safetensors index: {error!r}") from None
    for name in names:
        _check_safetensors(directory / name)


def _check_safetensors(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, but the checkpoint's index names it")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        size = path.stat().st_size - LENGTH_BYTES
        try:
            header = json.loads(file.read(length)) if length <= size else None
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError):
            raise ValueError(f"{path} is not a safetensors file, or its header is damaged; copy it again") from None
    if max(ends, default=0) != size - length:
        raise ValueError(
            f"{path} is truncated: its header describes {max(ends, default=0)} bytes of weights, {size - length} follow"
        )
