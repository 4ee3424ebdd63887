"""What the commands that make datasets share: whole numbers, threads, and one sentence for an error."""

import argparse
import os
import sys
from collections.abc import Callable


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (value := count(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def count(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def limit_threads(workers: int) -> None:
    """Tokenise in so many threads. To be called first: the tokenizer's pool reads this once, at its first use."""
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(workers))


def status_of(run: Callable[[], None]) -> int:
    """The exit status of a command; what ends it early is told in one sentence."""
    try:
        run()
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130  # what a shell reports for a command that Ctrl-C ended
    return 0
