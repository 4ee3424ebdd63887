"""Fine-tuning samples in `.bin/.idx`: Pai-Megatron-Patch's documents, and what training makes of them."""

import gzip
import json
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_patch.config.data import DataConfig
from megatron_patch.data.batches import training_batches, validation_batches, without_effect
from megatron_patch.data.gpt import segment_starts
from megatron_patch.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megatron_patch.data.instructions import Tokenised
from megatron_patch.data.preprocess_sft import main
from megatron_patch.data.sft_index import IndexedInstructions, document
from megatron_patch.data.tokenizer import load_tokenizer

LENGTH = 80
QUESTIONS = [(f"n{number}", "yes " * (number % 5) + f"n{number}") for number in range(12)]
SIZES = {"family_prompt": "mistral", "global_batch_size": 4, "micro_batch_size": 2}
ALONE = {"rank": 0, "size": 1}


@pytest.fixture
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


@pytest.fixture
def build(tmp_path, tokenizer_directory, capsys):
    """Run the command on records; the prefix it wrote and what it printed."""

    def run(records, *options):
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        arguments = ["--input", str(tmp_path / "records.jsonl"), "--output-prefix", str(tmp_path / "data")]
        arguments += ["--tokenizer-model", str(tokenizer_directory), "--seq-length", str(LENGTH), "--workers", "1"]
        assert main([*arguments, "--family-prompt", "mistral", *options]) == 0
        return str(tmp_path / "data_text_document"), capsys.readouterr().out

    return run


def config_of(prefix, **changes):
    config = DataConfig(
        train_data_path=(prefix,),
        valid_data_path=(prefix,),
        split="50,50,0",
        dataset="MMAP-SFT",
        seq_length=LENGTH,
        max_padding_length=LENGTH,
    )
    return replace(config, **changes)


def records_of(questions=QUESTIONS):
    return [{"instruction": question, "output": answer} for question, answer in questions]


def ids_of(question, answer, tokenizer):
    """Prompt and answer as tokens, from two calls of the tokenizer."""
    prompt = tokenizer(f"[INST] {question} [/INST]").input_ids
    whole = tokenizer(f"[INST] {question} [/INST] {answer}</s>").input_ids
    assert whole[: len(prompt)] == prompt
    return prompt, whole[len(prompt) :]


def contracts_document(pairs, pad):
    """The document of these (prompt, answer) pairs, by the rule of the format's documents."""
    tokens, labels = [], []
    for prompt, answer in pairs:
        ids = prompt + answer
        tokens += [*ids[:-1], -1 - ids[-1]]
        labels += [-100] * (len(prompt) - 1) + answer + [-100]
    padding = LENGTH - len(tokens)
    return [*tokens, *[pad] * padding, *labels, *[-100] * padding]


def rows_of(steps):
    """Tokens, labels, mask and starts of every sample."""
    for step in steps:
        for batch in step:
            starts = [None] * len(batch.tokens) if batch.starts is None else batch.starts
            yield from zip(batch.tokens, batch.labels, batch.loss_mask, starts, strict=True)


def test_documents_are_those_of_the_format(build, tokenizer):
    prefix, _ = build(records_of())
    indexed = IndexedDataset(prefix)
    assert indexed[0].dtype == np.int32  # though the vocabulary would fit 16 bits
    pad = tokenizer.eos_token_id
    for number, (question, answer) in enumerate(QUESTIONS):
        assert indexed[number].tolist() == contracts_document([ids_of(question, answer, tokenizer)], pad)


