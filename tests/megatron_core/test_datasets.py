"""Random corpora, seeds, splits and blends: our samples are those of Megatron-Core's own datasets.

`MP_DATASET_EXAMPLES=2000` tries more of them than the suite does.
"""

import json
import os
import selectors
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from megatron_patch.config.data import DataConfig
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.pretraining import open_indexed

READER = Path(__file__).with_name("dataset_reader.py")
EXAMPLES = int(os.environ.get("MP_DATASET_EXAMPLES", "60"))
EOD, SEED_LIMIT, TIMEOUT, ITEMS = 3, 2**32 - 1, 30, 40


@dataclass(frozen=True)
class Corpus:
    """How random documents are drawn: a third of them may be empty."""

    documents: int
    longest: int
    seed: int

    def lengths(self):
        generator = np.random.RandomState(self.seed)
        return generator.randint(0, self.longest + 1, self.documents) * (generator.rand(self.documents) > 0.2)

    def write(self, prefix):
        lengths = self.lengths()
        tokens = np.random.RandomState(self.seed + 1).randint(0, 9, lengths.sum())
        with IndexedDatasetBuilder(prefix, "uint16") as builder:
            builder.add(tokens, lengths, [1] * len(lengths))


corpora = st.builds(Corpus, st.integers(1, 60), st.integers(1, 40), st.integers(0, 999))
weights = st.one_of(st.integers(1, 100).map(float), st.floats(1e-3, 1.0))
# Nothing for the test split: Megatron-Core builds that too, and never ends where it holds no token.
shares = st.sampled_from(["99,1,0", "80,20", "50/50", "0.7, 0.3", "969,31,0"])


@st.composite
def blends(draw):
    """Corpora and their weights; None: not weighted."""
    parts = draw(st.lists(corpora, min_size=1, max_size=4))
    return parts, draw(st.one_of(st.none(), st.lists(weights, min_size=len(parts), max_size=len(parts))))


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """Ask one process of Megatron-Core: a request in, an answer out."""
    log = (tmp_path_factory.mktemp("megatron") / "stderr").open("w+")
    process = subprocess.Popen(
        [sys.executable, str(READER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)

    def ask(request):
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        if not selector.select(TIMEOUT):
            process.kill()  # so that hypothesis does not wait for every smaller example
            pytest.fail(f"no answer after {TIMEOUT} s to {request}")
        return json.loads(process.stdout.readline() or "null") or pytest.fail(Path(log.name).read_text()[-2000:])

    yield ask
    process.kill()
    process.wait()


def ours(config, sizes):
    """What `dataset_reader.py` answers, of our datasets."""
    splits = []
    for name, size in zip(("train", "valid"), sizes, strict=True):
        dataset, _ = open_indexed(config, name, size, EOD)
        numbers = [*range(min(ITEMS, len(dataset))), len(dataset) - 1]
        splits.append({"len": len(dataset), "items": [[number, *parts(dataset[number])] for number in numbers]})
    return splits


def parts(sample):
    starts = np.zeros_like(sample.tokens) if sample.starts is None else sample.starts
    positions = np.arange(len(starts)) - starts
    return [part.tolist() for part in (sample.tokens, sample.labels, sample.loss_mask, starts, positions)]


def words(prefixes, weights):
    """As a user writes them."""
    if weights is None:
        return tuple(prefixes)
    return tuple(word for pair in zip(map(repr, weights), prefixes, strict=True) for word in pair)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    blend=blends(),
    split=shares,
    sizes=st.tuples(st.integers(1, 400), st.integers(1, 40)),
    seq_length=st.integers(2, 24),
    seed=st.integers(0, SEED_LIMIT),
    has_own_validation=st.booleans(),
    apart=st.booleans(),
    masked=st.booleans(),
)
def test_samples_are_megatrons(
    megatron, tmp_path_factory, blend, split, sizes, seq_length, seed, has_own_validation, apart, masked
):
    directory = tmp_path_factory.mktemp(uuid.uuid4().hex[:8])
    corpora, weights = blend
    prefixes = [str(directory / str(number)) for number in range(len(corpora))]
    for corpus, prefix in zip(corpora, prefixes, strict=True):
        corpus.write(prefix)
    blend = [prefixes, weights]
    valid = [prefixes[-1:], weights and weights[-1:]] if has_own_validation else None
    assume(valid != blend)
    config = DataConfig(
        train_data_path=words(*blend),
        valid_data_path=words(*(valid or blend)),
        split=split,
        seq_length=seq_length,
        max_padding_length=seq_length,
        seed=seed,
        reset_attention_mask=apart,
        eod_mask_loss=masked,
    )
    try:
        mine = ours(config, sizes)
    except ValueError as error:  # too little data, on which Megatron-Core would loop for ever or divide by zero
        event(str(error)[:7])
        assume(False)
    request = {"blend": blend, "valid": valid, "split": split, "sizes": sizes, "seq_length": seq_length, "seed": seed}
    reply = megatron(request | {"apart": apart, "masked": masked, "eod": EOD, "items": ITEMS})
    assert "error" not in reply, reply["error"]
    for one, other in zip(mine, reply["splits"], strict=True):
        assert one == other
