"""A rank without a model or torch: it says that it is up, and then does what its argument says."""

import faulthandler
import os
import signal
import sys
import time

from megatron_patch.train.ranks import WHERE
from megatron_patch.train.report import PIPE, Report, write_report
from megatron_patch.train.signals import end_with_agent, noted

LONG = 600.0


def hang() -> None:
    """Where the rank that does not answer is found."""
    time.sleep(LONG)


def main(what: str) -> int:
    """`wait` ignores requests to stop; `hang` is rank 1 in `hang` while rank 0 loses patience; `refuse` is an error."""
    end_with_agent()
    faulthandler.register(WHERE, file=int(os.environ[PIPE]), all_threads=False)
    rank = int(os.environ["RANK"])
    with noted():
        os.write(1, f"up {os.getpid()}\n".encode())
        if what == "refuse":
            write_report(Report("no such thing"))
            return 1
        if what == "hang" and rank == 0:
            write_report(Report("waited too long", is_lost_contact=True))
            return 1
        if what == "die" and rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        hang()
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1]))
