"""Beginning a run or going on with one: from which checkpoint, whether that is whole, and its state into memory."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.checkpoint.dcp import OPTIMIZER, damage
from megatron_patch.checkpoint.dcp_source import read_region, read_weights_index, recorded_files
from megatron_patch.checkpoint.distcp import Stored
from megatron_patch.checkpoint.formats import detect_format
from megatron_patch.checkpoint.mcore import latest_directory
from megatron_patch.checkpoint.source import open_start_weights
from megatron_patch.config.checkpoint import TRACKER
from megatron_patch.config.run import RunConfig
from megatron_patch.families.manifest import Entry
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.parallel.progress import Progress
from megatron_patch.plan.start import Recorded, Start, changes, resolve_start
from megatron_patch.train.pieces import Piece, pieces, read_piece
from megatron_patch.train.save import MOMENTS, random_state
from megatron_patch.weights.load import RandomWeights, load_weights
from megatron_patch.weights.parameters import named_parameters


@dataclass(frozen=True)
class Beginning:
    """Where a run goes on from; `notes` say why, and what was passed over. Without a checkpoint it is a new run."""

    checkpoint: Recorded | None = None
    is_own: bool = True
    notes: tuple[str, ...] = ()

    @property
    def iteration(self) -> int:
        """Iterations already done."""
        return self.checkpoint.iteration if self.checkpoint else 0

    @property
    def kept(self) -> int:
        """Iterations that the run's own log has lines of, if it goes on."""
        return self.iteration if self.is_own else 0

    @property
    def state(self) -> Mapping[str, Any]:
        """What the loop gave `Saver.save` to keep."""
        return self.checkpoint.record["state"] if self.checkpoint else {}

    def settled(self, run: RunConfig) -> RunConfig:
        """`run` with the TensorBoard directory of the run that it continues, so that its curves go on."""
        if self.checkpoint is None or not self.is_own or run.tensorboard_dir is None:
            return run
        return dataclasses.replace(run, tensorboard_dir=self.checkpoint.run["tensorboard_dir"] or run.tensorboard_dir)

    def replaced(self, run: RunConfig) -> list[Path]:
        """What stands in the output directory and is not continued: `--overwrite` was passed."""
        if self.checkpoint is not None and self.is_own:
            return []
        return sorted(Path(run.checkpoint.save).glob("iter_*")) if run.checkpoint.overwrite else []


def find_beginning(run: RunConfig, progress: Progress) -> Beginning:
    """The last complete checkpoint of this run, or of the one that `--resume` names, its files as they were written.

    All ranks take part and get the same. Raises, on all of them, as `resolve_start`, and ValueError for a damaged
    checkpoint unless `--resume-previous` allows the one before it.
    """
    is_first = progress.group is None or dist.get_rank(progress.group) == 0
    start: Start = progress.together("looking for checkpoints", lambda: resolve_start(run) if is_first else None)[0]
    notes: list[str] = []
    for number, candidate in enumerate(start.candidates):
        found = find_damage(candidate.directory, candidate.record["files"], progress)
        if found is None:
            changed = changes(candidate.run, run)
            notes += [
                _why(run, candidate, start.is_own),
                *([f"changed since: {', '.join(changed)}"] if changed else []),
            ]
            return Beginning(candidate, start.is_own, tuple(notes))
        if not run.checkpoint.resume_previous:
            raise ValueError(f"{found}; {_way_out(start.candidates[number + 1 :])}")
        notes.append(f"iteration {candidate.iteration} is passed over: {found}")
    if notes:
        raise ValueError(f"no checkpoint in {run.checkpoint.save} is whole: {'; '.join(notes)}")
    return Beginning(notes=(f"a new run: {_why_new(run)}",))


def find_damage(directory: Path, files: Mapping[str, Mapping[str, int | str]], progress: Progress) -> str | None:
    """One phrase about the first file that is not as it was written, the same on all ranks, which share the reading."""
    group = progress.group
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    own = sorted(files)[rank::size]
    found = progress.together("reading checkpoint files", lambda: damage(directory, files, own, progress.moved))
    return next((phrase for phrase in found if phrase is not None), None)


