"""Megatron-Core's own datasets, asked over a pipe: one JSON request per line of stdin, one JSON answer per line.

It imports nothing of megatron_patch. A request is `blend` (prefixes, and weights or null), `valid` (the same, where
validation has data of its own) or `split`, `sizes` of train and valid, `seq_length`, `seed`, `eod`, and whether
documents are `apart` and ends `masked`. The answer has, for each split that is not empty, its length and its first
`items` samples and its last; or `error`.
"""

import json
import os
import sys
from types import SimpleNamespace

os.environ["TORCHDYNAMO_DISABLE"] = "1"


def answer(request: dict) -> list:
    """Both splits as Megatron-Core builds them; caches are off, because they ignore what files contain."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=request["seed"],
        sequence_length=request["seq_length"],
        **paths(request),
        path_to_cache="",
        tokenizer=SimpleNamespace(eod=request["eod"], pad=-1, vocab_size=None, unique_identifiers={}),
        reset_position_ids=request["apart"],
        reset_attention_mask=request["apart"],
        eod_mask_loss=request["masked"],
    )
    built = BlendedMegatronDatasetBuilder(GPTDataset, [*request["sizes"], 0], lambda: True, config).build()
    return [dataset and described(dataset, request["items"]) for dataset in built[:2]]


def paths(request: dict) -> dict:
    """One blend that is divided, or one of its own for each split."""
    if request["valid"] is None:
        return {"blend": tuple(request["blend"]), "split": request["split"]}
    return {"blend_per_split": [tuple(request["blend"]), tuple(request["valid"]), None]}


def described(dataset, items: int) -> dict:
    """The first samples of a dataset, and its last."""
    numbers = [*range(min(items, len(dataset))), len(dataset) - 1]
    samples = [dataset[number] for number in numbers]
    return {
        "len": len(dataset),
        "items": [[number, *parts(sample)] for number, sample in zip(numbers, samples, strict=True)],
    }


def parts(sample: dict) -> list:
    """Tokens, labels, loss mask; the first position that each token sees; positions."""
    visible = ~sample["attention_mask"][0]
    tensors = (sample["tokens"], sample["labels"], sample["loss_mask"], visible.int().argmax(1), sample["position_ids"])
    return [tensor.tolist() for tensor in tensors]


def main() -> None:
    """Answer until stdin ends. Whatever Megatron-Core prints goes to stderr."""
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            reply = {"splits": answer(json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
