"""Signals that end a run: watched by the agent at any moment, obeyed by a rank when its step is done."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST_SECONDS = 0.5  # `timeout` and batch systems send the same request to a process twice
AGENT = "MP_AGENT_PID"  # of the rank's agent, in the rank's environment


def watch(first: Callable[[signal.Signals], None], second: Callable[[signal.Signals], None]) -> None:
    """Call `first` for the first request to stop and `second` for another one, on a thread of their own.

    A thread, because Python runs a signal's handler only between two steps of the main thread, which may be waiting
    for another node for minutes.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (*STOP, *_hang_up()):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_dispatch, args=(read, first, second), daemon=True).start()


def _hang_up() -> tuple[signal.Signals, ...]:
    """The signal of a closed terminal, which nohup has ignored."""
    return (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else ()


def _dispatch(read: int, first: Callable[[signal.Signals], None], second: Callable[[signal.Signals], None]) -> None:
    watched = (*STOP, signal.SIGHUP)
    asked = None
    while True:
        number = os.read(read, 1)[0]
        if number not in watched:
            continue
        if asked is None:
            asked = time.monotonic()
            first(signal.Signals(number))
        elif time.monotonic() - asked > ONE_REQUEST_SECONDS:
            second(signal.Signals(number))


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """While open, requests to stop are only noted: calling what is yielded tells whether there was one."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in STOP}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_agent() -> None:
    """On Linux, let the kernel kill this rank when its agent dies, however that dies. Without an agent: nothing."""
    agent = os.environ.get(AGENT)
    if agent is None or not sys.platform.startswith("linux"):
        return
    set_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(agent):  # it died before we asked
        os._exit(1)
