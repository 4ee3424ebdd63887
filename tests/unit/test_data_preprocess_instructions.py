"""ModelLink's instruction data as it is written: three aligned files, and labels that are the answers."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from megatron_patch.data.index_header import check_instruction_files, instruction_prefixes, read_header
from megatron_patch.data.indexed import IndexedDataset
from megatron_patch.data.instruction_index import InstructionFiles
from megatron_patch.data.preprocess_instructions import main
from megatron_patch.data.tokenizer import check_datasets, load_tokenizer

# Structure of ModelLink's training prompt, spelled out.
SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step."
)
RECORDS = [
    {"instruction": "add", "input": "1 and 1", "output": "2 ### Response: two"},
    {"instruction": "name it", "input": "", "output": "def f(x):\n    return x"},
    {"instruction": "### Response:\nno", "output": "yes"},
]


@pytest.fixture
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


@pytest.fixture
def build(tmp_path, tokenizer_directory, capsys):
    """Run the command on records; its status, what it printed and the prefix it was given."""

    def run(records, *options, handler="GeneralInstructionHandler", status=0):
        path = tmp_path / "records.jsonl"
        text = records if isinstance(records, str) else "".join(json.dumps(record) + "\n" for record in records)
        path.write_text(text, encoding="utf-8")
        prefix = str(tmp_path / "out/data")
        arguments = ["--input", str(path), "--output-prefix", prefix, "--tokenizer-model", str(tokenizer_directory)]
        assert main([*arguments, "--handler", handler, "--workers", "1", *options]) == status
        captured = capsys.readouterr()
        return prefix, captured.out + captured.err

    return run


def samples(prefix):
    """Ids, mask and labels of every sample, as lists."""
    files = [IndexedDataset(name) for name in instruction_prefixes(prefix)]
    assert [dataset[0].dtype for dataset in files] == [np.int32] * 3
    assert [list(dataset.document_indices) for dataset in files] == [list(range(len(files[0]) + 1))] * 3
    return [[dataset[number].tolist() for dataset in files] for number in range(len(files[0]))]


def whole(record):
    said = f"{record['instruction']}\n{record.get('input', '')}"
    return f"\n{SYSTEM}\n### Instruction:\n{said}\n### Response:\n", record["output"]


@pytest.mark.parametrize("has_eod", [True, False])
def test_the_text_is_modellinks_and_the_answer_alone_is_learned(has_eod, build, tokenizer):
    prefix, _ = build(RECORDS, *["--append-eod"] * has_eod)
    for (ids, mask, labels), record in zip(samples(prefix), RECORDS, strict=True):
        prompt, answer = whole(record)
        assert ids == tokenizer(f"{prompt}{answer}\n").input_ids + [tokenizer.eos_token_id] * has_eod
        assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
        assert mask == [1] * len(ids)
        first = labels.index(next(label for label in labels if label != -100))
        assert labels == [-100] * first + ids[first:]
        assert tokenizer.decode(labels[first:]).strip() == f"{answer}\n{'</s>' * has_eod}".strip()


def test_every_answer_of_a_conversation_is_learned_and_ended(build, tokenizer):
    record = {"instruction": "Human:one\nAssistant:two\nHuman:three\nAssistant:", "output": "four"}
    prefix, _ = build([record], "--append-eod", handler="BelleMultiTurnInstructionHandler")
    ((ids, _, labels),) = samples(prefix)
    learned = tokenizer.decode([label for label in labels if label != -100])
    assert learned == "two\n</s>four\n</s>"
    assert tokenizer.decode(ids).count(SYSTEM) == 1


def test_the_tokenizers_own_template_is_the_style_handlers(build, tokenizer_directory, tmp_path, tokenizer):
    record = {"instruction": "q", "input": "i", "output": "a"}
    prefix, _ = build([record], "--prompt-type", "mistral", "--append-eod", handler="AlpacaStyleInstructionHandler")
    ((ids, _, labels),) = samples(prefix)
    assert ids == tokenizer("[INST] q\ni [/INST] a</s>").input_ids  # one EOS, though it is asked for twice
    assert tokenizer.decode([label for label in labels if label != -100]) == "a</s>"
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    prefix, _ = build([record], handler="SharegptStyleInstructionHandler")
    assert "### Instruction:\nq" in tokenizer.decode(samples(prefix)[0][0])  # this tokenizer has none


@pytest.mark.parametrize("has_eod", [True, False])
def test_an_end_that_the_tokenizer_adds_itself_is_not_a_second_one(has_eod, build, tokenizer, tmp_path):
    around = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    tokenizer.save_pretrained(tmp_path / "ending")
    assert load_tokenizer(tmp_path / "ending")("a</s>").input_ids[-2:] == [tokenizer.eos_token_id] * 2
    options = ["--append-eod"] * has_eod
    prefix, _ = build(RECORDS, *options, "--tokenizer-model", str(tmp_path / "ending"))
    ended = samples(prefix)
    assert ended == samples(build(RECORDS, *options)[0])
    assert all((labels[-1] == tokenizer.eos_token_id) == has_eod for *_, labels in ended)


def test_a_run_holds_the_files_against_its_tokenizer(build, tokenizer):
    prefix, _ = build(RECORDS)
    assert check_datasets((prefix,), tokenizer) == []
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="was made with the tokenizer"):
        check_datasets((prefix,), tokenizer)
    Path(f"{instruction_prefixes(prefix)[0]}.json").unlink()
    assert "cannot be verified" in check_datasets((prefix,), tokenizer)[0]


def test_packed_conversations_are_not_cut_where_an_answer_ends(build, tokenizer):
    record = {"instruction": "Human:one\nAssistant:two\nHuman:three\nAssistant:", "output": "four"}
    prefix, _ = build([record], "--append-eod", handler="BelleMultiTurnInstructionHandler")
    order, more = np.arange(1), {"seq_length": 512, "pad": 0, "eos": tokenizer.eos_token_id, "is_packed": True}
    assert InstructionFiles(prefix, order, **more)[0].starts is None
    Path(f"{instruction_prefixes(prefix)[0]}.json").unlink()  # a file of another program's, which does not say
    assert len(set(InstructionFiles(prefix, order, **more)[0].starts.tolist())) == 2


def test_long_records_are_counted_and_left_out(build, tokenizer):
    lengths = sorted(len(tokenizer(f"{''.join(whole(record))}\n").input_ids) for record in RECORDS)
    prefix, out = build(RECORDS, "--seq-length", str(lengths[2]))
    assert sorted(len(ids) for ids, *_ in samples(prefix)) == lengths[:2] != lengths[1:]
    assert "2 records in 2 samples" in out and "left out: 1 too long" in out
    _, out = build(RECORDS, "--seq-length", str(lengths[0]), status=1)
    assert "holds no record to make a sample of (3 too long left out); nothing was written" in out


def test_packed_samples_hold_the_same_records_numbered(build):
    records = [{"instruction": "q", "output": "yes " * number} for number in range(9)]
    alone = sorted([ids, labels] for ids, _, labels in samples(build(records, "--append-eod")[0]))
    length = 3 * max(len(ids) for ids, _ in alone)
    prefix, out = build(records, "--append-eod", "--pack", "--seq-length", str(length))
    found = []
    for ids, mask, labels in samples(prefix):
        assert len(ids) <= length
        ids, mask, labels = map(np.array, (ids, mask, labels))
        assert mask.tolist() == sorted(mask) and set(mask) == set(range(1, mask[-1] + 1))
        found += [[ids[mask == number].tolist(), labels[mask == number].tolist()] for number in set(mask)]
    assert sorted(found) == alone
    assert len(samples(prefix)) == 3 and "9 records in 3 samples" in out


def test_bad_records_end_it_or_are_listed(build):
    text = '{"instruction": "q", "output": "a"}\n\n{"instruction": \n{"instruction": "q"}\n'
    prefix, out = build(text, status=1)
    assert "records.jsonl, line 3, column" in out and not list(Path(prefix).parent.iterdir())
    _, out = build(text, "--skip-bad-lines")
    assert "left out: 1 blank, 2 malformed" in out and "line 4: no output" in out


def test_the_sidecars_say_what_was_made(build):
    prefix, _ = build(RECORDS, "--append-eod")
    header = check_instruction_files(prefix)
    for name, field in zip(instruction_prefixes(prefix), ("input_ids", "attention_mask", "labels"), strict=True):
        told = json.loads(Path(f"{name}.json").read_text())
        assert (told["dtype"], told["documents"], told["tokens"]) == ("int32", 3, header.tokens)
        assert (told["kind"], told["field"], told["handler"]) == ("instructions", field, "GeneralInstructionHandler")
        assert (told["append_eod"], told["pack"], told["segment_marks"]) == (True, False, True)


def test_texts_to_pretrain_on_are_one_pair(build, tokenizer):
    prefix, _ = build(RECORDS[:2], "--append-eod", handler="AlpacaPretrainHandler")
    indexed = IndexedDataset(f"{prefix}_text_document")
    assert read_header(indexed.prefix).dtype == "uint16"
    text = tokenizer.decode(indexed[0])
    assert text.startswith("<s> A chat between") and text.endswith("### Response: ASSISTANT: 2 ### Response: two</s>")
    assert not list(Path(prefix).parent.glob("*packed*"))


def test_progress_is_told(build):
    _, out = build(RECORDS, "--log-interval", "2")
    assert "2 records (" in out and "3 records (" not in out


@pytest.mark.parametrize(
    ("options", "handler", "message"),
    [
        (["--pack"], "GeneralInstructionHandler", "--pack needs --seq-length"),
        (["--prompt-type", "mistral"], "AlpacaPretrainHandler", "--pack and --prompt-type are of instructions"),
        (["--prompt-type", "mystery"], "GeneralInstructionHandler", "'mystery' is not one of mistral"),
        (["--map-keys", "{"], "GeneralInstructionHandler", "is not JSON"),
    ],
)
def test_what_cannot_be_done_is_said(options, handler, message, build):
    assert message in build(RECORDS, *options, handler=handler, status=1)[1]


def test_parquet_need_not_have_every_column(tmp_path, tokenizer_directory, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"instruction": ["q", "r"], "output": ["a", "b"], "id": [1, 2]})
    parquet.write_table(table, tmp_path / "data.parquet")
    arguments = ["--input", str(tmp_path), "--output-prefix", str(tmp_path / "out/data"), "--workers", "1"]
    arguments += ["--tokenizer-model", str(tokenizer_directory), "--handler", "AlpacaStyleInstructionHandler"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert len(samples(str(tmp_path / "out/data"))) == 2
