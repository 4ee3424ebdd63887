"""The training loop."""

import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from megatron_patch.config.run import RunConfig
from megatron_patch.data.batches import Batch, training_batches, validation_batches, without_effect
from megatron_patch.data.raw import record_texts
from megatron_patch.data.tokenizer import check_datasets, check_vocabulary, load_tokenizer
from megatron_patch.families import ALL
from megatron_patch.families.manifest import Entry, manifest
from megatron_patch.model.build import DTYPES, build_model
from megatron_patch.model.compilation import compile_layers, is_compiled
from megatron_patch.model.kernels import resolve_kernel, using
from megatron_patch.parallel.agreement import host_group
from megatron_patch.parallel.collectives import max_
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.parallel.progress import Progress
from megatron_patch.train.finite import Streak, origin
from megatron_patch.train.log import Log
from megatron_patch.train.loss_scale import LossScale
from megatron_patch.train.offload import described, resolve_offload
from megatron_patch.train.optimizer import build_optimizer, set_learning_rate
from megatron_patch.train.passes import Passes, build_passes
from megatron_patch.train.resume import Beginning, begin, find_beginning
from megatron_patch.train.routing import router_fields
from megatron_patch.train.save import Saver, claimed_output
from megatron_patch.train.schedule import learning_rate
from megatron_patch.train.shared_output import check_shared
from megatron_patch.train.signals import noted
from megatron_patch.train.step import StepResult, backward, evaluate, train_step
from megatron_patch.train.watch import LossWatch, first_loss_warning


@dataclass(frozen=True)
class Training:
    """What steps are made of, on this rank."""

    run: RunConfig
    mesh: Mesh
    entries: list[Entry]
    passes: Passes
    optimizer: torch.optim.Optimizer
    scale: LossScale
    validation: Iterable[list[Batch]]
    streak: Streak
    watch: LossWatch


def train(run: RunConfig, mesh: Mesh) -> None:
    """From the start weights, or where an earlier launch of the run stopped, to the last checkpoint."""
    entries = manifest(ALL[run.family], run.model)
    progress = Progress(host_group(mesh), run.parallel.distributed_timeout_minutes)
    beginning = find_beginning(run, progress)
    run = beginning.settled(run)
    batches, validation = _batches(run, mesh, beginning.iteration)
    run = replace(run, memory=resolve_offload(run, entries, mesh.grid, mesh.device))
    chunks = build_model(run.model, run.parallel, run.precision, mesh, run.memory)
    if is_compiled(run.torch_compile, mesh.device):
        compile_layers(chunks)
    kernel = resolve_kernel(run.model, mesh, DTYPES[run.precision], fastest=run.use_flash_attn)
    passes, optimizer = build_passes(chunks, mesh, run.precision), build_optimizer(run.optimizer, chunks)
    scale, streak = _loss_scale(run, beginning), Streak(run.max_nonfinite_steps)
    training = Training(run, mesh, entries, passes, optimizer, scale, validation, streak, LossWatch())
    with claimed_output(run, mesh, progress):
        check_shared(Path(run.checkpoint.save), progress)
        lines = begin(run, beginning, chunks, optimizer, entries, mesh, progress)
        log = Log(run, mesh, beginning.kept)  # opens files: not before everything that can be refused was read
        for line in (*lines, *described(run), f"attention: {kernel.description}", *_nothing_left(run, beginning)):
            log.say(f" {line}")
        saver = Saver(run, chunks, optimizer, entries, mesh, progress, log.say, beginning.replaced(run))
        try:
            with using(kernel, chunks), noted() as is_stop_asked:
                if beginning.checkpoint is None and run.eval_iters:
                    log.before_training(evaluate(passes, validation, mesh))
                for iteration, micro_batches in enumerate(batches, beginning.iteration + 1):
                    if _iterate(training, log, saver, iteration, micro_batches, is_stop_asked):
                        log.say(f" asked to stop: iteration {iteration} is the last; {_way_on(run)}")
                        break
        finally:
            saver.wait()
        saver.finish()
    log.close()


