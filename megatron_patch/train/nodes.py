"""The agents of a run's other nodes: what they tell, and which of them was not heard of for a while.

A thread of its own asks the store that they share: a node that is cut off from it waits for an answer without end.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

import torch.distributed as dist

from megatron_patch.train.report import Verdict, first_words, numbered

LOOK_SECONDS = 0.2
SILENT_SECONDS = 3.0  # an agent that lives is heard of much more often
FAULT, HEARD = "fault", "heard"


class Nodes:
    """The nodes of one start of the ranks, seen from node `number` of `count`, whose ranks are `ranks`."""

    def __init__(self, store: dist.Store, number: int, count: int, ranks: list[int]) -> None:
        self.store, self.number, self.others = store, number, [node for node in range(count) if node != number]
        self.ranks = ranks
        self.ours: Verdict | None = None
        self.found: Verdict | None = None
        self.notes: dict[int, tuple[str, float]] = {}  # of every other node, and when it changed
        self.is_known = self.is_over = False
        if self.others:
            self.store = store.clone()  # other calls of this agent wait for answers too
            threading.Thread(target=self._exchange, name="nodes", daemon=True).start()

    def fault(self, seconds: float = 0.0) -> Verdict | None:
        """What the agent of another node tells within `seconds`, or that the one that has the store is gone."""
        self._until(lambda: self.found is not None, seconds)
        return self.found

    def tell(self, verdict: Verdict, seconds: float) -> None:
        """Let the other agents end their ranks too; return when all know that can be reached, or after `seconds`."""
        self.ours = verdict
        self._until(lambda: self.is_known, seconds)

    def missing(self) -> list[str]:
        """A clause for each node that was not heard of for some seconds, with its ranks."""
        silences = {node: time.monotonic() - since for node, (_, since) in self.notes.items()}
        return [
            f"node {node} ({numbered(json.loads(self.notes[node][0])[1])}) was not heard of for {seconds:.0f} s"
            for node, seconds in sorted(silences.items())
            if seconds > SILENT_SECONDS
        ]

    def close(self) -> None:
        """These ranks have ended; another start has its own nodes."""
        self.is_over = True

    def _until(self, is_so: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_so() and self._reachable() and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS / 4)

    def _reachable(self) -> int:
        return len(self.others) - len(self.missing())

    def _exchange(self) -> None:
        beat, is_told = 0, False
        try:
            while not self.is_over:
                beat += 1
                self.store.set(str(self.number), json.dumps([beat, self.ranks]))
                self._look()
                if self.ours is not None and not is_told:
                    self.store.set(FAULT, json.dumps(asdict(self.ours)))
                    is_told = True
                self.is_known = is_told and self.store.add(HEARD, 0) >= self._reachable()
                time.sleep(LOOK_SECONDS)
        except dist.DistError as error:
            self.found = Verdict(f"the first node's agent is gone: {first_words(error)}")

    def _look(self) -> None:
        for node, note in zip(self.others, self.store.multi_get([str(node) for node in self.others]), strict=True):
            if note.decode() != self.notes.get(node, ("", 0.0))[0]:
                self.notes[node] = (note.decode(), time.monotonic())
        if self.found is None and self.ours is None and self.store.check([FAULT]):
            self.found = Verdict(**json.loads(self.store.get(FAULT)))
            self.store.add(HEARD, 1)
