"""A few lines written by a checkpoint directory, through transformers alone."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart.instructions import INSTRUCTION
from megatron_patch.data.prompts import PROMPTS, ask

QUESTIONS = ("def read(self, size=-1):\nRead and return", "def is_valid(name):\nReturn True if")
SOURCE = "class Error(Exception):\n"


def prompts() -> list[str]:
    """Questions as fine-tuning asked them, and the beginning of a source file as pre-training saw it."""
    questions = [ask(PROMPTS["mistral"], INSTRUCTION, question) for question in QUESTIONS]
    return [*questions, SOURCE]


@torch.no_grad()
def complete(directory: Path, prompts: list[str], new_tokens: int) -> list[str]:
    """Each prompt and what the model writes after it; the same on every call."""
    torch.manual_seed(1234)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    written = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")  # with BOS, as fine-tuning tokenised its records
        ids = model.generate(
            **tokens,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            pad_token_id=tokenizer.eos_token_id,
        )
        written.append(tokenizer.decode(ids[0], skip_special_tokens=True).rstrip())
    return written


def main() -> None:
    """Print the continuations and write them to a file."""
    reader = argparse.ArgumentParser(prog="python3 -m examples.quickstart.generate", description=__doc__)
    reader.add_argument("checkpoint", type=Path, help="Hugging Face checkpoint directory")
    reader.add_argument("file", type=Path, help="receives the text")
    arguments = reader.parse_args()
    text = "\n\n".join(complete(arguments.checkpoint, prompts(), new_tokens=40))
    arguments.file.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