def _iterate(
    training: Training,
    log: Log,
    saver: Saver,
    iteration: int,
    micro_batches: list[Batch],
    is_stop_asked: Callable[[], bool],
) -> bool:
    """One iteration: the step, and what is due after it. Returns whether a rank was asked to stop."""
    run, scale = training.run, training.scale
    rate = learning_rate(run.optimizer, iteration - 1)
    set_learning_rate(training.optimizer, rate)
    result = train_step(run, training.passes, training.optimizer, training.entries, micro_batches, training.mesh, scale)
    routing = router_fields(training.passes.chunks, training.mesh)
    fields = log.iteration(iteration, {"learning rate": rate} | result.fields() | routing)
    _look_at(training, log, iteration, result, micro_batches)
    is_validated = run.eval_iters > 0 and _due(run, iteration, run.eval_interval)
    validation = evaluate(training.passes, training.validation, training.mesh) if is_validated else None
    log.finish(iteration, fields, validation)
    is_stopping = _on_any_rank(is_stop_asked(), training.mesh)
    is_doubtful = training.streak.length > 0 and iteration < run.train_iters  # older weights may be the better ones
    if is_stopping or (_due(run, iteration, run.checkpoint.save_interval) and not is_doubtful):
        saver.save(iteration, {"loss_scale": asdict(scale)})
    return is_stopping


def _look_at(training: Training, log: Log, iteration: int, result: StepResult, micro_batches: list[Batch]) -> None:
    """Say what a person should know of the step's loss. Raises ValueError when too many in a row were not finite."""
    run, streak, mesh, scale = training.run, training.streak, training.mesh, training.scale
    streak.add(result, scale)
    warnings = [training.watch.warning(result.loss)]
    if iteration == 1 and run.checkpoint.load is not None:
        warnings.append(first_loss_warning(result.loss, run.model.vocab_size))
    if streak.length:
        warnings.append(f"the loss is {result.loss}, the gradient norm {result.gradient_norm}: the step is skipped")
    for warning in filter(None, warnings):
        log.say(f" warning: iteration {iteration}: {warning}")
    if streak.is_over:
        where = origin(
            training.passes.chunks, mesh, lambda: backward(training.passes, micro_batches, mesh, result.loss_scale)
        )
        raise ValueError(
            f"iteration {iteration} is number {streak.length} in a row that is not finite (loss {result.loss}, "
            f"gradient norm {result.gradient_norm}): {where}. Weights are as before them; lower LR, or check the data "
            "and the start weights"
        )


def _on_any_rank(flag: bool, mesh: Mesh) -> bool:
    return bool(max_(torch.tensor(float(flag), device=mesh.device), mesh.world))


def _loss_scale(run: RunConfig, beginning: Beginning) -> LossScale:
    """As the run left it, if its precision has one."""
    fresh, recorded = LossScale.of(run.precision), beginning.state.get("loss_scale", {})
    return LossScale(**recorded) if recorded.get("is_dynamic", False) and fresh.is_dynamic else fresh


def _batches(run: RunConfig, mesh: Mesh, start_iteration: int) -> tuple[Iterable[list[Batch]], Iterable[list[Batch]]]:
    """This data-parallel rank's training steps, and its validation steps, which can be iterated again and again."""
    tokenizer = load_tokenizer(run.data.tokenizer_model or run.checkpoint.load, run.data.trust_remote_code)
    check_vocabulary(tokenizer, run.model.vocab_size)
    notes = check_datasets((*run.data.train_data_path, *run.data.valid_data_path), tokenizer)
    notes += without_effect(run.data)
    if mesh.rank == 0:
        for note in notes:
            logging.getLogger(__name__).warning(note)
        prompt = ALL[run.family].prompt_type
        for text in record_texts(run.data, tokenizer, prompt, is_terminal=sys.stdout.isatty()):
            print(text, end="\n\n", flush=True)
    dealt = {
        "family_prompt": ALL[run.family].prompt_type,
        "global_batch_size": run.global_batch_size,
        "micro_batch_size": run.micro_batch_size,
        "rank": mesh.dp.rank,
        "size": mesh.dp.size,
        "is_loud": mesh.rank == 0,
    }
    return (
        training_batches(run.data, tokenizer, train_iters=run.train_iters, start_iteration=start_iteration, **dealt),
        validation_batches(run.data, tokenizer, eval_iters=run.eval_iters, **dealt) if run.eval_iters else [],
    )


def _nothing_left(run: RunConfig, beginning: Beginning) -> list[str]:
    if beginning.iteration < run.train_iters:
        return []
    return [
        f"nothing is left to train: {beginning.iteration} iterations are done, and {run.train_iters} are asked for; "
        f"their weights are in {beginning.checkpoint.directory}. For more, raise TRAIN_TOKENS_OR_ITERS"
    ]


def _way_on(run: RunConfig) -> str:
    if run.checkpoint.ckpt_format == "torch":
        return "its weights can start a run, but without an optimizer's state none goes on from them"
    return "the same command goes on from it"


def _due(run: RunConfig, iteration: int, interval: int) -> bool:
    return iteration == run.train_iters or iteration % interval == 0
