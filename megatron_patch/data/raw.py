"""Raw fine-tuning records as a run's settings describe them: template, split, order, packed or not."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerFast

from megatron_patch.config.data import DataConfig
from megatron_patch.data.blend import SampleDataset
from megatron_patch.data.chat_template import resolve_renderer
from megatron_patch.data.instructions import InstructionDataset, Material, material_of, tokenised
from megatron_patch.data.order import Order, repeated, shuffled, usable
from megatron_patch.data.packing import PackedDataset
from megatron_patch.data.records import resolve_names
from megatron_patch.data.show import shown


def open_records(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, split: str, family_prompt: str, *, is_loud: bool
) -> tuple[SampleDataset, Order]:
    """The samples of a split, `train` or `valid`, and the order they are read in.

    `is_loud`: say how many records were left out. Raises ValueError or FileNotFoundError for data that cannot be used.
    """
    words = config.train_data_path if split == "train" else config.valid_data_path
    name = " ".join(words)
    dataset = InstructionDataset(
        _material(config, words, tokenizer, family_prompt),
        length=config.max_padding_length,
        cache_path=config.data_cache_path,
    )
    is_told = split == "valid" and words == config.train_data_path
    if dataset.skipped and is_loud and not is_told:
        logging.getLogger(__name__).warning(
            "%s: %d of %d records left out, their prompts alone are longer than %d tokens",
            name, dataset.skipped, dataset.skipped + len(dataset), config.max_padding_length,
        )  # fmt: skip
    first, last = usable(config, name, split, len(dataset))
    if config.sft_packing:
        numbers = np.arange(first, last)
        if split == "train":  # neighbours in the file should not always meet
            np.random.default_rng(config.seed).shuffle(numbers)
        dataset = PackedDataset(dataset, numbers)
        first, last = 0, len(dataset)
    return dataset, shuffled(first, last, config.seed) if split == "train" else repeated(first, last)


def record_texts(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, family_prompt: str, *, is_terminal: bool
) -> Iterator[str]:
    """The first `config.show_samples` training records as they are tokenised, what is learned highlighted."""
    if config.show_samples:
        material = _material(config, config.train_data_path, tokenizer, family_prompt)
        for item in islice(tokenised(material), config.show_samples):
            yield shown(item.records[0], tokenizer, is_terminal=is_terminal)


def _material(
    config: DataConfig, words: Sequence[str], tokenizer: PreTrainedTokenizerFast, family_prompt: str
) -> Material:
    renderer = resolve_renderer(config.prompt_type, tokenizer, family_prompt)
    return material_of(words, tokenizer, renderer, resolve_names(config.map_keys))
