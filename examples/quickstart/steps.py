"""Running the walk's steps: print the command, run exactly it, show progress, reuse what an earlier walk finished."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from examples.quickstart.memory import tree_memory

SHOWN_ON_FAILURE = 15  # lines
SECONDS_BETWEEN_MEMORY_SAMPLES = 0.5
NOTHING = "(?!)"  # a pattern without a match
ITERATION = re.compile(r"^ iteration +(\d+)/ *(\d+) ")
WATCHED = ("iteration", "lm loss", "tokens per second")


@dataclass(frozen=True)
class Step:
    """One command of the walk. What it `makes` belongs to it alone, and is removed before the step runs again."""

    title: str
    command: list[str]
    makes: Path
    shows: str = NOTHING  # pattern of the output lines that are worth reading
    variables: Mapping[str, str] = field(default_factory=dict)  # set for this command only

    def typed(self) -> str:
        """The command as an operator would type it; a launcher's arguments stand one to a line."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        words = [shlex.quote(word) for word in self.command]
        if words[0] != "sh":
            return " ".join([*assignments, *words])
        lines = [" ".join([*assignments, *words[:2]])]
        for before, word in itertools.pairwise(words[1:]):
            if before.startswith("--"):
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return " \\\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """What a finished step cost; `peak_bytes` is private and shared memory of all its processes together."""

    typed: str
    seconds: float
    peak_bytes: int


class StepError(Exception):
    """A step's command ended with an error."""


def run_all(steps: Iterable[Step], logs: Path) -> list[Outcome]:
    """Run or reuse `steps` in order. Once one has run, every later one does. Raises StepError at the first failure."""
    logs.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    can_reuse = True
    for number, step in enumerate(steps, 1):
        print(f"\nStep {number}: {step.title}\n{_indented(step.typed())}", flush=True)
        log = logs / f"{number:02d}-{step.title.replace(' ', '-')}.log"
        finished = _finished(step, log) if can_reuse else None
        if finished:
            print(f"  reused: {step.makes}", flush=True)
        else:
            can_reuse = False
            finished = _run(step, log)
        outcomes.append(finished)
    return outcomes


def _finished(step: Step, log: Path) -> Outcome | None:
    """What an earlier walk recorded about the very same command, if its result still stands."""
    record = log.with_suffix(".json")
    if not record.is_file() or not step.makes.exists():
        return None
    outcome = Outcome(**json.loads(record.read_text(encoding="utf-8")))
    return outcome if outcome.typed == step.typed() else None


def _run(step: Step, log: Path) -> Outcome:
    log.with_suffix(".json").unlink(missing_ok=True)
    if step.makes.is_dir():
        shutil.rmtree(step.makes)
    step.makes.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file, _started(step) as process, _Peak(process.pid) as peak:
        last = _follow(process, file, re.compile(step.shows))
        code = process.wait()
    if code:
        raise StepError(
            f"step {step.title!r} ended with exit code {code}; its command stands above, its output is in {log} "
            f"and ends with:\n{_indented(_tail(log))}"
        )
    outcome = Outcome(step.typed(), time.monotonic() - started, peak.bytes)
    log.with_suffix(".json").write_text(json.dumps(vars(outcome)), encoding="utf-8")
    print(f"  done in {outcome.seconds:.1f} s{': ' + last if last else ''}", flush=True)
    return outcome


def _started(step: Step) -> subprocess.Popen:
    return subprocess.Popen(
        step.command,
        env={**os.environ, **step.variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _follow(process: subprocess.Popen, file: TextIO, shows: re.Pattern) -> str:
    """Copy output to `file` and its readable part to the console; returns the last line if none was for reading."""
    last, was_shown = "", False
    for line in process.stdout:
        print(line.rstrip(), file=file, flush=True)
        last = _readable(line) or last
        if shows.search(line):
            was_shown = True
        if shows.search(line) and not _is_one_of_many(line):
            _clear_status()
            print(f"  {_readable(line)}", flush=True)
        else:
            _status(_readable(line))
    _clear_status()
    return "" if was_shown else last


def _readable(line: str) -> str:
    """`line`, but of an iteration's fields only those that matter while one watches."""
    if not ITERATION.match(line):
        return line.rstrip()
    fields = [field.strip() for field in line.strip(" |\n").split("|")]
    return " | ".join(field for field in fields if field.startswith(WATCHED))


def _is_one_of_many(line: str) -> bool:
    """Whether `line` reports an iteration other than the first, the last and every 25th."""
    found = ITERATION.match(line)
    if not found:
        return False
    iteration, iterations = map(int, found.groups())
    return iteration not in (1, iterations) and iteration % 25 != 0


def _status(text: str) -> None:
    """On a terminal, the newest line of output, in place."""
    if text and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 4
        print(f"\r\x1b[K  {text[:width]}", end="", flush=True)


def _clear_status() -> None:
    if sys.stdout.isatty():
        print("\r\x1b[K", end="", flush=True)


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return "\n".join(lines[-SHOWN_ON_FAILURE:])


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


class _Peak:
    """Samples the memory of a process and its descendants while the block runs."""

    def __init__(self, pid: int):
        self.bytes = 0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_MEMORY_SAMPLES):
            self.bytes = max(self.bytes, tree_memory(self._pid))
