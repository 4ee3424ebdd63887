"""Files that go to the disk in steps: of a save that is slow, others can see that it moves."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystem

STEP_BYTES, SYNCHRONISED_BYTES = 16 << 20, 256 << 20


class PacedFile(io.FileIO):
    """A new file. `moved` is called for every few megabytes written; they reach the disk before many more follow.

    Without that, hours of a slow disk would lie in the one call at the end that waits for it.
    """

    def __init__(self, path: str | os.PathLike[str], moved: Callable[[], None]) -> None:
        super().__init__(path, "wb")
        self._moved, self._waiting = moved, 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """All of `data`, however much; returns its length in bytes."""
        view, start = memoryview(data).cast("B"), 0
        while start < len(view):
            written = super().write(view[start : start + STEP_BYTES])
            start, self._waiting = start + written, self._waiting + written
            if self._waiting >= SYNCHRONISED_BYTES:
                os.fdatasync(self.fileno())
                self._waiting = 0
            self._moved()
        return len(view)


class PacedFiles(FileSystem):
    """What a `FileSystemWriter` of torch.distributed.checkpoint opens its files with."""

    def __init__(self, moved: Callable[[], None]) -> None:
        super().__init__()
        self._moved = moved

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A file to write, in steps, or to read."""
        with PacedFile(path, self._moved) if mode == "wb" else Path(path).open(mode) as stream:
            yield stream
