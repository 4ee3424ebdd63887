"""Runs in which one rank meets a fault: what the fault tests run on their ranks."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_patch.config.run import RunConfig
from megatron_patch.model.decoder import GPTModel
from megatron_patch.train import save, shared_output, step
from megatron_patch.train.loop import train
from megatron_patch.weights.parameters import local, named_parameters
from tiny_run import mesh_of


def asked_to_stop(run: RunConfig, world: int, rank: int, at_step: int) -> None:
    """A run of which `rank` alone is asked to stop, in the middle of a step."""
    _after_gradients(rank, at_step, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    train(run, mesh_of(run, world))


def with_poisoned_gradient(run: RunConfig, world: int, rank: int, at_step: int) -> None:
    """A run of which one gradient of one rank is infinite in one step."""

    def poison(chunks: list[GPTModel]) -> None:
        gradients = [local(parameter.grad) for parameter in named_parameters(chunks).values()]
        next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = torch.inf

    _after_gradients(rank, at_step, poison)
    train(run, mesh_of(run, world))


def with_poisoned_layer(run: RunConfig, world: int, rank: int, layer: int, is_backward: bool) -> str:
    """How a run ends where, from its second step, `rank` computes NaN in a layer's attention, or in its gradient."""

    def poison(chunks: list[GPTModel]) -> None:
        for chunk in chunks:
            if str(layer) in chunk.decoder.layers:
                projection = chunk.decoder.layers[str(layer)].self_attention.linear_proj
                projection.register_forward_hook(lambda module, given, output: _Poison.apply(output, is_backward))

    _after_gradients(rank, 1, poison)
    try:
        train(run, mesh_of(run, world))
    except ValueError as error:
        return str(error)
    return "it did not end"


def held_up_in_a_save(run: RunConfig, world: int, rank: int) -> float:
    """Seconds until a run ends whose `rank` hangs in its first save, and in whose next step the others miss it."""
    released, write = threading.Event(), save.write_boxes

    def missed(_: list[GPTModel]) -> None:
        raise RuntimeError("Timed out")

    if dist.get_rank() == rank:
        save.write_boxes = lambda *arguments: write(*arguments) if released.wait() else None
    _after_gradients(dist.get_rank(), run.checkpoint.save_interval + 1, missed)
    started = time.monotonic()
    try:
        train(run, mesh_of(run, world))
    except RuntimeError:
        return time.monotonic() - started
    finally:
        released.set()
    return float("inf")


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, is_backward):
        ctx.is_backward = is_backward
        return x.clone() if is_backward else x * torch.nan

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (torch.nan if ctx.is_backward else 1), None


def _after_gradients(rank: int, at_step: int, do: Callable[[list[GPTModel]], None]) -> None:
    """Let `rank` do something with its chunks in one of its steps, when the gradients are there."""
    finish, seen = step.finish_gradients, []

    def watched(chunks, *arguments):
        finish(chunks, *arguments)
        seen.append(chunks)
        if dist.get_rank() == rank and len(seen) == at_step:
            do(chunks)

    step.finish_gradients = watched


def sharing(directories: list[Path]) -> str:
    """What each rank says of its own output directory."""
    shared_output.PATIENCE_SECONDS = 0.2
    try:
        shared_output.check_shared(directories[dist.get_rank()], dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "shared"
