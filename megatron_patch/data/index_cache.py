"""Sample indices kept on disk between runs, so that a large dataset starts at once."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = tuple[npt.NDArray, ...]


def cached(directory: str | None, key: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
    """What `build` returns, read from `directory` when it was built for the same `key` before.

    Every rank may call this at once: files appear whole, under a name made of the key. Without a directory nothing
    is read or written.
    """
    if directory is None:
        return build()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return _read(Path(directory), digest) or _write(Path(directory), digest, build())


def file_state(prefix: str) -> list[int]:
    """Sizes and modification times of a pair: a dataset rebuilt under its old name has another key."""
    states = [Path(prefix + suffix).stat() for suffix in (".bin", ".idx")]
    return [value for state in states for value in (state.st_size, state.st_mtime_ns)]


def _read(directory: Path, digest: str) -> Arrays | None:
    count = directory / f"{digest}.count"  # written last
    if not count.is_file():
        return None
    names = [directory / f"{digest}.{number}.npy" for number in range(int(count.read_text()))]
    try:
        return tuple(np.load(name, mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in names)
    except (OSError, ValueError, EOFError):  # somebody thinned the directory: build again
        return None


def _write(directory: Path, digest: str, arrays: Arrays) -> Arrays:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for number, array in enumerate(arrays):
            part = Path(scratch) / f"{number}.npy"
            np.save(part, array, allow_pickle=False)
            part.replace(directory / f"{digest}.{number}.npy")
        count = Path(scratch) / "count"
        count.write_text(str(len(arrays)))
        count.replace(directory / f"{digest}.count")
    return arrays
