"""The starting checkpoint: a tiny, randomly initialised MistralForCausalLM, written by transformers as safetensors."""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "sliding_window": 128,  # shorter than the training sequence, so that it matters
    "rms_norm_eps": 1e-5,
}


def build(vocabulary: int, bos: int, eos: int) -> MistralForCausalLM:
    """A model of SHAPE in float32; the same weights on every call."""
    torch.manual_seed(1234)
    config = MistralConfig(
        **SHAPE, vocab_size=vocabulary, bos_token_id=bos, eos_token_id=eos, tie_word_embeddings=False
    )
    return MistralForCausalLM(config).float()


def main() -> None:
    """Write the model and its tokenizer into one directory."""
    reader = argparse.ArgumentParser(prog="python3 -m examples.quickstart.start_model", description=__doc__)
    reader.add_argument("tokenizer", type=Path, help="tokenizer directory, copied beside the weights")
    reader.add_argument("directory", type=Path, help="becomes a Hugging Face checkpoint directory")
    arguments = reader.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    model = build(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    model.save_pretrained(arguments.directory)
    for file in arguments.tokenizer.iterdir():
        shutil.copy(file, arguments.directory)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {arguments.directory}")


if __name__ == "__main__":
    main()
