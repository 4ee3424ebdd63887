"""Sample indices kept on disk between runs, so that a large dataset starts at once."""

import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = tuple[npt.NDArray, ...]

KEY = "key.json"
VERSION = 1  # of what the builders make from the same key


def cached(directory: str | None, key: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
    """What `build` returns, read from `directory` when it was built for the same `key` before.

    Every rank may call this at once: on a node one builds and the others wait for it, then all map the same pages.
    Arrays appear whole, in a folder named by the key's digest, which keeps the key for people to read. A directory
    that cannot be written is read all the same. Without a directory nothing is read or written.
    """
    if directory is None:
        return build()
    text = json.dumps({"version": VERSION, **key}, sort_keys=True)
    folder = Path(directory) / hashlib.sha256(text.encode()).hexdigest()[:32]
    return _read(folder) or _built(folder, text, build)


def content(array: npt.NDArray) -> str:
    """A digest of an array's bytes, for keys: what was rewritten has another, what was copied or moved has not."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def _built(folder: Path, key: str, build: Callable[[], Arrays]) -> Arrays:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f"{folder.name}.lock").open("w")
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s holds no index of this dataset and cannot be written (%s): every rank builds its own",
            folder.parent, error.strerror,
        )  # fmt: skip
        return build()
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, also by the holder's death
        found = _read(folder)  # somebody may have built it while we waited
        if found is not None:
            return found
        arrays = build()
        _write(folder, key, arrays)
        return _read(folder) or arrays


def _read(folder: Path) -> Arrays | None:
    try:
        count = json.loads((folder / KEY).read_text())["arrays"]
        names = [folder / f"{number}.npy" for number in range(count)]
        return tuple(np.load(name, mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in names)
    except (OSError, ValueError, EOFError, KeyError, TypeError):  # not there, or damaged: build again
        return None


def _write(folder: Path, key: str, arrays: Arrays) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp's are for one user
        for number, array in enumerate(arrays):
            np.save(scratch / f"{number}.npy", array, allow_pickle=False)
        (scratch / KEY).write_text(json.dumps({"arrays": len(arrays), "key": json.loads(key)}, indent=1))
        try:
            scratch.rename(folder)
        except OSError:  # it is there: damaged, or another node, whose lock may not be ours, was faster
            if _read(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                scratch.rename(folder)
    except OSError as error:  # numpy tells a full disk by counts of numbers alone
        raise OSError(f"no index can be written in {folder.parent} ({error}); is its disk full?") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
