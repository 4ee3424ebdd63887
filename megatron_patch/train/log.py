"""What a run says about itself: the console line, TensorBoard events and one JSON line per iteration, same names."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from megatron_patch.checkpoint.atomic import write_text
from megatron_patch.config.checks import sample_length
from megatron_patch.config.run import RunConfig
from megatron_patch.families import ALL
from megatron_patch.parallel.mesh import Mesh
from megatron_patch.plan.flops import training_flops
from megatron_patch.train.device import peak_flops, peak_memory

# Console format of each field, in order; names and order are Megatron's as far as it has them.
FORMATS = {
    "consumed samples": "{:12d}",
    "elapsed time per iteration (ms)": "{:.1f}",
    "throughput per GPU (TFLOP/s/GPU)": "{:.3f}",
    "MFU": "{:.3f}",
    "tokens per second": "{:.0f}",
    "tokens per second per device": "{:.0f}",
    "samples per second": "{:.2f}",
    "learning rate": "{:.6E}",
    "global batch size": "{:5d}",
    "lm loss": "{:.6E}",
    "load_balancing_loss": "{:.6E}",
    "seq_load_balancing_loss": "{:.6E}",
    "z_loss": "{:.6E}",
    "moe/max_load": "{:.2f}",
    "moe/min_load": "{:.2f}",
    "loss scale": "{:.1f}",
    "grad norm": "{:.3f}",
    "number of skipped iterations": "{:3d}",
    "number of nan iterations": "{:3d}",
    "peak memory (GiB)": "{:.2f}",
}

COUNTED = ("number of skipped iterations", "number of nan iterations")  # a console line has all since the one before

Fields: TypeAlias = Mapping[str, float | list[int]]  # lists, such as the tokens of each expert, are for the JSON line


class Log:
    """Open for the length of a run. Only rank 0 writes; the others may call it all the same.

    A run that goes on keeps its lines and events up to iteration `kept`, and those after it are written anew.
    """

    def __init__(self, run: RunConfig, mesh: Mesh, kept: int = 0):
        self.run, self.mesh, self.enabled = run, mesh, mesh.rank == 0
        self.file = self.events = None
        self.counts: Counter[str] = Counter()  # since the last console line
        is_hidden = None if self.enabled else True  # None: except on a terminal
        self.bar = tqdm(total=run.train_iters, initial=kept, unit="it", disable=is_hidden)
        self.flops = training_flops(ALL[run.family], run.model, sample_length(run)) * run.global_batch_size
        if self.enabled:
            self._open(kept)
        self.started = time.perf_counter()

    def _open(self, kept: int) -> None:
        if self.run.log_file:
            path = Path(self.run.log_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(_lines_until(path, kept)) if kept else "")
            self.file = path.open("a", encoding="utf-8", buffering=1)
        if self.run.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and one rank needs it

            self.events = SummaryWriter(self.run.tensorboard_dir, purge_step=kept + 1 if kept else None)
        self.peak, known = peak_flops(self.mesh.device)
        self.say(f" MFU is a share of {self.peak / 1e12:.4g} TFLOP/s, the {known} peak of one {self.mesh.device.type}")

    def before_training(self, validation: float) -> None:
        """The start weights' validation loss, as iteration 0."""
        self._write(0, self._validated(0, validation))
        self.started = time.perf_counter()

    def iteration(self, iteration: int, fields: Fields) -> Fields:
        """Time and print one finished step, `fields` being what it found; returns all its fields for `finish`."""
        if not self.enabled:
            return fields
        fields = self._pace(iteration) | dict(fields) | {"peak memory (GiB)": peak_memory(self.mesh.device) / 2**30}
        self.counts.update({name: fields[name] for name in COUNTED if name in fields})
        if iteration % self.run.log_interval == 0:
            told = fields | self.counts
            shown = " | ".join(f"{name}: {form.format(told[name])}" for name, form in FORMATS.items() if name in told)
            self.counts.clear()
            self.say(f" iteration {iteration:8d}/{self.run.train_iters:8d} | {shown} |")
        return fields

    def finish(self, iteration: int, fields: Fields, validation: float | None) -> None:
        """Write the iteration's line once its validation loss, if one is due, is known; the next step starts now."""
        if validation is not None:
            fields = dict(fields) | self._validated(iteration, validation)
        self._write(iteration, fields)
        self.bar.update()
        self.started = time.perf_counter()

    def say(self, text: str) -> None:
        """One line on the console of the one rank that speaks."""
        if self.enabled:
            with self.bar.external_write_mode(file=sys.stdout):
                print(text, flush=True)

    def close(self) -> None:
        """Flush and release the files."""
        for sink in (self.file, self.events, self.bar):
            if sink is not None:
                sink.close()

    def _pace(self, iteration: int) -> dict[str, float]:
        seconds, samples = time.perf_counter() - self.started, self.run.global_batch_size
        tokens, ranks = samples * sample_length(self.run), self.mesh.grid.world
        return {
            "consumed samples": iteration * samples,
            "elapsed time per iteration (ms)": seconds * 1e3,
            "throughput per GPU (TFLOP/s/GPU)": self.flops / seconds / ranks / 1e12,
            "MFU": self.flops / seconds / ranks / self.peak,
            "tokens per second": tokens / seconds,
            "tokens per second per device": tokens / seconds / ranks,
            "samples per second": samples / seconds,
            "global batch size": samples,
        }

    def _validated(self, iteration: int, loss: float) -> dict[str, float]:
        perplexity = math.exp(min(loss, 20.0))  # Megatron's cap: an untrained model would overflow
        self.say(
            f" validation loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E}"
        )
        return {"validation lm loss": loss, "validation lm loss PPL": perplexity}

    def _write(self, iteration: int, fields: Fields) -> None:
        if self.file:
            print(json.dumps({"iteration": iteration, **fields} | _without_numbers(fields)), file=self.file)
        if self.events:
            for name, value in fields.items():
                if not isinstance(value, list):
                    self.events.add_scalar(name, value, iteration)


def _lines_until(path: Path, iteration: int) -> Iterator[str]:
    """The lines of a log up to `iteration`; one that a killed process left unfinished is none."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["iteration"] <= iteration:
                yield line
        except (json.JSONDecodeError, KeyError, TypeError):
            continue


def _without_numbers(fields: Fields) -> dict[str, None]:
    """What is not finite, as JSON says it."""
    return {name: None for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)}
