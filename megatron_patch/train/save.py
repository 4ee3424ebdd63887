"""Writing a run's checkpoints: every rank its own boxes, beside training, visible once all of them are on the disk.

A checkpoint is filled in a hidden directory, gets its name when it is whole, and the tracker names it last.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.checkpoint.atomic import (
    claimed_directory,
    move_directory,
    remove_leftovers,
    synchronise_tree,
    write_text,
)
from megatron_patch.checkpoint.dcp import OPTIMIZER, RANDOM, TensorBox, checksum, files_of_rank, write_boxes
from megatron_patch.checkpoint.mcore import iteration_name
from megatron_patch.config.checkpoint import RUN, TRACKER
from megatron_patch.config.run import RunConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.parallel.progress import Progress
from megatron_patch.train.companions import as_json, write_companions
from megatron_patch.train.device import synchronise
from megatron_patch.train.pieces import is_second_copy, pieces
from megatron_patch.train.save_torch import save_weights
from megatron_patch.weights.parameters import named_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def claimed_output(run: RunConfig, mesh: Mesh, progress: Progress) -> Iterator[None]:
    """The output directory belongs to this run while the block runs, and what killed saves left in it is removed.

    Raises FileExistsError on every rank while another run writes there.
    """
    root = Path(run.checkpoint.save)
    with ExitStack() as held:
        progress.together(
            "claiming the output directory",
            lambda: held.enter_context(claimed_directory(root)) if mesh.rank == 0 else None,
        )
        if mesh.rank == 0:
            for hidden in root.glob(".iter_*.old"):
                remove_leftovers(root / hidden.name[1:].split(".")[0])
            for hidden in root.glob(".iter_*.partial"):
                shutil.rmtree(hidden, ignore_errors=True)
            for token in root.glob(".shared_*"):
                token.unlink()
        yield


class Saver:
    """Saves one run. Made before the first forward, and on every rank at the same point, as every method is called.

    A save that fails, as on a full disk, is said aloud and leaves the earlier ones; only that of the last is an error,
    of `finish`.
    """

    def __init__(
        self,
        run: RunConfig,
        chunks: list[GPTModel],
        optimizer: torch.optim.Optimizer,
        entries: list[Entry],
        mesh: Mesh,
        progress: Progress,
        say: Callable[[str], None],
        replaced: Sequence[Path] = (),
    ):
        """`replaced` are deleted once there is a checkpoint instead."""
        self.run, self.chunks, self.optimizer, self.entries, self.mesh = run, chunks, optimizer, entries, mesh
        self.root, self.progress, self.say, self.replaced = Path(run.checkpoint.save), progress, say, replaced
        held = pieces(named_parameters(chunks), entries, mesh)
        self.pieces = [p for number, p in held if p.is_written_here(number) and not is_second_copy(p.entry, mesh)]
        self.buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.failure: Exception | None = None

    def save(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Copy what is to be saved, and write it while training goes on; the save before has ended then.

        `state` is what else the run needs to go on, ready for JSON. Raises HungError as `wait`.
        """
        self.wait()
        name = f"the save of iteration {iteration}"
        if self.run.checkpoint.ckpt_format == "torch":
            write = partial(self._write_torch, iteration)
            self.progress.start(name, lambda: self._guarded(iteration, write, (OSError, ValueError)))
            self.wait()
            return
        write = partial(self._write_dcp, iteration, self._staged(), self._record(iteration, state))
        self.progress.start(name, lambda: self._guarded(iteration, write))
        if not self.run.checkpoint.async_save:
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way, however slow it is. Raises HungError when a rank does not move in it."""
        self.progress.wait()

    def finish(self) -> None:
        """Return when the last save is on the disk. Raises OSError when it is not."""
        self.wait()
        if self.failure is not None:
            raise OSError(f"the last checkpoint could not be saved: {self.failure}")

    def _guarded(
        self, iteration: int, write: Callable[[], None], told: tuple[type[Exception], ...] = (Exception,)
    ) -> None:
        """Write; what goes wrong is told, and training goes on: weights in memory are worth more than a file."""
        try:
            write()
        except told as error:
            self.failure = error
            if self.mesh.rank == 0:
                shutil.rmtree(self._hidden(iteration), ignore_errors=True)
            self.say(
                f" the checkpoint of iteration {iteration} was NOT saved: {error}; training goes on, and {self.root} "
                "keeps the earlier ones"
            )
        else:
            self.failure = None
            self.say(f" saved checkpoint of iteration {iteration} in {self.root}")

    def _write_torch(self, iteration: int) -> None:
        if self.mesh.device.type != "cpu":
            torch.accelerator.set_device_index(self.mesh.device)  # each thread has its own
        self._on_first("writing configuration and tokenizer", lambda: write_companions(self.run, self.root))
        save_weights(self.run, self.chunks, self.entries, iteration, self.mesh, self.progress)
        self._on_first("deleting older checkpoints", lambda: self._remove_older(iteration))

    def _write_dcp(self, iteration: int, boxes: list[TensorBox], record: dict[str, Any]) -> None:
        hidden, progress = self._hidden(iteration), self.progress
        self._on_first("emptying its directory", lambda: _empty(hidden))
        write_boxes(hidden, boxes, progress)
        files = files_of_rank(hidden, self.mesh.rank)
        found = progress.together(
            "reading its files", lambda: {path.name: checksum(path, progress.moved) for path in files}
        )
        record["files"] = {file: sums for sums_of in found for file, sums in sums_of.items()}
        self._on_first("giving it its name", lambda: self._publish(hidden, iteration, record))

    def _on_first(self, doing: str, function: Callable[[], None]) -> None:
        """What rank 0 does while the others wait; its error is theirs."""
        self.progress.together(doing, function if self.mesh.rank == 0 else lambda: None)

    def _hidden(self, iteration: int) -> Path:
        """Where an iteration is written before it has its name."""
        return self.root / f".{iteration_name(iteration)}.partial"

    def _publish(self, hidden: Path, iteration: int, record: dict[str, Any]) -> None:
        """Give a whole checkpoint its name, then name it in the tracker, then make room."""
        write_companions(self.run, self.root)
        write_text(hidden / RUN, as_json(record))
        synchronise_tree(hidden)
        move_directory(hidden, self.root / iteration_name(iteration))
        write_text(self.root / TRACKER, str(iteration))
        self._remove_older(iteration)

    def _remove_older(self, iteration: int) -> None:
        """Delete what this run replaces, and of its own checkpoints up to this one all but the last `keep_last`."""
        own = self.root / iteration_name(iteration)
        replaced = [path for path in self.replaced if path != own and path.exists()]
        keep, earlier = self.run.checkpoint.keep_last, sorted(self.root.glob("iter_*"))
        kept = [path for path in earlier if path.name <= own.name and path not in replaced]
        for path in [*replaced, *(kept[:-keep] if keep else [])]:
            hidden = path.with_name(f".{path.name}.partial")  # a killed deletion leaves nothing that looks whole
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
        self.replaced = ()

    @torch.no_grad()
    def _staged(self) -> list[TensorBox]:
        """Copies, on the CPU, of what this rank saves; their memory serves every save."""
        boxes = []
        for piece in self.pieces:
            state, name = self.optimizer.state.get(piece.parameter, {}), piece.entry.mcore
            moments = {f"{OPTIMIZER}{moment}.{name}": state[moment] for moment in MOMENTS if moment in state}
            for key, tensor in ({name: piece.parameter} | moments).items():
                values = piece.of(tensor)
                for box in piece.boxes:
                    copied = self._copied(key, box.start, values[box.local])
                    boxes.append(TensorBox(key, piece.entry.shape, box.start, copied))
        for key, values in random_state(self.mesh).items():
            shape = (self.mesh.grid.world, len(values))
            boxes.append(TensorBox(key, shape, (self.mesh.rank, 0), values.unsqueeze(0)))
        synchronise(self.mesh.device)
        return boxes

    def _copied(self, key: str, start: tuple[int, ...], values: Tensor) -> Tensor:
        if (key, start) not in self.buffers:
            is_pinned = self.mesh.device.type != "cpu"
            self.buffers[key, start] = torch.empty(values.shape, dtype=values.dtype, pin_memory=is_pinned)
        return self.buffers[key, start].copy_(values, non_blocking=True)

    def _record(self, iteration: int, state: Mapping[str, Any]) -> dict[str, Any]:
        steps = [found["step"] for found in self.optimizer.state.values() if "step" in found]
        return {
            "iteration": iteration,
            "consumed_samples": iteration * self.run.global_batch_size,
            "optimizer_step": int(steps[0]) if steps else 0,
            "world_size": self.mesh.grid.world,
            "state": dict(state),
            "run": dataclasses.asdict(self.run),
        }


def random_state(mesh: Mesh) -> dict[str, Tensor]:
    """The state of PyTorch's generators on this rank, bytes [N] each, by the names they are saved under."""
    states = {f"{RANDOM}cpu": torch.get_rng_state()}
    if mesh.device.type != "cpu":
        states[f"{RANDOM}device"] = torch.get_device_module(mesh.device).get_rng_state(mesh.device).cpu()
    return states


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
