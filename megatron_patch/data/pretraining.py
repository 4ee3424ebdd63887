"""Pre-training data as a run's settings describe it: blends of `.bin/.idx` prefixes, their split and their order."""

from megatron_patch.config.data import DataConfig
from megatron_patch.data.blend import SampleDataset, blended
from megatron_patch.data.gpt import Documents, GPTDataset
from megatron_patch.data.indexed import IndexedDataset
from megatron_patch.data.order import Order, in_turn, shuffled, usable
from megatron_patch.data.paths import Source, parse_blend
from megatron_patch.data.sidecar import check_made_for


def open_indexed(config: DataConfig, split: str, num_samples: int, eod: int | None) -> tuple[SampleDataset, Order]:
    """At least `num_samples` samples of a split, `train` or `valid`, and the order they are read in.

    `eod` is the token that ends documents; None where nobody knows it. Raises ValueError or FileNotFoundError for
    datasets that cannot be used, and when a setting needs the token.
    """
    paths = config.train_data_path if split == "train" else config.valid_data_path
    documents = _documents(config, eod)

    def make(prefix: str, count: int | None) -> GPTDataset:
        check_made_for(prefix, None)
        indexed = IndexedDataset(prefix)
        return GPTDataset(
            indexed,
            usable(config, prefix, split, len(indexed)),
            count,
            seq_length=config.seq_length,
            seed=config.seed,
            cache_path=config.data_cache_path,
            documents=documents,
        )

    sources = parse_blend(paths)
    if config.train_data_path != config.valid_data_path and len(sources) == 1:
        sources = [Source(sources[0].prefix)]  # Megatron blends a single weighted dataset only where it divides it
    dataset = blended(sources, make, num_samples, config.data_cache_path)
    is_cyclic = config.dataloader_type == "cyclic" and split == "train"
    return dataset, shuffled(0, len(dataset), config.seed) if is_cyclic else in_turn


def _documents(config: DataConfig, eod: int | None) -> Documents | None:
    are_apart = config.reset_attention_mask or config.reset_position_ids
    if not (are_apart or config.eod_mask_loss):
        return None
    if eod is None:
        raise ValueError(
            "--reset-attention-mask, --reset-position-ids and --eod-mask-loss need to know where documents end, but "
            "the tokenizer has no end-of-text token; leave them out, or use a tokenizer that has one"
        )
    return Documents(eod, are_apart, config.eod_mask_loss)
