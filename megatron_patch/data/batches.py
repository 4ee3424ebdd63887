"""What training consumes: micro-batches of one data-parallel rank, dealt as Megatron deals them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_patch.config.data import DataConfig
from megatron_patch.data.blend import SampleDataset
from megatron_patch.data.gpt import Sample
from megatron_patch.data.instruction_index import open_instructions
from megatron_patch.data.order import Order, in_turn
from megatron_patch.data.pretraining import open_indexed
from megatron_patch.data.raw import open_records
from megatron_patch.data.sft_index import open_samples
from megatron_patch.data.tokenizer import vocabulary_size


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens int64 [B, S], labels int64 [B, S] already shifted, loss_mask float32 [B, S].

    Labels are valid ids everywhere, masked ones too. Packed rows hold several segments that do not see each other:
    `starts`, int64 [B, S], is for each token the position of its segment's first one. Without it a row is one segment.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    starts: Tensor | None = None


@dataclass(frozen=True)
class Deal:
    """Which global samples one data-parallel rank sees. Raises ValueError when the sizes do not divide."""

    global_batch_size: int
    micro_batch_size: int
    rank: int
    size: int

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.size):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} × data-parallel size {self.size}"
            )

    def positions(self, step: int) -> Iterator[range]:
        """This rank's global sample positions of a step, one range per micro-batch.

        Every block of micro_batch_size × size consecutive samples is dealt to the ranks in slices.
        """
        begin = step * self.global_batch_size
        first = begin + self.rank * self.micro_batch_size
        for start in range(first, begin + self.global_batch_size, self.micro_batch_size * self.size):
            yield range(start, start + self.micro_batch_size)


@dataclass(frozen=True)
class Batches:
    """One list of micro-batches per step of `steps`; iterating again gives the same ones."""

    dataset: SampleDataset
    order: Order
    deal: Deal
    steps: range
    vocabulary: int

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Batch]]:
        for step in self.steps:
            yield [self._batch(positions) for positions in self.deal.positions(step)]

    def _batch(self, positions: Sequence[int]) -> Batch:
        samples = [self.dataset[self.order(position)] for position in positions]
        tokens, labels, loss_mask = (np.stack(part) for part in zip(*(sample[:3] for sample in samples), strict=True))
        highest = max(int(tokens.max()), int(labels.max()))
        lowest = min(int(tokens.min()), int(labels.min()))
        if highest >= self.vocabulary or lowest < 0:
            raise ValueError(
                f"the dataset holds token {lowest if lowest < 0 else highest}, but the tokenizer's ids are 0 to "
                f"{self.vocabulary - 1}; preprocess the data with the tokenizer that belongs to this model"
            )
        return Batch(*map(torch.from_numpy, (tokens, labels, loss_mask)), _starts(samples))


def _starts(samples: Sequence[Sample]) -> Tensor | None:
    """Those of a batch; None where every row is one segment."""
    if all(sample.starts is None for sample in samples):
        return None
    rows = [np.zeros_like(sample.tokens) if sample.starts is None else sample.starts for sample in samples]
    return torch.from_numpy(np.stack(rows))


def training_batches(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    family_prompt: str,
    train_iters: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    size: int,
    start_iteration: int = 0,
    is_loud: bool = True,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of every step from `start_iteration` to `train_iters`, one list per step.

    `family_prompt` names the template of raw records when neither the user nor the tokenizer brings one. `is_loud`: say
    what is left out or cut, which one rank of a run should. Raises ValueError or FileNotFoundError, at once rather than
    at the first batch, for data that cannot be used.
    """
    deal = Deal(global_batch_size, micro_batch_size, rank, size)
    source = _open(config, tokenizer, "train", train_iters * global_batch_size, family_prompt, is_loud=is_loud)
    return iter(Batches(*source, deal, range(start_iteration, train_iters), vocabulary_size(tokenizer)))


def validation_batches(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    family_prompt: str,
    eval_iters: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    size: int,
    is_loud: bool = True,
) -> Batches:
    """This rank's micro-batches of `eval_iters` global batches: the same at every iteration over them, so that the
    points of a validation curve can be compared.

    Small data repeats: indexed data by epochs, records from the first one on. Raises as `training_batches` does.
    """
    deal = Deal(global_batch_size, micro_batch_size, rank, size)
    source = _open(config, tokenizer, "valid", eval_iters * global_batch_size, family_prompt, is_loud=is_loud)
    return Batches(*source, deal, range(eval_iters), vocabulary_size(tokenizer))


def _open(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    num_samples: int,
    family_prompt: str,
    *,
    is_loud: bool,
) -> tuple[SampleDataset, Order]:
    if config.is_instruction_dataset:
        return open_instructions(config, tokenizer, split, num_samples, is_loud=is_loud), in_turn
    if config.dataset == "MMAP":
        return open_indexed(config, split, num_samples, tokenizer.eos_token_id)
    if config.dataset == "MMAP-SFT":
        return open_samples(config, split, num_samples, tokenizer.eos_token_id), in_turn
    return open_records(config, tokenizer, split, family_prompt, is_loud=is_loud)


def without_effect(config: DataConfig) -> list[str]:
    """A sentence for each setting that this kind of data does not heed."""
    if config.dataloader_type == "single" or (config.dataset == "MMAP" and not config.is_instruction_dataset):
        return []
    name = f"--dataloader-type {config.dataloader_type}"
    return [f"{name} has no effect in fine-tuning: every pass over its samples has an order of its own"]
