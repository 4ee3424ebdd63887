"""Files and directories that appear complete or not at all: written beside their place, then renamed into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """An empty directory to fill, renamed to `target` when the block ends well and removed when it does not."""
    target = target.resolve()  # a link keeps pointing, and "." has a name
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        move_directory(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_directory(new: Path, target: Path) -> None:
    """Rename `new` to `target`; what stood there is deleted only afterwards. Both are on one file system."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    if old.exists():
        shutil.rmtree(old)


def write_text(path: Path, text: str) -> None:
    """Replace the small file `path`, reaching the disk before the name does."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        os.fsync(file.fileno())
    partial.replace(path)