def test_packed_documents_are_the_same_segments_in_fewer(build, tokenizer):
    prefix, out = build(records_of(), "--pack")
    indexed = IndexedDataset(prefix)
    alone = {tuple(ids_of(*pair, tokenizer)[0] + ids_of(*pair, tokenizer)[1]): pair for pair in QUESTIONS}
    seen = []
    for number in range(len(indexed)):
        stored = indexed[number][:LENGTH].tolist()
        pairs, segment = [], []
        for token in stored:
            segment.append(-1 - token if token < 0 else token)
            if token < 0:
                pairs.append(alone[tuple(segment)])
                segment = []
        assert indexed[number].tolist() == contracts_document(
            [ids_of(*pair, tokenizer) for pair in pairs], tokenizer.eos_token_id
        )
        seen += pairs
    assert sorted(seen) == sorted(QUESTIONS) and len(indexed) <= 8
    assert f"12 records in {len(indexed)} samples of {LENGTH} tokens" in out


def test_a_long_answer_is_cut_and_goes_on_in_its_last_label(build, tokenizer):
    prefix, out = build(
        [*records_of(), {"instruction": "q", "output": "word " * 99}, {"instruction": "x " * 99, "output": "a"}]
    )
    stored, labels = IndexedDataset(prefix)[12].reshape(2, LENGTH)
    prompt, answer = ids_of("q", "word " * 99, tokenizer)
    assert stored[-1] == -1 - (prompt + answer)[LENGTH - 1]
    assert labels.tolist() == ([-100] * (len(prompt) - 1) + answer)[:LENGTH]
    assert "1 records truncated; 1 left out" in out


@pytest.mark.parametrize("packing", [False, True])
def test_training_reads_tokens_labels_and_segments(build, tokenizer, packing):
    prefix, _ = build(records_of(), *["--pack"] * packing)
    config = config_of(prefix, valid_data_path=("elsewhere",), sft_packing=packing)
    for tokens, labels, mask, starts in rows_of(training_batches(config, tokenizer, train_iters=6, **SIZES, **ALONE)):
        assert tokens.min() >= 0 and labels.min() >= 0
        begins = sorted(set(starts.tolist()))
        for begin, end in zip(begins, [*begins[1:], LENGTH], strict=True):
            learned = mask[begin:end] > 0
            if not learned.any():
                assert end == LENGTH  # the padding
                continue
            question = tokenizer.decode(tokens[begin:end][: int(learned.nonzero()[0])]).split()[2]
            answer = dict(QUESTIONS)[question]
            prompt, wanted = ids_of(question, answer, tokenizer)
            assert labels[begin:end][learned].tolist() == wanted
            assert tokens[begin:end].tolist() == prompt + wanted
            assert learned.nonzero().flatten().tolist() == list(range(len(prompt) - 1, end - begin - 1))


