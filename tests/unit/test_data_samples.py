"""Sample order of pre-training data, against vectors computed by Megatron-Core."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.data.blend import BlendedDataset, blended
from megatron_patch.data.blend_order import blend_indices
from megatron_patch.data.gpt import GPTDataset, build_indices
from megatron_patch.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megatron_patch.data.paths import Source, parse_blend
from megatron_patch.data.splits import SPLITS, parse_split, split_range

ORDERS = json.loads((Path(__file__).parents[1] / "golden" / "sample_orders.json").read_text())["orders"]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "index.json").read_text())


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Prefixes of the golden corpora, by name."""
    directory = tmp_path_factory.mktemp("corpora")
    for name, documents in GOLDEN["corpora"].items():
        with IndexedDatasetBuilder(directory / name, "uint16") as builder:
            for document in documents:
                builder.add(document, [len(document)], [1])
    return {name: str(directory / name) for name in GOLDEN["corpora"]}


def maker(case, split):
    def make(prefix, count):
        indexed = IndexedDataset(prefix)
        bounds = split_range(case["split"], split, len(indexed))
        return GPTDataset(indexed, bounds, count, seq_length=case["seq_length"], seed=case["seed"])

    return make


def cases(kind):
    """Every split that a golden case has a result for."""
    return [
        pytest.param(case, split, id=f"{' '.join(case['blend'])}-{case['split']}-{case['sizes']}-{split}")
        for case in GOLDEN[kind]
        for split in SPLITS
        if case["result"][split]
    ]


@pytest.mark.parametrize(("case", "split"), cases("gpt"))
def test_one_dataset_is_drawn_as_megatron_draws_it(case, split, corpora):
    wanted = case["result"][split]
    dataset = maker(case, split)(corpora["A"], case["sizes"][SPLITS.index(split)])
    assert len(dataset) == wanted["len"]
    assert dataset.indices.documents.tolist() == wanted["document_index"]
    assert dataset.indices.samples.tolist() == wanted["sample_index"]
    assert dataset.indices.shuffle.tolist() == wanted["shuffle_index"]
    first = dataset[0]
    assert first.tokens.tolist() == wanted["first_sample_tokens"]
    assert first.labels.tolist() == wanted["first_sample_labels"]
    assert first.loss_mask.tolist() == [1.0] * case["seq_length"]


