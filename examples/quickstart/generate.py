"""A few lines written by a checkpoint directory, through transformers alone."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("def read(self, size=-1):\n", "import os\n", "class Error(Exception):\n")


@torch.no_grad()
def complete(directory: Path, prompt: str, new_tokens: int) -> str:
    """`prompt` and what the model finds most likely after it."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    written = model.generate(**tokens, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def main() -> None:
    """Print one continuation per prompt."""
    reader = argparse.ArgumentParser(prog="python3 -m examples.quickstart.generate", description=__doc__)
    reader.add_argument("checkpoint", type=Path, help="Hugging Face checkpoint directory")
    checkpoint = reader.parse_args().checkpoint
    for prompt in PROMPTS:
        print(complete(checkpoint, prompt, new_tokens=40).rstrip() + "\n")


if __name__ == "__main__":
    main()