def begin(
    run: RunConfig,
    beginning: Beginning,
    chunks: list[GPTModel],
    optimizer: torch.optim.Optimizer,
    entries: list[Entry],
    mesh: Mesh,
    progress: Progress,
) -> tuple[str, ...]:
    """Give the model its weights, and the optimizer its state where there is one. Returns lines that say from where."""
    if beginning.checkpoint is not None:
        restore(beginning.checkpoint, chunks, optimizer, entries, mesh)
        return beginning.notes
    load = run.checkpoint.load
    if load is None:
        source = RandomWeights(run.model, entries, run.data.seed)
        load_weights(chunks, entries, source, mesh)
        return (*beginning.notes, f"starting from {source.describe()}, with a new optimizer")
    if detect_format(Path(load)).name == "dcp" and not run.checkpoint.upcycle:
        described = _load_dcp(Path(load), chunks, entries, mesh, progress)
    else:
        source = open_start_weights(run)
        load_weights(chunks, entries, source, mesh)
        described = source.describe()
    return (*beginning.notes, f"starting from {described} in {load}, with a new optimizer")


@torch.no_grad()
def _load_dcp(root: Path, chunks: list[GPTModel], entries: list[Entry], mesh: Mesh, progress: Progress) -> str:
    """The weights of what training wrote: every rank reads its own part. Raises ValueError for a damaged file."""
    directory = latest_directory(root)
    found = find_damage(directory, recorded_files(directory), progress)
    if found is not None:
        raise ValueError(f"{found}; start from an earlier iteration, by its number in {root / TRACKER}")
    index = read_weights_index(directory, entries)
    for _, piece in pieces(named_parameters(chunks), entries, mesh):
        read_piece(piece, piece.parameter, index, piece.entry.mcore)
    return f"dcp {directory.name}"


@torch.no_grad()
def restore(
    checkpoint: Recorded,
    chunks: list[GPTModel],
    optimizer: torch.optim.Optimizer,
    entries: list[Entry],
    mesh: Mesh,
) -> None:
    """Weights, optimizer and, on as many ranks, random state of a checkpoint, whatever layout wrote it.

    Raises ValueError for names, shapes or types other than `entries`.
    """
    index = read_weights_index(checkpoint.directory, entries)
    held = [piece for _, piece in pieces(named_parameters(chunks), entries, mesh)]
    for piece in held:
        read_piece(piece, piece.parameter, index, piece.entry.mcore)
    steps = checkpoint.record["optimizer_step"]
    if steps:
        _restore_optimizer(optimizer, held, index, steps)
    if checkpoint.record["world_size"] == mesh.grid.world:
        _restore_random_state(index, mesh)


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, held: list[Piece], index: Mapping[str, Stored], steps: int
) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(float(steps), device=parameter.device)
            state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
    for piece in held:
        for moment in MOMENTS:
            name = f"{OPTIMIZER}{moment}.{piece.entry.mcore}"
            if name not in index:
                raise ValueError(f"the checkpoint holds no {name}, though its optimizer has made {steps} steps")
            read_piece(piece, optimizer.state[piece.parameter][moment], index, name)


def _restore_random_state(index: Mapping[str, Stored], mesh: Mesh) -> None:
    for name, state in random_state(mesh).items():
        if name not in index or index[name].shape[1] != len(state):
            continue  # written on another kind of device
        read_region(name, index[name], (mesh.rank, 0), state.unsqueeze(0))
        if name.endswith("cpu"):
            torch.set_rng_state(state)
        else:
            torch.get_device_module(mesh.device).set_rng_state(state, mesh.device)


def _way_out(earlier: Sequence[Recorded]) -> str:
    if not earlier:
        return "no earlier checkpoint is left; --overwrite with --resume never starts anew"
    return f"--resume-previous continues from iteration {earlier[0].iteration}, the checkpoint before it"


def _why(run: RunConfig, checkpoint: Recorded, is_own: bool) -> str:
    if not is_own:
        return f"resumed from iteration {checkpoint.iteration} in {checkpoint.directory}: --resume names it"
    return f"continued from iteration {checkpoint.iteration}, this run's own last checkpoint in {run.checkpoint.save}"


def _why_new(run: RunConfig) -> str:
    if run.checkpoint.resume == "never":
        return "--resume is never"
    return f"{run.checkpoint.save} holds none of its checkpoints"
