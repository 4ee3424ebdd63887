"""From JSON lines to indexed tokens."""

import json
import os
import resource
import shutil
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from megatron_patch.data import preprocess as module
from megatron_patch.data.indexed import IndexedDataset
from megatron_patch.data.preprocess import Recipe, main, preprocess
from megatron_patch.data.sidecar import read_sidecar
from megatron_patch.data.tokenizer import load_tokenizer

TEXTS = ["def f(x):\n    return x", "", "é 世界 �", "    indented </s> text", "x" * 300]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


@pytest.fixture(autouse=True)
def thread_settings(monkeypatch):
    """The command writes these; each test gives them back."""
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def documents(prefix):
    """Tokens of every document, empty ones included."""
    dataset = IndexedDataset(prefix)
    bounds = dataset.document_indices.tolist()
    return [
        list(chain.from_iterable(dataset[i].tolist() for i in range(first, last))) for first, last in pairwise(bounds)
    ]


def expected(tokenizer, texts, end=()):
    ids = list(chain.from_iterable(tokenizer(text, add_special_tokens=False).input_ids for text in texts))
    return ids + list(end) if ids else []


@pytest.mark.parametrize("append_eod", [False, True])
def test_documents_are_what_the_tokenizer_says(append_eod, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "BYTES_PER_BATCH", 60)  # several batches
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    (report,) = preprocess([source], f"{tmp_path}/out", tokenizer, Recipe(append_eod=append_eod)).reports
    end = [tokenizer.eos_token_id] if append_eod else []
    assert report.prefix == f"{tmp_path}/out_text_document"
    written = documents(report.prefix)
    assert written == [expected(tokenizer, [text], end) for text in TEXTS]
    assert (report.documents, report.tokens, report.dtype) == (5, sum(map(len, written)), "uint16")


def test_lists_of_texts_are_one_document_and_keys_are_files(tmp_path, tokenizer):
    records = [{"a": ["one", "two"], "b": "three"}, {"a": [], "b": "four"}]
    source = write_lines(tmp_path / "in.jsonl", records)
    preprocess([source], f"{tmp_path}/new/out", tokenizer, Recipe(["a", "b"], append_eod=True))
    end = [tokenizer.eos_token_id]
    assert documents(f"{tmp_path}/new/out_a_document") == [expected(tokenizer, ["one", "two"], end), []]
    assert documents(f"{tmp_path}/new/out_b_document") == [expected(tokenizer, [t], end) for t in ("three", "four")]


def test_a_key_that_is_named_twice_is_refused(tmp_path, tokenizer):
    source = write_lines(tmp_path / "in.jsonl", [{"a": "one"}])
    with pytest.raises(ValueError, match="--json-keys a a: a key is named twice"):
        preprocess([source], f"{tmp_path}/out", tokenizer, Recipe(["a", "a"]))


def test_a_source_whose_name_is_no_text_is_described_all_the_same(tmp_path, tokenizer):
    name = os.fsdecode(bytes(tmp_path) + b"/\xff.jsonl")
    source = write_lines(Path(name), [{"text": "one"}])
    preprocess([source], f"{tmp_path}/out", tokenizer, Recipe())
    assert read_sidecar(f"{tmp_path}/out_text_document")["sources"][0]["path"] == name


