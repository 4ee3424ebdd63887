"""Files as pages that are read when they are needed and never written back."""

import mmap
import sys
from typing import BinaryIO

# Without it the system refuses to map more than its memory. Python names it from 3.13 on; the number is Linux's.
_UNRESERVED = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def map_pages(file: BinaryIO, offset: int = 0, length: int = 0) -> mmap.mmap:
    """`length` bytes from `offset`, a multiple of `mmap.ALLOCATIONGRANULARITY`; 0 is all that follow."""
    return mmap.mmap(file.fileno(), length, mmap.MAP_PRIVATE | _UNRESERVED, offset=offset)
