"""Megatron-Core's own indexed dataset: `indexed_reader.py PREFIX…` prints each one's token type, sequences and document
boundaries as one JSON list. It imports nothing of megatron_patch."""

import json
import os
import sys

os.environ["TORCHDYNAMO_DISABLE"] = "1"


def described(prefix: str) -> dict:
    """One dataset, whole."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return {
        "dtype": dataset[0].dtype.name,
        "sequences": [dataset[number].tolist() for number in range(len(dataset))],
        "documents": dataset.document_indices.tolist(),
    }


if __name__ == "__main__":
    replies, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps([described(prefix) for prefix in sys.argv[1:]]), file=replies)