def test_the_command_reports_what_it_wrote(tmp_path, tokenizer_directory):
    source = write_lines(tmp_path / "my file.jsonl", [{"text": "hello world"}, {"text": "bye"}])
    command = [sys.executable, "-m", "megatron_patch.data.preprocess", "--input", source, "--workers", "1"]
    command += ["--output-prefix", f"{tmp_path}/out", "--tokenizer-model", str(tokenizer_directory), "--append-eod"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    tokens = sum(map(len, documents(f"{tmp_path}/out_text_document")))
    assert f"out_text_document: 2 documents, {tokens} tokens (uint16)" in result.stdout
    assert "tokens/s" in result.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "line 2, column 13: Expecting"),
        (b'{"text": "a"}\n  \n{"body": "b"}\n', "line 3: no key 'text' among body"),
        (b'{"text": 3}\n', "line 1: 'text' is neither text nor a list of texts"),
        (b'["text"]\n', "line 1: list instead of an object"),
        (b'{"text": "caf\xe9"}\n', "line 1, column 14: the byte 0xe9 is not UTF-8"),
        (b'{"text": "a"}\n' + b'{"text":' * 100_000, "line 2: maximum recursion depth"),
        (rb'{"text": "a \ud83d"}', r"line 1: 'text': character 3 is '\ud83d', half of a surrogate pair"),
        (b'{"text": "a \xed\xa0\xbd"}', r"line 1: 'text': character 3 is '\ud83d', half of a surrogate pair"),
    ],
    ids=range(8),
)
def test_a_malformed_line_ends_the_command_and_leaves_nothing(
    content, message, tmp_path, tokenizer_directory, capsys, monkeypatch
):
    monkeypatch.setattr(module, "BYTES_PER_BATCH", 1)  # a batch per line
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    options = ["--output-prefix", f"{tmp_path}/out", "--tokenizer-model", str(tokenizer_directory), "--workers", "1"]
    assert main(["--input", str(source), *options]) == 1
    assert f"error: {source}, {message}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_interrupted_command_says_so_and_leaves_nothing(tmp_path, tokenizer_directory, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_encoded", interrupted)
    source = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    options = ["--output-prefix", f"{tmp_path}/out", "--tokenizer-model", str(tokenizer_directory)]
    assert main(["--input", source, *options]) == 130
    assert "error: interrupted; nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("source", "told"),
    [("absent.jsonl", "is no file, no directory"), (".", "holds no .jsonl"), ("no-*.json", "no pattern")],
)
def test_an_input_that_names_nothing_is_named(source, told, tmp_path, tokenizer_directory, capsys):
    options = ["--output-prefix", f"{tmp_path}/out", "--tokenizer-model", str(tokenizer_directory)]
    assert main(["--input", f"{tmp_path}/{source}", *options]) == 1
    assert told in capsys.readouterr().err


def test_append_eod_needs_an_eos(tmp_path, tokenizer_directory):
    tokenizer = load_tokenizer(tokenizer_directory)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"--append-eod: the tokenizer in .* has no EOS token"):
        preprocess([tmp_path / "in"], f"{tmp_path}/out", tokenizer, Recipe(append_eod=True))


def command(tmp_path, tokenizer_directory, *more):
    return ["--output-prefix", f"{tmp_path}/out", "--tokenizer-model", str(tokenizer_directory), *map(str, more)]


BAD = b'{"text": "a"}\n\n{"text": \n{"body": "b"}\n{"text": 3}\n{"text": "\xff"}\n{"text": "c"}\n \n'


def test_bad_lines_are_left_out_counted_and_listed_on_request(tmp_path, tokenizer_directory, tokenizer, capsys):
    source = tmp_path / "in.jsonl"
    source.write_bytes(BAD)
    arguments = command(tmp_path, tokenizer_directory, "--input", source)
    assert main(arguments) == 1
    assert f"error: {source}, line 3, column" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad-lines"]) == 0
    output = capsys.readouterr()
    assert "left out: 2 blank, 2 malformed, 1 missing key, 1 not text" in output.out
    listed = [line for line in output.err.splitlines() if line.startswith("left out: ")]
    assert [line.split(", line ")[1][0] for line in listed] == ["3", "4", "5", "6"]
    assert documents(f"{tmp_path}/out_text_document") == [expected(tokenizer, [text]) for text in "ac"]
    assert json.loads((tmp_path / "out_text_document.json").read_text())["skipped"] == {
        **{"blank": 2, "malformed": 2},
        **{"missing key": 1, "not text": 1},
    }


def test_a_record_left_out_for_one_key_is_left_out_for_all(tmp_path, tokenizer_directory, tokenizer):
    records = [{"a": "one", "b": "two"}, {"a": "three"}, {"a": "four", "b": "five " * 50}, {"a": "six", "b": "seven"}]
    source = write_lines(tmp_path / "in.jsonl", records)
    arguments = command(tmp_path, tokenizer_directory, "--input", source, "--json-keys", "a", "b")
    assert main([*arguments, "--skip-bad-lines", "--seq-length", "30"]) == 0
    for key in "ab":
        kept = [expected(tokenizer, [records[number][key]]) for number in (0, 3)]
        assert documents(f"{tmp_path}/out_{key}_document") == kept
        told = json.loads((tmp_path / f"out_{key}_document.json").read_text())
        assert (told["documents"], told["skipped"]) == (2, {"missing key": 1, "too long": 1})


