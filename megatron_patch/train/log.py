"""What a run says about itself: the console line, TensorBoard events and one JSON line per iteration, same names."""

import json
import math
import time
from pathlib import Path

from megatron_patch.config.run import RunConfig
from megatron_patch.train.step import StepResult

# Console format of each field, in order; the names are Megatron's.
FORMATS = {
    "consumed samples": "{:12d}",
    "elapsed time per iteration (ms)": "{:.1f}",
    "tokens per second": "{:.0f}",
    "learning rate": "{:.6E}",
    "global batch size": "{:5d}",
    "lm loss": "{:.6E}",
    "grad norm": "{:.3f}",
}


class Log:
    """Open for the length of a run. Only the rank with `enabled` writes; the others may call it all the same."""

    def __init__(self, run: RunConfig, *, enabled: bool):
        self.run, self.enabled = run, enabled
        self.file = self.events = None
        if enabled and run.log_file:
            Path(run.log_file).parent.mkdir(parents=True, exist_ok=True)
            self.file = Path(run.log_file).open("w", encoding="utf-8", buffering=1)  # noqa: SIM115
        if enabled and run.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and one rank needs it

            self.events = SummaryWriter(run.tensorboard_dir)
        self.started = time.perf_counter()

    def before_training(self, validation: float) -> None:
        """The start weights' validation loss, as iteration 0."""
        self._write(0, self._validated(0, validation))
        self.started = time.perf_counter()

    def iteration(self, iteration: int, result: StepResult, rate: float) -> dict[str, float]:
        """Time and print one finished step; returns its fields for `finish`."""
        seconds = time.perf_counter() - self.started
        samples = self.run.global_batch_size
        fields = {
            "consumed samples": iteration * samples,
            "elapsed time per iteration (ms)": seconds * 1e3,
            "tokens per second": samples * self._sample_length() / seconds,
            "learning rate": rate,
            "global batch size": samples,
            "lm loss": result.loss,
            "grad norm": result.gradient_norm,
        }
        if iteration % self.run.log_interval == 0:
            shown = " | ".join(f"{name}: {FORMATS[name].format(value)}" for name, value in fields.items())
            self.say(f" iteration {iteration:8d}/{self.run.train_iters:8d} | {shown} |")
        return fields

    def finish(self, iteration: int, fields: dict[str, float], validation: float | None) -> None:
        """Write the iteration's line once its validation loss, if one is due, is known; the next step starts now."""
        if validation is not None:
            fields = fields | self._validated(iteration, validation)
        self._write(iteration, fields)
        self.started = time.perf_counter()

    def say(self, text: str) -> None:
        """One line on the console of the one rank that speaks."""
        if self.enabled:
            print(text, flush=True)

    def close(self) -> None:
        """Flush and release the files."""
        for sink in (self.file, self.events):
            if sink:
                sink.close()

    def _validated(self, iteration: int, loss: float) -> dict[str, float]:
        perplexity = math.exp(min(loss, 20.0))  # Megatron's cap: an untrained model would overflow
        self.say(
            f" validation loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E}"
        )
        return {"validation lm loss": loss, "validation lm loss PPL": perplexity}

    def _write(self, iteration: int, fields: dict[str, float]) -> None:
        if self.file:
            print(json.dumps({"iteration": iteration, **fields}), file=self.file)
        if self.events:
            for name, value in fields.items():
                self.events.add_scalar(name, value, iteration)

    def _sample_length(self) -> int:
        data = self.run.data
        return data.max_padding_length if data.dataset == "JSON-SFT" else data.seq_length
