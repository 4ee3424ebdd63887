"""Training that is killed again and again at random moments, and ends as if it never had been.

PYTHONPATH=. python tests/distributed/kill_rounds.py [ROUNDS]
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_patch.config.run import RunConfig
from megatron_patch.plan.start import recorded_iterations
from ranks import PRELOADED, run_on_rank
from tiny_run import TRACKER, losses, tiny_run, train_on_ranks

WORLD, PATIENCE = 2, 120.0


@dataclass(frozen=True)
class Round:
    """What a kill left: the iteration that the tracker named, and whether a save was under way."""

    iteration: int
    was_saving: bool


def kill_rounds(directory: Path, rounds: int, steps_a_round: int = 8, seed: int = 0) -> list[Round]:
    """Kill a run of two ranks `rounds` times, then let it end. Asserts that each launch goes on from the last complete
    checkpoint, that nothing is left over, and that all losses are those of a run that nobody killed, bit for bit.
    """
    chance = random.Random(seed)
    whole = _run(directory / "whole", steps_a_round * (rounds + 1))
    _end(_launch(whole))
    run = _run(directory / "killed", steps_a_round * (rounds + 1))
    found = [_kill_once(run, chance, steps_a_round) for _ in range(rounds)]
    _end(_launch(run))
    assert losses(run) == losses(whole)
    assert not list(Path(run.checkpoint.save).glob(".iter_*"))
    return found


def _run(directory: Path, iterations: int) -> RunConfig:
    directory.mkdir()
    run = tiny_run(directory, save_interval=1, keep_last=3)
    return replace(run, train_iters=iterations, eval_interval=10**6)


def _kill_once(run: RunConfig, chance: random.Random, steps: int) -> Round:
    before = _tracked(run)
    processes = _launch(run)
    wanted = before + chance.randint(1, steps - 2)
    _wait_until(lambda: _tracked(run) >= wanted, processes)
    root = Path(run.checkpoint.save)
    if chance.random() < 0.8:  # most of all while a save is under way
        _wait_until(lambda: any(root.glob(".iter_*.partial")), processes)
    time.sleep(chance.uniform(0, 0.03))
    for process in chance.sample(processes, WORLD):
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    complete = recorded_iterations(root)
    assert complete[0].iteration == _tracked(run) >= wanted
    assert max(losses(run)) - _tracked(run) <= 3, "more was lost than the step and the save under way"
    return Round(_tracked(run), any(root.glob(".iter_*.partial")))


def _launch(run: RunConfig) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context.set_forkserver_preload(PRELOADED)
    folder = tempfile.mkdtemp(dir=Path(run.checkpoint.save).parent)
    processes = [
        context.Process(target=run_on_rank, args=(train_on_ranks, (run, WORLD), rank, WORLD, folder))
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    return processes


def _end(processes: list[multiprocessing.Process]) -> None:
    _wait_until(lambda: not any(process.is_alive() for process in processes), processes)
    assert [process.exitcode for process in processes] == [0] * WORLD


def _wait_until(is_reached, processes: list[multiprocessing.Process]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_reached():
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed or time.monotonic() > deadline:
            for process in processes:
                process.kill()
            raise AssertionError(f"the ranks ended with {failed}" if failed else f"nothing came in {PATIENCE:.0f} s")
        time.sleep(0.002)


def _tracked(run: RunConfig) -> int:
    tracker = Path(run.checkpoint.save) / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


def main() -> None:
    """Print one JSON line."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as directory:
        found = kill_rounds(Path(directory), rounds, seed=int(time.time()))
    during = sum(one.was_saving for one in found)
    result = {"date": time.strftime("%Y-%m-%d"), "rounds": rounds, "ranks": WORLD, "killed during a save": during}
    print(json.dumps(result | {"went on from the last complete checkpoint": len(found), "losses": "bit for bit"}))


if __name__ == "__main__":
    main()
