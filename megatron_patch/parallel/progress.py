"""What a rank does on the host while others wait for it, told to all of them: a slow rank is not taken for a hung one.

Each rank writes a note to the store that all share, and reads the others'. One that works has moved, one that waits is
alive; who does neither for the whole timeout hangs, and is named with what it was doing.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from megatron_patch.parallel.agreement import together

T = TypeVar("T")
LOOKS, SLOWEST_LOOK = 20, 30.0  # looks at the notes in a timeout, and the most seconds between two of them


class HungError(RuntimeError):
    """A rank did not move for the whole timeout."""


@dataclass(frozen=True)
class Note:
    """What a rank tells of its task `number`: `beat` grows while its process runs, `moves` while its work goes on.

    `doing` is None while it waits for the others.
    """

    number: int
    beat: int
    moves: int
    doing: str | None
    is_over: bool


@dataclass
class Sight:
    """The last note of a rank, and in how many looks since it did not move, and was not heard of at all."""

    note: Note
    still: int = 0
    silent: int = 0

    def look(self, note: Note) -> None:
        """Take in what the rank says now."""
        self.still = self.still + 1 if (note.number, note.moves) == (self.note.number, self.note.moves) else 0
        self.silent = self.silent + 1 if note == self.note else 0
        self.note = note


class Progress:
    """Tasks that all ranks of `group` (None: this process alone) begin in the same order, one at a time.

    Made by all ranks at the same point. A task runs on a thread of its own, so that whoever waits for it can give up.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_minutes: float = 10.0) -> None:
        self.group, self.minutes = group, timeout_minutes
        self.seconds = min(60 * timeout_minutes / LOOKS, SLOWEST_LOOK)
        self.patience = math.ceil(60 * timeout_minutes / self.seconds)
        self.name, self.doing, self.is_over = "", None, True
        self.number = self.beat = self.moves = self.looks = 0
        self.sights: list[Sight] = []
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        if group is not None:
            self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
            self.store = dist.PrefixStore("progress", group.get_group_store().clone())  # no other call holds it up
            self._tell()
            together(lambda: None, group)

    def start(self, name: str, function: Callable[[], None]) -> None:
        """Begin a task, whose `name` completes a sentence: `the save of iteration 4`. No other is under way."""
        self.name, self.doing, self.error = name, None, None
        self.number, self.is_over = self.number + 1, False
        self.sights = [Sight(Note(-1, 0, 0, None, False)) for _ in range(self.world)] if self.group else []
        self.thread = threading.Thread(target=self._run, args=(function,), name=name, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Return when no task is under way; the error that ended it is raised here. Raises HungError for a hung rank,
        whose task is then given up."""
        looks = unanswered = 0
        while self.thread is not None and self.thread.is_alive():
            self.thread.join(self.seconds)
            unanswered, looks = (unanswered + 1 if looks == self.looks else 0), self.looks
            who = hung(self.sights, self.number, self.patience)
            if self.group is not None and unanswered > self.patience:
                who = "the ranks' common store did not answer"
            if who and self.thread.is_alive():
                self.thread = None
                raise HungError(f"{self.name} hangs: for {self.minutes:g} minutes {who}")
        self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """While open, this rank works, and the others wait for it."""
        self.moved(doing)
        try:
            yield
        finally:
            self.moved(None)

    def moved(self, doing: str | None) -> None:
        """This rank got on, and does this now; `doing` follows `writing` or such, None: it waits for the others."""
        self.doing, self.moves = doing, self.moves + 1

    def together(self, doing: str, function: Callable[[], T]) -> list[T]:
        """`agreement.together`, of which the others know what this rank is doing; outside a task, it is one."""

        def told() -> T:
            with self.busy(doing):
                return function()

        if self.group is None or threading.current_thread() is self.thread:
            return together(told, self.group)
        results: list[T] = []
        self.start(doing, lambda: results.extend(together(told, self.group)))
        self.wait()
        return results

    def _run(self, function: Callable[[], None]) -> None:
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), name="progress", daemon=True)
        try:
            if self.group is not None:
                self._tell()
                watch.start()
            function()
        except BaseException as error:  # whoever waits for the task raises it
            self.error = error
        finally:
            over.set()
            self.is_over = True
            if watch.is_alive():
                watch.join()
                self._tell()

    def _watch(self, over: threading.Event) -> None:
        """Tell the others how it goes, and look how they do, until the task is over."""
        keys = [str(rank) for rank in range(self.world)]
        while not over.wait(self.seconds):
            self._tell()
            with suppress(dist.DistError):
                for sight, text in zip(self.sights, self.store.multi_get(keys), strict=True):
                    sight.look(Note(*json.loads(text)))
                self.looks += 1

    def _tell(self) -> None:
        self.beat += 1
        note = [self.number, self.beat, self.moves, self.doing, self.is_over]
        with suppress(dist.DistError):  # who is not heard of is missed
            self.store.set(str(self.rank), json.dumps(note))


def hung(sights: Sequence[Sight], number: int, patience: int) -> str:
    """Who holds up task `number`, by what was seen of all ranks: a clause for a sentence, empty if nobody does."""
    found = []
    for rank, sight in enumerate(sights):
        note = sight.note
        is_done = note.number > number or (note.number == number and note.is_over)
        if is_done or sight.still < patience:
            continue
        if note.number < number:
            found.append(f"rank {rank} did not begin it")
        elif note.doing is None and sight.silent >= patience:
            found.append(f"rank {rank} was not heard of, last waiting for the others")
        elif note.doing is not None:
            is_silent = sight.silent >= patience // 2  # its process, not only its work
            found.append(f"rank {rank} {'was not heard of, last' if is_silent else 'got no further in'} {note.doing}")
    is_at_rest = all(sight.still >= patience for sight in sights) and bool(sights)
    return " and ".join(found) or ("all ranks waited for each other" if is_at_rest else "")