def test_a_packed_file_keeps_its_segments_apart_without_being_told(build, tokenizer):
    prefix, _ = build(records_of(), "--pack")
    both = [
        list(rows_of(training_batches(config_of(prefix, sft_packing=told), tokenizer, train_iters=2, **SIZES, **ALONE)))
        for told in (False, True)
    ]
    for one, other in zip(*both, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert max(len(set(starts.tolist())) for *_, starts in both[0]) >= 3


@pytest.fixture
def unmarked(tmp_path, tokenizer):
    """Two segments and padding, one segment, as files of before the marks have them."""
    pairs = [ids_of(question, answer, tokenizer) for question, answer in QUESTIONS[:3]]
    with IndexedDatasetBuilder(tmp_path / "old", "int32") as builder:
        for group in (pairs[:2], pairs[2:]):
            numbers = np.array(contracts_document(group, tokenizer.eos_token_id))
            tokens = numbers[:LENGTH]
            numbers[:LENGTH] = np.where(tokens < 0, -1 - tokens, tokens)
            builder.add(numbers, [len(numbers)], [1])
    return str(tmp_path / "old"), [sum(map(len, pair)) for pair in pairs]


def samples(prefix, tokenizer, *, is_packed):
    return IndexedInstructions(
        prefix, lambda position: position, 2, seq_length=LENGTH, eos=tokenizer.eos_token_id, is_packed=is_packed
    )


def test_a_file_without_marks_is_one_segment_a_sample(unmarked, tokenizer):
    prefix, _ = unmarked
    dataset = samples(prefix, tokenizer, is_packed=False)
    assert not dataset.has_marks
    assert [dataset[number].starts for number in range(2)] == [None, None]
    answers = [len(ids_of(*pair, tokenizer)[1]) for pair in QUESTIONS[:3]]
    assert [dataset[number].loss_mask.sum() for number in range(2)] == [sum(answers[:2]), answers[2]]


def test_a_packed_file_without_marks_is_cut_after_eos_but_its_padding_is_not(unmarked, tokenizer):
    prefix, (first, second, third) = unmarked
    dataset = samples(prefix, tokenizer, is_packed=True)
    both = first + second
    assert dataset[0].starts.tolist() == [0] * first + [first] * second + [both] * (LENGTH - both)
    assert dataset[1].starts.tolist() == [0] * third + [third] * (LENGTH - third)


def test_segments_start_after_each_end():
    ends = np.array([False, True, True, False, False])
    assert segment_starts(ends).tolist() == [0, 0, 2, 3, 3]


def test_each_epoch_has_every_sample_once_and_continues_where_it_was(build, tokenizer):
    prefix, _ = build(records_of())
    config = config_of(prefix, valid_data_path=("elsewhere",))
    whole = [row[0].tolist() for row in rows_of(training_batches(config, tokenizer, train_iters=6, **SIZES, **ALONE))]
    assert sorted(whole[:12]) == sorted(whole[12:]) and whole[:12] != whole[12:]
    rest = rows_of(training_batches(config, tokenizer, train_iters=6, start_iteration=2, **SIZES, **ALONE))
    assert [row[0].tolist() for row in rest] == whole[8:]


def test_training_and_validation_share_no_sample(build, tokenizer):
    config = config_of(build(records_of())[0])
    train = {
        tuple(row[0].tolist()) for row in rows_of(training_batches(config, tokenizer, train_iters=4, **SIZES, **ALONE))
    }
    valid = {
        tuple(row[0].tolist()) for row in rows_of(validation_batches(config, tokenizer, eval_iters=4, **SIZES, **ALONE))
    }
    assert (len(train), len(valid), train & valid) == (6, 6, set())


def test_blends_are_of_samples_too(build, tokenizer, tmp_path):
    prefix, _ = build(records_of())
    config = config_of(prefix, train_data_path=("3", prefix, "1", prefix), valid_data_path=("elsewhere",))
    assert len(list(rows_of(training_batches(config, tokenizer, train_iters=5, **SIZES, **ALONE)))) == 20


@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [("uint16", 2 * LENGTH, "is of uint16"), ("int32", 64, f"of 2 × 32 numbers; with SEQ_LEN {LENGTH}")],
)
def test_a_pair_of_another_kind_or_length_is_refused(tmp_path, tokenizer, dtype, size, message):
    with IndexedDatasetBuilder(tmp_path / "other", dtype) as builder:
        builder.add(np.zeros(2 * size), [size] * 2, [1] * 2)
    config = config_of(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=message):
        training_batches(config, tokenizer, train_iters=1, **SIZES, **ALONE)


def test_a_sidecar_that_says_something_else_of_segments_is_named(build, tokenizer):
    prefix, _ = build(records_of())
    told = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps(told | {"segment_marks": False}))
    with pytest.raises(
        ValueError, match=r"does not mark where its segments end, but .*\.bin has marks; the files come"
    ):
        training_batches(config_of(prefix), tokenizer, train_iters=1, **SIZES, **ALONE)


def test_an_order_that_fine_tuning_has_anyway_is_said_to_have_no_effect(build):
    config = config_of("p", dataloader_type="cyclic")
    assert len(without_effect(config)) == len(without_effect(replace(config, dataset="JSON-SFT"))) == 1
    assert not without_effect(replace(config, dataset="MMAP"))
    assert not without_effect(replace(config, dataloader_type="single"))


