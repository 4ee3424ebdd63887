"""The command that starts one node's ranks and speaks for them: `python -m megatron_patch.train.agent … -m MODULE …`.

It takes the options of torchrun that a launcher needs, by their names, and makes a promise that torchrun does not: a
run that was asked to stop, and did, ends with status 0.
"""

import argparse
import os
import signal
import sys

from megatron_patch.train.ranks import Ranks
from megatron_patch.train.signals import watch


def main(argv: list[str]) -> int:
    """Exit status of the run: 0 when it ended or was stopped in order, 1 when a rank failed."""
    options = parser().parse_args(argv)
    ranks = Ranks()

    def say(text: str) -> None:
        print(f"{options.module}: {text}", file=sys.stderr, flush=True)

    def stop(number: signal.Signals) -> None:
        if not ranks.processes:
            say(f"stopped by {number.name} before a rank was started")
            os._exit(0)
        say(f"{number.name}: the ranks {ending(options.module)}; a second signal ends them at once")
        ranks.stop()

    def quit_now(number: signal.Signals) -> None:
        say(f"second signal, {number.name}: the ranks are ended, and what they did since the last checkpoint is lost")
        ranks.kill()
        os._exit(128 + number)  # at once: the other thread must not take their end for a fault of theirs

    watch(stop, quit_now)
    from megatron_patch.train.elastic import run  # brings torch, which takes seconds to import

    return run(options, ranks, say)


def ending(module: str) -> str:
    """What ranks of `module` do when asked to stop, in words: only those that train have something to save."""
    return "finish their step and save" if module == "megatron_patch.train" else "end"


def parser() -> argparse.ArgumentParser:
    """torchrun's names; what follows `-m MODULE` is the module's."""
    result = argparse.ArgumentParser(prog="megatron_patch.train.agent", allow_abbrev=False)
    result.add_argument("--nnodes", type=int, default=1, help="agents that start together")
    result.add_argument("--node-rank", type=int, default=0, help="this one's number, for the static rendezvous")
    result.add_argument("--nproc-per-node", type=int, default=1, help="ranks of this agent")
    result.add_argument("--rdzv-backend", default="static", choices=("static", "c10d"), help="how agents meet")
    result.add_argument("--rdzv-endpoint", default="", help="HOST:PORT of a c10d rendezvous")
    result.add_argument("--rdzv-id", default="none", help="the run's name among those at one endpoint")
    result.add_argument("--master-addr", default="127.0.0.1", help="host of agent 0, for the static rendezvous")
    result.add_argument("--master-port", type=int, default=29500, help="its port")
    result.add_argument("--local-addr", help="this host, where it cannot resolve its own name")
    result.add_argument("--max-restarts", type=int, default=0, help="fresh starts after a failure")
    result.add_argument("-m", action="store_true", required=True, help="a module follows, as for python")
    result.add_argument("module", help="what each rank runs")
    result.add_argument("arguments", nargs=argparse.REMAINDER, help="the module's own")
    return result


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # the interpreter's own end takes torch a second
