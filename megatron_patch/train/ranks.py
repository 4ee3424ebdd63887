"""The processes of one node's ranks: started, asked to stop, ended, and asked where they are."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_patch.train.report import PIPE, Ending, read_report
from megatron_patch.train.signals import AGENT

WHERE = signal.SIGUSR1  # asks a rank to write its stack to the pipe
ANSWER_SECONDS = 0.5
POLL_SECONDS, KILL_SECONDS = 0.02, 10.0


class Ranks:
    """Ranks by their global number. `is_stopping`: they were asked to finish their step, save and leave."""

    def __init__(self) -> None:
        self.processes: dict[int, subprocess.Popen] = {}
        self.pipes: dict[int, int] = {}
        self.is_stopping = False

    def start(self, command: Sequence[str], environments: Mapping[int, Mapping[str, str]]) -> None:
        """One process per rank, each in a session of its own: Ctrl-C reaches the agent alone."""
        self.processes.clear()
        for rank, environment in environments.items():
            read, write = os.pipe()
            os.set_blocking(read, False)
            self.processes[rank] = subprocess.Popen(
                command,
                env={**os.environ, **environment, PIPE: str(write), AGENT: str(os.getpid())},
                pass_fds=(write,),
                start_new_session=True,
            )
            os.close(write)
            self.pipes[rank] = read
        if self.is_stopping:
            self.stop()

    def stop(self) -> None:
        """Ask for the end of the run after the current step."""
        self.is_stopping = True
        for process in list(self.processes.values()):
            process.send_signal(signal.SIGTERM)  # nothing is sent to a process that ended

    def kill(self) -> None:
        """Kill what still runs."""
        for process in list(self.processes.values()):
            process.kill()

    def end(self) -> None:
        """Kill what still runs, and wait until it has ended; not for long: a disk can hold a killed process up."""
        self.kill()
        self.settle(KILL_SECONDS)

    def statuses(self) -> dict[int, int | None]:
        """Exit status by rank; None while it runs."""
        return {rank: process.poll() for rank, process in self.processes.items()}

    def settle(self, seconds: float) -> list[int]:
        """Wait until all ranks have ended, at most so long. Returns those that still run."""
        deadline = time.monotonic() + seconds
        while None in (statuses := self.statuses()).values() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return [rank for rank, status in statuses.items() if status is None]

    def endings(self) -> list[Ending]:
        """How the ranks that failed ended."""
        return [
            Ending(rank, status, read_report(self._heard(rank))) for rank, status in self.statuses().items() if status
        ]

    def places(self, ranks: Sequence[int]) -> dict[int, str]:
        """Where in the code `ranks`, which still run, are: `, at FILE line N in FUNCTION`; empty without an answer."""
        for rank in ranks:
            self.processes[rank].send_signal(WHERE)
        self.settle(ANSWER_SECONDS)
        return {rank: _innermost(self._heard(rank).decode("utf-8", "replace")) for rank in ranks}

    def _heard(self, rank: int) -> bytes:
        try:
            return os.read(self.pipes[rank], 2**17)
        except BlockingIOError:
            return b""


def _innermost(stack: str) -> str:
    """The first line of what faulthandler wrote."""
    line = re.search(r'File "(.+)", line (\d+) in (\S+)', stack)
    return f", at {Path(line[1]).name} line {line[2]} in {line[3]}" if line else ""
