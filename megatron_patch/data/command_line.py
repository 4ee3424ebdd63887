"""What the commands that make datasets share: flags, whole numbers, threads, and one sentence for an error."""

import argparse
import os
import sys
from collections.abc import Callable


def dataset_parser(module: str, written: str) -> argparse.ArgumentParser:
    """The command line of `megatron_patch.data.<module>`, which writes the files `written`; its own flags follow."""
    parser = argparse.ArgumentParser(prog=f"megatron_patch.data.{module}", allow_abbrev=False)
    flag, switch = parser.add_argument, {"action": "store_true"}
    flag("--input", required=True, nargs="+", help="files, directories or patterns")
    flag("--output-prefix", required=True, help=f"{written}.bin, .idx and .json are written")
    flag("--tokenizer-model", required=True, metavar="DIR", help="tokenizer directory, or a tokenizer.model")
    flag("--skip-bad-lines", **switch, help="leave out, count and list what cannot be used, instead of ending")
    flag("--recursive", **switch, help="of a directory, also what its directories hold")
    flag("--workers", type=positive, default=os.cpu_count() or 1, help="tokenising threads")
    flag("--trust-remote-code", **switch, help="let the tokenizer directory run its code")
    return parser


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
