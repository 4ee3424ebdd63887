"""Reading `.zst` files with the optional package `zstandard`, all frames of them, and not past a truncated one."""

import io
from importlib import import_module
from typing import BinaryIO

READ_AT_ONCE = 1 << 17


class ZstandardFile(io.RawIOBase):
    """What a compressed file holds. The package's own reader ends silently in the middle of a truncated file."""

    def __init__(self, compressed: BinaryIO) -> None:
        self._compressed = compressed
        self._package = import_module("zstandard")
        self._frame = None
        self._ready = self._left = b""

    def readable(self) -> bool:
        """It is; asked for by `io.BufferedReader`."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill what can be filled. Raises EOFError where a frame is not complete."""
        while not self._ready:
            block, self._left = self._left or self._compressed.read(READ_AT_ONCE), b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the last frame is not complete")
                return 0
            self._frame = self._frame or self._package.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(block)
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