def test_records_that_do_not_fit_are_refused():
    record = Tokenised(np.arange(50, dtype=np.int32), np.ones(50, bool))
    with pytest.raises(ValueError, match="records of 100 tokens do not fit in a sample of 80"):
        document([record, record], LENGTH, 0)


def test_the_sidecar_says_what_was_made(build, tokenizer):
    prefix, _ = build(records_of(), "--pack")
    told = json.loads(Path(f"{prefix}.json").read_text())
    assert (told["kind"], told["seq_length"], told["pack"], told["dtype"]) == ("fine-tuning", LENGTH, True, "int32")
    assert (told["documents"], told["records"]) == (len(IndexedDataset(prefix)), 12)


def test_shown_samples_highlight_what_is_learned(build):
    _, out = build(records_of(), "--show-samples", "2")
    assert out.startswith("<s> [INST] n0 [/INST]⟦ n0</s>⟧\n\n<s> [INST] n1 [/INST]⟦ yes n1</s>⟧\n\n")
    assert "n2" not in out


def command(tmp_path, tokenizer_directory, source, *options):
    arguments = ["--input", str(source), "--output-prefix", str(tmp_path / "data"), "--workers", "1"]
    arguments += ["--tokenizer-model", str(tokenizer_directory), "--seq-length", str(LENGTH)]
    return [*arguments, "--family-prompt", "mistral", *options]


def whole_of(pair, tokenizer):
    prompt, answer = ids_of(*pair, tokenizer)
    return prompt + answer


def segments_of(prefix):
    """The tokens of every segment of every sample, marks taken away."""
    samples = []
    for stored in (numbers[:LENGTH].tolist() for numbers in IndexedDataset(prefix)):
        ends = [place for place, token in enumerate(stored) if token < 0]
        begins = [0, *(end + 1 for end in ends)]
        samples.append([[*stored[a:b], -1 - stored[b]] for a, b in zip(begins, ends, strict=False)])
    return samples


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", ["records.jsonl", "records.json"])
def test_records_in_a_list_share_a_sample_of_their_own(name, is_packed, tmp_path, tokenizer_directory, tokenizer):
    one, two, three, four, five, six = records_of(QUESTIONS[:6])
    items = [one, [two, three], four, [five], six]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (tmp_path / name).write_text(lines if name == "records.jsonl" else json.dumps(items))
    assert main(command(tmp_path, tokenizer_directory, tmp_path / name, *["--pack"] * is_packed)) == 0
    whole = [whole_of(pair, tokenizer) for pair in QUESTIONS[:6]]
    alone = [[whole[1], whole[2]], [whole[4]]]
    others = [[whole[0], whole[3], whole[5]]] if is_packed else [[whole[0]], [whole[3]], [whole[5]]]
    assert sorted(segments_of(tmp_path / "data_text_document")) == sorted([*alone, *others])


def test_a_pack_that_does_not_fit_is_refused_or_left_out_when_that_is_asked_for(tmp_path, tokenizer_directory, capsys):
    pack = records_of([("n1", "yes " * 30), ("n2", "yes " * 30)])
    (tmp_path / "in.jsonl").write_text(json.dumps(records_of()[0]) + "\n" + json.dumps(pack) + "\n")
    arguments = command(tmp_path, tokenizer_directory, tmp_path / "in.jsonl")
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "in.jsonl, line 2: its 2 records have " in message and "but a sample has 80" in message
    assert main([*arguments, "--skip-bad-lines"]) == 0
    assert "left out: 1 pack too long" in capsys.readouterr().out


