"""`python3 -m megatron_patch.generate --checkpoint DIR --prompt TEXT`; on several ranks under torchrun or our agent."""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from megatron_patch.generate.arguments import read_arguments


def main(argv: Sequence[str]) -> int:
    """0, also where a conversation is broken off; 130 where other work is; 2 for what the user can mend."""
    given = read_arguments(argv)
    is_chat = "chat" in given.task

    def leave(number: int, frame: FrameType | None) -> None:
        if is_first_rank():
            os.write(1, b"\n")  # what is printed is flushed, and a handler may have interrupted a print
        os._exit(0 if is_chat else 130)  # what a shell reports for a command that Ctrl-C ended

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        from megatron_patch.generate.answering import answer

        answer(given)
    except (ValueError, OSError) as error:
        if is_first_rank():
            print(f"megatron_patch.generate: {error}", file=sys.stderr)
        return 2
    return 0


def is_first_rank() -> bool:
    """Whether this is the rank that speaks."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the interpreter's own end would wait for communication that may never complete
