"""The training loop."""

from collections.abc import Iterable
from contextlib import nullcontext

from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_patch.checkpoint.source import open_checkpoint
from megatron_patch.config.run import RunConfig
from megatron_patch.data.batches import Batch, training_batches, validation_batches
from megatron_patch.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_patch.families import ALL
from megatron_patch.families.manifest import Entry, manifest
from megatron_patch.model.build import build_model
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.train.log import Log
from megatron_patch.train.loss_scale import LossScale
from megatron_patch.train.optimizer import build_optimizer, set_learning_rate
from megatron_patch.train.passes import build_passes
from megatron_patch.train.save import save_checkpoint
from megatron_patch.train.schedule import learning_rate
from megatron_patch.train.step import check_finite, evaluate, train_step
from megatron_patch.train.weights import RandomWeights, Source, load_weights


def train(run: RunConfig, mesh: Mesh) -> None:
    """From the start weights to the last checkpoint."""
    entries = manifest(ALL[run.family], run.model)
    training, validation = _batches(run, mesh)
    chunks = build_model(run.model, run.parallel, run.precision, mesh, run.memory)
    source = _start_weights(run, entries)
    load_weights(chunks, entries, source, mesh)
    passes = build_passes(chunks, mesh, run.precision)
    optimizer, scale = build_optimizer(run.optimizer, chunks), LossScale.of(run.precision)
    log = Log(run, mesh)  # opens files: not before everything that can be refused was read
    origin = f" in {run.checkpoint.load}" if run.checkpoint.load else ""
    log.say(f" starting from {source.describe()}{origin}, with a new optimizer")

    with nullcontext() if run.use_flash_attn else sdpa_kernel(SDPBackend.MATH):
        log.before_training(evaluate(passes, validation, mesh))
        for iteration, micro_batches in enumerate(training, 1):
            rate = learning_rate(run.optimizer, iteration - 1)
            set_learning_rate(optimizer, rate)
            result = train_step(run, passes, optimizer, entries, micro_batches, mesh, scale)
            fields = log.iteration(iteration, {"learning rate": rate} | result.fields())
            check_finite(iteration, result)
            is_validated = _due(run, iteration, run.eval_interval)
            log.finish(iteration, fields, evaluate(passes, validation, mesh) if is_validated else None)
            if _due(run, iteration, run.checkpoint.save_interval):
                save_checkpoint(run, chunks, iteration, mesh)
                log.say(f" saved checkpoint of iteration {iteration} in {run.checkpoint.save}")
    log.close()


def _batches(run: RunConfig, mesh: Mesh) -> tuple[Iterable[list[Batch]], Iterable[list[Batch]]]:
    """This data-parallel rank's training steps, and its validation steps, which can be iterated again and again."""
    tokenizer = load_tokenizer(run.data.tokenizer_model or run.checkpoint.load, run.data.trust_remote_code)
    check_vocabulary(tokenizer, run.model.vocab_size)
    dealt = {
        "family_prompt": ALL[run.family].prompt_type,
        "global_batch_size": run.global_batch_size,
        "micro_batch_size": run.micro_batch_size,
        "rank": mesh.dp.rank,
        "size": mesh.dp.size,
    }
    return (
        training_batches(run.data, tokenizer, train_iters=run.train_iters, **dealt),
        validation_batches(run.data, tokenizer, eval_iters=run.eval_iters, **dealt),
    )


def _due(run: RunConfig, iteration: int, interval: int) -> bool:
    return iteration == run.train_iters or iteration % interval == 0


def _start_weights(run: RunConfig, entries: list[Entry]) -> Source:
    if run.checkpoint.load is None:
        return RandomWeights(run.model, entries, run.data.seed)
    return open_checkpoint(run.checkpoint.load, ALL[run.family], run.model)
