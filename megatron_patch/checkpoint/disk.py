"""What the disk refuses is told with the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Raise what goes wrong with the disk in this block as an OSError that names `path`, also where torch hides it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):  # torch's zip writer only says that it lost its place
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
