"""Files and directories that appear complete or not at all: written beside their place, then renamed into it."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claimed_directory(directory: Path) -> Iterator[None]:
    """`directory`, made where it is not there, is this process's to write to. FileExistsError while it is another's.

    Where the file system knows no locks, nothing is held.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise FileExistsError(f"another run writes to {directory}; wait for it, or name another directory") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """An empty directory to fill, renamed to `target` when the block ends well and removed when it does not.

    What a killed process left beside `target` is removed first; another that is still writing keeps its own.
    """
    target = target.resolve()  # a link keeps pointing, and "." has a name
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    try:
        _acquire(lock)  # as long as this process lives
        yield partial
        synchronise_tree(partial)
        move_directory(partial, target)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def synchronise_tree(directory: Path) -> None:
    """Everything in `directory` reaches the disk, and so do the names of it."""
    for path in (*directory.rglob("*"), directory):
        _synchronise(path)


def move_directory(new: Path, target: Path) -> None:
    """Rename `new` to `target`; what stood there is deleted only afterwards. Both are on one file system."""
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:  # also between the two, by a signal
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _synchronise(target.parent)
    if old.exists():
        shutil.rmtree(old)


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside `target`; one killed between two renames gives `target` back."""
    for old in sorted(target.parent.glob(f".{_literal(target.name)}.*.old")):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for partial in target.parent.glob(f".{_literal(target.name)}.*.partial"):
        lock = os.open(partial, os.O_RDONLY)
        try:
            if _acquire(lock):
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Replace the small file `path`, reaching the disk before the name does."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        os.fsync(file.fileno())
    partial.replace(path)


def _acquire(directory: int) -> bool:
    """Lock the open directory until it is closed; False where somebody else has, or locks are not to be had."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _synchronise(path: Path) -> None:
    """A file's bytes, or a directory's names, reach the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _literal(name: str) -> str:
    """`name` as a glob pattern that matches itself alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