def digest(index):
    return hashlib.sha256(index.astype("<i8").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("case", ORDERS, ids=lambda case: f"{case['documents']}-{case['num_samples']}")
def test_empty_documents_and_last_epochs_are_ordered_as_megatron_orders_them(case):
    lengths = np.random.RandomState(case["lengths_seed"]).randint(0, case["longest"], case["documents"])
    lengths[::5] = 0
    order = {name: case[name] for name in ("num_samples", "seq_length", "seed")}
    indices = build_indices(lengths.astype(np.int32), np.arange(len(lengths), dtype=np.int32), **order)
    assert len(indices.shuffle) == case["len"]
    assert digest(indices.documents) == case["document_index"]
    assert digest(indices.samples) == case["sample_index"]
    assert digest(indices.shuffle) == case["shuffle_index"]


@pytest.mark.parametrize(("case", "split"), cases("blend"))
def test_a_blend_is_drawn_as_megatron_draws_it(case, split, corpora):
    wanted = case["result"][split]
    built = []

    def make(prefix, count):
        built.append(count)
        return maker(case, split)(prefix, count)

    sources = parse_blend([corpora.get(word, word) for word in case["blend"]])
    dataset = blended(sources, make, case["sizes"][SPLITS.index(split)])
    assert built == wanted["mid_level_num_samples"]
    assert [len(part) for part in dataset.datasets] == wanted["mid_level_lens"]
    assert dataset.dataset_index.tolist() == wanted["dataset_index"]
    assert dataset.sample_index.tolist() == wanted["dataset_sample_index"]
    assert len(dataset) == wanted["len"]
    assert dataset[0].tokens.tolist() == wanted["first_sample_tokens"]


@pytest.mark.parametrize("case", GOLDEN["blending_indices"], ids=lambda case: str(case["weights"]))
def test_blend_order_is_megatrons(case):
    weights = np.array(case["weights"], np.float64) / sum(case["weights"])
    datasets, samples = blend_indices(weights, case["size"])
    assert datasets.tolist() == case["dataset_index"] and datasets.dtype == np.int16
    assert samples.tolist() == case["dataset_sample_index"]


@pytest.mark.parametrize("text", GOLDEN["splits"])
def test_split_strings_are_megatrons(text):
    wanted = GOLDEN["splits"][text]
    assert list(parse_split(text)) == wanted["vector"]
    for name, share in zip(SPLITS, wanted["matrix"], strict=True):
        first, last = split_range(text, name, 1_000_003)
        assert (first, last) == tuple(round(bound * 1_000_003) for bound in share) if share else first == last


@pytest.mark.parametrize("text", ["-1,2", "a,b", "", "0,0", "1,2,3,4", "1e400", "nan,1"])
def test_a_split_that_means_nothing_is_refused(text):
    with pytest.raises(ValueError, match=f"split {re.escape(repr(text))}"):
        parse_split(text)


def test_samples_are_a_walk_over_the_documents(tmp_path):
    """Known by construction: with tokens numbered along the shuffled stream, sample j starts at token j·S."""
    lengths = np.random.RandomState(3).randint(0, 9, size=60)
    with IndexedDatasetBuilder(tmp_path / "x", "int32") as builder:
        builder.add(np.arange(lengths.sum()), lengths, np.ones(60, int))
    indexed = IndexedDataset(tmp_path / "x")
    dataset = GPTDataset(indexed, (0, 60), 150, seq_length=4, seed=5)
    stream = np.concatenate([indexed[i] for i in dataset.indices.documents])
    for number, position in enumerate(dataset.indices.shuffle.tolist()):
        sample = dataset[number]
        assert sample.tokens.tolist() == stream[position * 4 :][:4].tolist()
        assert sample.labels.tolist() == stream[position * 4 + 1 :][:4].tolist()


def test_changing_one_loss_mask_changes_no_other(corpora):
    dataset = GPTDataset(IndexedDataset(corpora["A"]), (0, 10), None, seq_length=8, seed=1)
    dataset[0].loss_mask[:] = 0
    assert dataset[1].loss_mask.all() and dataset[0].loss_mask.all()


@pytest.mark.parametrize("bounds", [(4, 4), (0, 2)])
def test_too_little_data_is_refused_instead_of_searched_forever(bounds, tmp_path):
    with IndexedDatasetBuilder(tmp_path / "x", "int32") as builder:
        builder.add([1, 2, 3], [0, 0, 3, 0], [1, 1, 1, 1])
    with pytest.raises(ValueError, match="hold 0 tokens, which is too little"):
        GPTDataset(IndexedDataset(tmp_path / "x"), bounds, 5, seq_length=4, seed=1)


def test_one_epoch_shorter_than_a_sample_is_refused(corpora):
    with pytest.raises(ValueError, match="hold 52 tokens, which is too little for a sample of seq_length 52"):
        GPTDataset(IndexedDataset(corpora["A"]), (0, 10), None, seq_length=52, seed=1)


def test_an_unweighted_blend_that_is_too_small_says_how_to_repeat_it(corpora):
    case = {"split": "1", "seq_length": 8, "seed": 1}
    with pytest.raises(ValueError, match=r"hold 8 samples and 9 are needed; .*give weights"):
        blended([Source(corpora["A"]), Source(corpora["B"])], maker(case, "train"), 9)


def test_an_overdrawn_dataset_is_named():
    class Short(list):
        pass

    with pytest.raises(ValueError, match="dataset 'b': the blend draws 5 samples from 1"):
        blended(
            [Source("a", 1.0), Source("b", 1.0)], lambda prefix, count: Short(" " * (9 if prefix == "a" else 1)), 10
        )


def test_one_weighted_source_is_a_blend(corpora):
    case = {"split": "1", "seq_length": 8, "seed": 1}
    assert isinstance(blended([Source(corpora["A"], 0.3)], maker(case, "train"), 9), BlendedDataset)
