"""A training step on any layout, and what it differs by from the same step in one process: the layout tests' yardstick.

check_as_one_process(Trial("mixtral", ParallelConfig(expert_model_parallel_size=2), world=4))
check_as_one_process(Trial("mistral", ParallelConfig(pipeline_model_parallel_size=2), world=2, steps=3,
                           dtype=torch.float64))
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_patch.checkpoint.layouts import join, same_bits
from megatron_patch.config.checkpoint import CheckpointConfig
from megatron_patch.config.data import DataConfig
from megatron_patch.config.memory import MemoryConfig
from megatron_patch.config.model import ModelConfig
from megatron_patch.config.optimizer import OptimizerConfig
from megatron_patch.config.parallel import ParallelConfig
from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.families.manifest import Entry, manifest
from megatron_patch.model.build import build_model
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.grid import Grid, resolve_grid
from megatron_patch.parallel.mesh import Mesh, build_mesh, single_process
from megatron_patch.train.loss_scale import LossScale
from megatron_patch.train.optimizer import build_optimizer, finish_gradients, gradient_norm
from megatron_patch.train.passes import build_passes
from megatron_patch.train.step import backward, evaluate, train_step
from megatron_patch.weights.load import RandomWeights, load_weights
from megatron_patch.weights.parameters import entry_tensors, named_parameters
from ranks import run_ranks
from tiny_models import LENGTH, MICRO_BATCH, MODELS, SAMPLES, micro_batches

ALONE, AMPLE = ParallelConfig(), MemoryConfig()
EMBEDDING = "embedding.word_embeddings.weight"
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-9}


@dataclass(frozen=True)
class Trial:
    """A model of MODELS on a layout: `steps` optimizer steps, then the gradients of one more.

    `model` replaces the one of that name, e.g. with more layers. `dtype` is float64 where parameters are compared
    after steps: AdamW turns a gradient's float32 noise of 1e-7 into 3e-3.
    """

    name: str
    parallel: ParallelConfig = ALONE
    world: int = 1
    steps: int = 0
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"
    model: ModelConfig | None = None
    is_packed: bool = False
    memory: MemoryConfig = AMPLE

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.model or MODELS[self.name]

    @property
    def entries(self) -> list[Entry]:
        """The model's manifest."""
        return manifest(ALL[self.name.split()[0]], self.config)

    @property
    def grid(self) -> Grid:
        """Where each rank stands."""
        return resolve_grid(self.parallel, self.world)

    @property
    def alone(self) -> "Trial":
        """The same in one process."""
        return dataclasses.replace(self, parallel=ALONE, world=1)


@dataclass(frozen=True)
class Outcome:
    """What one rank found; `gradients` (before clipping) and `weights` hold its tensor-parallel pieces by entry."""

    loss: float
    validation: float
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """Differences from one process: relative, of a tensor to its largest value; weights absolute."""

    loss: float
    validation: float
    norm: float
    gradient: float
    gradient_of: str
    weight: float
    weight_of: str


def check_as_one_process(trial: Trial) -> Errors:
    """Assert that a layout has one process's loss, gradients and parameters, and that its replicas are identical."""
    errors, limit = errors_on(trial), LIMITS[trial.dtype]
    for name in ("loss", "validation", "norm", "gradient"):
        assert getattr(errors, name) <= limit, f"{name} differs from one process by more than {limit}: {errors}"
    if trial.steps:
        assert errors.weight <= limit, f"parameters differ from one process by more than {limit}: {errors}"
    return errors


def errors_on(trial: Trial) -> Errors:
    """Run `trial` on its ranks and in this process. Asserts that replicas are identical bit for bit."""
    outcomes = run_ranks(outcome_on_rank, trial.world, trial)
    return compare(trial, outcomes, one_process(trial.alone))


def compare(trial: Trial, outcomes: list[Outcome], alone: Outcome) -> Errors:
    """How far the ranks' `outcomes` are from `alone`. Asserts that replicas are identical bit for bit."""
    gradients = joined(trial, [outcome.gradients for outcome in outcomes])
    weights = joined(trial, [outcome.weights for outcome in outcomes])
    gradient, gradient_of = _worst(gradients, alone.gradients, relative=True)
    weight, weight_of = _worst(weights, alone.weights, relative=False)
    scalars = {
        name: max(abs(getattr(o, name) / getattr(alone, name) - 1) for o in outcomes)
        for name in ("loss", "validation", "norm")
    }
    return Errors(**scalars, gradient=gradient, gradient_of=gradient_of, weight=weight, weight_of=weight_of)