@pytest.mark.parametrize(
    ("content", "told"),
    [("", "holds no document;"), ("\n\n", "holds no document (2 blank left out)"), ('{"text": ""}\n', "no token;")],
)
def test_an_input_without_any_document_is_an_error(content, told, tmp_path, tokenizer_directory, capsys):
    (tmp_path / "in.jsonl").write_text(content)
    assert main(command(tmp_path, tokenizer_directory, "--input", tmp_path / "in.jsonl", "--append-eod")) == 1
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_several_inputs_follow_each_other_and_other_workers_give_the_same_bytes(
    tmp_path, tokenizer_directory, tokenizer
):
    """The number of workers reaches the tokenizer through the environment at its first use: the other is a process."""
    texts = [f"document {number}: {'x é' * (number * 7 % 50)}" for number in range(300)]
    for number, name in enumerate(("10.jsonl", "2.jsonl", "1.jsonl")):
        write_lines(tmp_path / name, [{"text": text} for text in texts[number::3]])
    written = []
    for workers in ("1", "3"):
        more = ["--input", str(tmp_path), "--workers", workers, "--append-eod"]
        arguments = command(tmp_path / "o", tokenizer_directory, *more)
        if workers == "1":
            assert main(arguments) == 0
        else:
            subprocess.run([sys.executable, "-m", "megatron_patch.data.preprocess", *arguments], check=True)
        written.append([path.read_bytes() for path in sorted((tmp_path / "o").iterdir())])
    assert written[0] == written[1] and len(written[0]) == 3
    end = [tokenizer.eos_token_id]
    ordered = [*texts[2::3], *texts[1::3], *texts[::3]]
    assert documents(f"{tmp_path}/o/out_text_document") == [expected(tokenizer, [text], end) for text in ordered]


def test_every_document_begins_as_the_tokenizers_own_texts_do(tmp_path, tokenizer):
    source = write_lines(tmp_path / "in.jsonl", [{"text": "one"}, {"text": ["two", "three"]}, {"text": ""}])
    preprocess([source], f"{tmp_path}/out", tokenizer, Recipe(prepend_bos=True))
    assert documents(f"{tmp_path}/out_text_document") == [
        tokenizer("one").input_ids,
        [tokenizer.bos_token_id, *expected(tokenizer, ["two", "three"])],
        [],
    ]


def test_tokens_added_beyond_16_bits_make_the_file_wider(tmp_path, tokenizer_directory):
    tokenizer = load_tokenizer(tokenizer_directory)
    tokenizer.add_tokens([f"<{number}>" for number in range(65500 - 600)])
    source = write_lines(tmp_path / "in.jsonl", [{"text": "<64899>"}])
    (report,) = preprocess([source], f"{tmp_path}/out", tokenizer, Recipe()).reports
    assert (report.dtype, documents(report.prefix)[0][-1]) == ("int32", 65499)


def test_a_full_disk_ends_the_command_with_an_error_and_leaves_nothing(tmp_path, tokenizer_directory, capsys):
    """A limit on file sizes stands for it: both fail a write, and the closing that tries again."""
    source = write_lines(tmp_path / "in.jsonl", [{"text": "word " * 20_000}])
    arguments = command(tmp_path / "o", tokenizer_directory, "--input", source, "--workers", "1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9999, before[1]))
    try:
        status = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, "File too large" in capsys.readouterr().err) == (1, True)
    assert not list((tmp_path / "o").iterdir())


def test_a_thread_that_dies_ends_the_command(tmp_path, tokenizer_directory, capsys, monkeypatch):
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "_batch", no_memory)
    source = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    assert main(command(tmp_path, tokenizer_directory, "--input", source)) == 1
    assert "error: out of memory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


PLAIN = [text.replace("</s>", "\n\n") for text in TEXTS]  # the model alone knows no special tokens


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path, tokenizer_directory):
    (tmp_path / "t").mkdir()
    model = shutil.copy(tokenizer_directory / "tokenizer.model", tmp_path / "t")
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in PLAIN])
    processor = SentencePieceProcessor(str(model))
    for path in (model, tmp_path / "t"):
        preprocess([source], f"{tmp_path}/out", load_tokenizer(path), Recipe())
        assert documents(f"{tmp_path}/out_text_document") == [processor.encode(text) for text in PLAIN]
