"""From JSON lines to indexed tokens."""

import json
import subprocess
import sys
from itertools import chain, pairwise

import pytest

from megatron_patch.data import preprocess as module
from megatron_patch.data.indexed import IndexedDataset
from megatron_patch.data.preprocess import Recipe, main, preprocess
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

    monkeypatch.setattr(module, "_tokenise", interrupted)
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