def joined(trial: Trial, pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors by entry, of every rank's pieces. Asserts that each is held where it must be, replicas equal."""
    return {entry.mcore: _join_entry(trial, entry, pieces) for entry in trial.entries}


def _join_entry(trial: Trial, entry: Entry, pieces: list[dict[str, Tensor]]) -> Tensor:
    grid, axis = trial.grid, "tp" if entry.expert is None else "etp"
    size, shards, holders = getattr(grid, axis), {}, 0
    for rank, held in enumerate(pieces):
        if entry.mcore in held:
            place, holders = grid.coordinate(rank, axis), holders + 1
            first = shards.setdefault(place, held[entry.mcore])
            assert same_bits(held[entry.mcore], first), f"{entry.mcore}: rank {rank} and its replica differ"
    is_at_both_ends = entry.mcore == EMBEDDING and trial.config.share_embeddings_and_output_weights and grid.pp > 1
    stages = 2 if is_at_both_ends else 1
    wanted = stages * trial.world // grid.pp // (1 if entry.expert is None else grid.ep)
    assert holders == wanted, f"{entry.mcore} is held by {holders} ranks, not {wanted}"
    return join(entry, [shards[place] for place in range(size)])


def _worst(found: dict[str, Tensor], wanted: dict[str, Tensor], *, relative: bool) -> tuple[float, str]:
    def error(name: str) -> float:
        difference = (found[name] - wanted[name]).abs().max().item()
        scale = wanted[name].abs().max().item() if relative else 1.0
        return difference / scale if scale else float(difference > 0)

    return max((error(name), name) for name in wanted)


@lru_cache(maxsize=32)
def one_process(trial: Trial) -> Outcome:
    """The outcome of `trial` in this process."""
    torch.set_num_threads(1)
    try:
        return outcome(trial, single_process())
    finally:
        torch.set_default_dtype(torch.float32)


def outcome_on_rank(trial: Trial) -> Outcome:
    """What `run_ranks` runs."""
    return outcome(trial, mesh_of(trial.parallel, trial.world))


def outcome(trial: Trial, mesh: Mesh) -> Outcome:
    """Validate, train `steps` steps, and find the gradients of the next, at this rank's place."""
    torch.set_default_dtype(trial.dtype)
    run, entries, chunks = run_config(trial), trial.entries, start(trial, mesh)
    passes, optimizer = build_passes(chunks, mesh, trial.precision), build_optimizer(run.optimizer, chunks)
    batches = micro_batches(mesh.dp.rank, mesh.dp.size, is_packed=trial.is_packed)
    validation = evaluate(passes, [batches], mesh)
    for _ in range(trial.steps):
        train_step(run, passes, optimizer, entries, batches, mesh, LossScale.of(trial.precision))
    optimizer.zero_grad()
    loss = backward(passes, batches, mesh)
    finish_gradients(chunks, entries, mesh)
    gradients = pieces_of(chunks, mesh, lambda parameter: parameter.grad)
    norm = gradient_norm(chunks, entries, mesh, sharded=trial.parallel.use_distributed_optimizer)
    weights = pieces_of(chunks, mesh, lambda parameter: parameter.data)
    return Outcome(float(loss), float(validation), float(norm), gradients, weights)


def start(trial: Trial, mesh: Mesh) -> list[GPTModel]:
    """This rank's chunks with the weights that every layout starts from."""
    chunks = build_model(trial.config, trial.parallel, trial.precision, mesh, trial.memory)
    load_weights(chunks, trial.entries, RandomWeights(trial.config, trial.entries, seed=3), mesh)
    return chunks


def pieces_of(chunks: list[GPTModel], mesh: Mesh, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`of` each parameter by manifest entry, whole over data-parallel ranks, which must all take part."""
    pieces = {}
    for name, parameter in named_parameters(chunks).items():
        tensor = of(parameter)
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        pieces |= {entry: piece.detach().clone() for entry, piece in entry_tensors(name, whole, mesh)}
    return pieces


def run_config(trial: Trial) -> RunConfig:
    """The run that `trial` is, as the trainer's step reads it. Its files are never opened."""
    return RunConfig(
        model=trial.config,
        parallel=trial.parallel,
        data=DataConfig(
            train_data_path=("none",),
            valid_data_path=("none",),
            seq_length=LENGTH,
            max_padding_length=LENGTH,
            tokenizer_model="none",
        ),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=0.0, lr_decay_iters=10, clip_grad=0.5),
        memory=trial.memory,
        checkpoint=CheckpointConfig(save="none", save_interval=1),
        family=trial.name.split()[0],
        train_iters=10,
        micro_batch_size=MICRO_BATCH,
        global_batch_size=SAMPLES,
        precision=trial.precision,
    )


def mesh_of(parallel: ParallelConfig, world: int) -> Mesh:
    """The mesh of this rank among `world`, on the CPU."""
    return build_mesh(
        resolve_grid(parallel, world),
        torch.device("cpu"),
        sharded=parallel.use_distributed_optimizer,
        sequence_parallel=parallel.sequence_parallel,
        timeout_minutes=1.0,
    )
