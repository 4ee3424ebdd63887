"""Runs in which one rank meets a fault: what the fault tests run on their ranks."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_patch.checkpoint import paced
from megatron_patch.config.run import RunConfig
from megatron_patch.model.decoder import GPTModel
from megatron_patch.parallel.progress import HungError, Progress
from megatron_patch.train import shared_output, step
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


def hanging_in_a_save(run: RunConfig, world: int, rank: int, save: int, is_stopped: bool) -> tuple[float, str]:
    """How, and after how many seconds in it, a run ends whose `rank` hangs in its save number `save`.

    The rank's process is stopped, or only the thread that writes.
    """
    pids, released, began = [0] * world, threading.Event(), []
    dist.all_gather_object(pids, os.getpid())

    def hang(file: paced.PacedFile) -> None:
        if began or f"iter_{save * run.checkpoint.save_interval:07}" not in str(file.name):
            return
        began.append(time.monotonic())
        if dist.get_rank() != rank:
            return
        if is_stopped:
            time.sleep(0.5)  # the others have heard what it does
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            released.wait()

    _before_writing(hang)
    try:
        train(run, mesh_of(run, world))
        return time.monotonic() - began[0], "it did not hang"
    except HungError as error:
        seconds = time.monotonic() - began[0]
        if not is_stopped:
            dist.barrier()  # released earlier, it would hang no longer
        return seconds, str(error)
    finally:
        released.set()
        if dist.get_rank() != rank:
            os.kill(pids[rank], signal.SIGCONT)


def slow_in_a_save(run: RunConfig, world: int, rank: int, seconds: float) -> float:
    """Seconds from the error that ends a run to its end, while `rank` writes a save of so many `seconds` at least."""
    failed, slow = [], iter([seconds / 40] * 40)

    def fail(_: list[GPTModel]) -> None:
        failed.append(time.monotonic())
        raise RuntimeError("nothing to do with the save")

    _before_writing(lambda _: time.sleep(next(slow, 0)) if dist.get_rank() == rank else None)
    _after_gradients(dist.get_rank(), run.checkpoint.save_interval + 1, fail)
    try:
        train(run, mesh_of(run, world))
    except HungError:
        return -1.0
    except RuntimeError:
        return time.monotonic() - failed[0]
    return -1.0


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, is_backward):
        ctx.is_backward = is_backward
        return x.clone() if is_backward else x * torch.nan

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (torch.nan if ctx.is_backward else 1), None


def _before_writing(do: Callable[[paced.PacedFile], None]) -> None:
    """Let this rank do something before every write to a checkpoint's file."""
    write = paced.PacedFile.write
    paced.PacedFile.write = lambda file, data: (do(file), write(file, data))[1]


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
        shared_output.check_shared(directories[dist.get_rank()], Progress(dist.group.WORLD))
    except ValueError as error:
        return str(error)
    return "shared"
