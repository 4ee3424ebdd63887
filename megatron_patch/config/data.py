"""What a run reads."""

from dataclasses import dataclass

from megatron_patch.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Datasets, the tokenizer they need, and how samples are cut from them."""

    train_data_path: tuple[str, ...] = setting(
        "one prefix, or `weight prefix weight prefix …`; raw: files, directories or patterns"
    )
    valid_data_path: tuple[str, ...] = setting("the same for validation; equal to training: --split divides it")
    dataset: str = setting(
        "MMAP: .bin/.idx prefixes; MMAP-SFT: those of fine-tuning samples; JSON-SFT: raw instruction records",
        "MMAP",
        choices=("MMAP", "MMAP-SFT", "JSON-SFT"),
    )
    is_instruction_dataset: bool = setting(
        "the prefixes are of ModelLink's instruction data: <prefix>_packed_{input_ids,attention_mask,labels}_document",
        False,
    )
    split: str = setting("train,valid,test shares of a dataset used for both training and validation", "99,1,0")
    seq_length: int = setting("tokens per sample")
    max_padding_length: int = setting("tokens per sample of a raw fine-tuning record, padding included")
    sft_packing: bool = setting("several records per fine-tuning sample; they do not see each other", False)
    dataloader_type: str = setting(
        "order of .bin/.idx samples: single (as shuffled for the run), cyclic (shuffled anew each pass)",
        "single",
        choices=("single", "cyclic"),
    )
    reset_attention_mask: bool = setting(
        "documents of a .bin/.idx sample do not see each other, and positions restart with each", False
    )
    reset_position_ids: bool = setting("the same as --reset-attention-mask: neither is done without the other", False)
    eod_mask_loss: bool = setting("nothing is learned from what follows the end of a document", False)
    tokenizer_model: str | None = setting("tokenizer directory; absent: the checkpoint's own", None)
    trust_remote_code: bool = setting("let the tokenizer directory run its own Python code", False)
    prompt_type: str | None = setting("template of raw records; absent: the tokenizer's, else the family's", None)
    map_keys: str | None = setting(
        "JSON object: which keys of raw records hold prompt, query, response, system or messages", None
    )
    show_samples: int = setting("raw records printed at the start as they are tokenised, what is learned in colour", 0)
    data_cache_path: str | None = setting("where indices and tokenised records are cached; absent: nowhere", None)
    seed: int = setting("seed of sample order and random initialisation", 1234)