def test_bad_records_are_left_out_counted_and_listed_on_request(tmp_path, tokenizer_directory, capsys):
    good = json.dumps(records_of()[0])
    bad = ["", "{", '{"instruction": "q"}', "[]", '[{"instruction": "q", "output": "a"}, 3]']
    (tmp_path / "in.jsonl").write_text("\n".join([good, *bad, good]) + "\n")
    arguments = command(tmp_path, tokenizer_directory, tmp_path / "in.jsonl", "--show-samples", "9")
    assert main(arguments) == 1
    assert "in.jsonl, line 3, column 2" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad-lines"]) == 0
    output = capsys.readouterr()
    assert "left out: 1 blank, 3 malformed, 1 unusable" in output.out
    assert [line.split(", line ")[1][0] for line in output.err.splitlines()] == ["3", "4", "5", "6"]
    assert "line 4: no output or content" in output.err and "line 6, its record 2: int instead of" in output.err
    told = json.loads((tmp_path / "data_text_document.json").read_text())
    assert (told["records"], told["left_out"]) == (2, {"blank": 1, "malformed": 3, "unusable": 1})


def test_directories_and_every_format_are_read_in_natural_order(tmp_path, tokenizer_directory, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = ["in/d/1.jsonl", "in/d/2.jsonl.gz", "in/d/10.json", "in/a.csv", "in/b.parquet"]
    (tmp_path / "in/d").mkdir(parents=True)
    lines = [json.dumps(record) + "\n" for record in records_of()]
    (tmp_path / names[0]).write_text(lines[0])
    (tmp_path / names[1]).write_bytes(gzip.compress(lines[1].encode()))
    (tmp_path / names[2]).write_text(f"[{lines[2]}]")
    question, answer = QUESTIONS[3]
    (tmp_path / names[3]).write_text(f"instruction,input,output\n{question},,{answer}\n")
    table = pyarrow.table({"messages": [None], "instruction": ["n4"], "input": [None], "output": [QUESTIONS[4][1]]})
    parquet.write_table(table, tmp_path / names[4])
    arguments = command(tmp_path, tokenizer_directory, tmp_path / "in/d")
    assert main([*arguments[:2], f"{tmp_path}/in/*.*", *arguments[2:]]) == 0
    expected = [[whole_of(pair, tokenizer)] for pair in QUESTIONS[:5]]
    assert segments_of(tmp_path / "data_text_document") == expected
    told = json.loads((tmp_path / "data_text_document.json").read_text())
    assert [source["path"] for source in told["sources"]] == [f"{tmp_path}/{name}" for name in names]


def test_keys_are_what_map_keys_says(tmp_path, tokenizer_directory, tokenizer):
    record = {"instruction": "not this", "q": "n1", "about": "n2", "output": "nor this", "a": "yes", "s": "n3"}
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    mapped = json.dumps({"prompt": "q", "query": "about", "response": "a", "system": "s"})
    assert main(command(tmp_path, tokenizer_directory, tmp_path / "in.jsonl", "--map-keys", mapped)) == 0
    ((tokens,),) = segments_of(tmp_path / "data_text_document")
    assert tokens == tokenizer("[INST] n3\n\nn1\nn2 [/INST] yes</s>").input_ids


def test_a_full_disk_ends_the_command_and_leaves_nothing(tmp_path, tokenizer_directory, capsys):
    """A limit on file sizes stands for it."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records_of() * 3))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9999, before[1]))
    try:
        status = main(command(tmp_path, tokenizer_directory, tmp_path / "in"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, "File too large" in capsys.readouterr().err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "q", "output": "a"}\n{"instruction": "q"}\n', "line 2: no output"),
        ('{"instruction": "' + "long " * 99 + '", "output": "a"}\n', "none of 1 records has a prompt of at most 80"),
        ("", "holds no record"),
    ],
)
def test_a_file_that_cannot_be_used_leaves_nothing(text, message, tmp_path, tokenizer_directory, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/records.jsonl").write_text(text)
    arguments = ["--input", str(tmp_path / "in/records.jsonl"), "--output-prefix", str(tmp_path / "out/data")]
    assert main([*arguments, "--tokenizer-model", str(tokenizer_directory), "--seq-length", str(LENGTH)]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
