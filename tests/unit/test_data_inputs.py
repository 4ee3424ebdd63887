"""What preprocessing reads, in which order, and how it is told that it cannot."""

import gzip
import json
import sys
import types
import zlib
from pathlib import Path

import pytest

from megatron_patch.data import inputs
from megatron_patch.data.inputs import check_readable, read_rows, resolve_inputs

BATCH = 1 << 20


def place(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x"}\n')
    return str(directory)


def names(paths, directory):
    return [path.relative_to(directory).as_posix() for path in paths]


def rows(path, keys=("text",), batch_bytes=BATCH):
    return [row for batch in read_rows(Path(path), keys, batch_bytes) for row in batch.rows]


def texts(path, batch_bytes=BATCH):
    return [row.record["text"] for row in rows(path, batch_bytes=batch_bytes)]


def test_a_directory_is_read_in_natural_order(tmp_path):
    directory = place(tmp_path, "10.jsonl", "2.jsonl", "0.jsonl.gz", "1.json", "a/3.jsonl", ".hidden.jsonl", "notes.md")
    assert names(resolve_inputs([directory]), tmp_path) == ["0.jsonl.gz", "1.json", "2.jsonl", "10.jsonl"]
    deep = resolve_inputs([directory], is_recursive=True)
    assert names(deep, tmp_path) == ["0.jsonl.gz", "1.json", "2.jsonl", "10.jsonl", "a/3.jsonl"]


def test_files_directories_and_patterns_follow_each_other_as_given(tmp_path):
    place(tmp_path, "z.data", "part-10.jsonl", "part-9.jsonl", "d/b2.jsonl", "d/b1.jsonl")
    found = resolve_inputs([f"{tmp_path}/z.data", f"{tmp_path}/part-*", f"{tmp_path}/d"])
    assert names(found, tmp_path) == ["z.data", "part-9.jsonl", "part-10.jsonl", "d/b1.jsonl", "d/b2.jsonl"]


def test_what_preprocessing_wrote_into_its_own_input_is_not_read_again(tmp_path):
    directory = place(tmp_path, "0.jsonl", "out_text_document.json", "out_text_document.idx")
    assert names(resolve_inputs([directory]), tmp_path) == ["0.jsonl"]


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        (["a.jsonl", "README.txt"], ["{}"], "holds 1 text and 1 JSON files; choose with a pattern such as"),
        (["a.jsonl"], ["{}", "{}/a.jsonl"], "a.jsonl' is named twice"),
        (["a/b.jsonl"], ["{}"], "--recursive also reads"),
        (["a.jsonl"], ["{}/*.json"], "no pattern of existing files"),
        (["a.jsonl"], ["{}/b.jsonl"], "is no file, no directory"),
    ],
)
def test_inputs_that_are_not_clear_are_refused(files, words, message, tmp_path):
    place(tmp_path, *files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolve_inputs([word.format(tmp_path) for word in words])


@pytest.mark.parametrize("batch_bytes", [1, 20, BATCH])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two ü"}\r\n{"text": ""}'),
        ("a.json", '{"text": "one"}\n{"text": "two ü"}\n{"text": ""}\n'),
        ("b.json", '\ufeff[{"text": "one"},\n {"text": "two ü"}, {"text": ""}]'),
        ("a.csv", '\ufeffid,text\r\n1,one\r\n\r\n2,"two ü"\r\n3,\r\n'),
    ],
)
def test_every_format_gives_the_same_records(name, content, batch_bytes, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    assert texts(tmp_path / name, batch_bytes) == ["one", "two ü", ""]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    assert texts(tmp_path / f"{name}.gz", batch_bytes) == ["one", "two ü", ""]


def test_a_text_file_has_a_document_on_every_line_that_is_not_blank(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\n \n  two ü \r\n".encode())
    (batch,) = read_rows(tmp_path / "a.txt", ["text"], BATCH)
    assert [row.record for row in batch.rows] == [{"text": "one"}, {"text": "  two ü "}]
    assert (batch.blank, batch.position) == (1, (tmp_path / "a.txt").stat().st_size)


def test_a_field_of_csv_may_hold_line_breaks(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"one\ntwo, ""three""",1\nfour,2\n')
    assert [(row.place, row.record["text"]) for row in rows(tmp_path / "a.csv")] == [
        (f"{tmp_path}/a.csv, line 3", 'one\ntwo, "three"'),
        (f"{tmp_path}/a.csv, line 4", "four"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": }\n{"text": "b"}\n', "line 2, column 10: Expecting value"),
        ("a.json", b'[{"text": "a"},\n 3, {"text": "b"}]', "record 2: int instead of an object"),
        ("a.txt", b"a\nx\xff\nb\n", "line 2, column 2: the byte 0xff is not UTF-8"),
        ("a.csv", b"text,n\na,1\nx\xff,2\nb,3\n", "line 3, column 2: the byte 0xff is not UTF-8"),
        ("a.csv", b"text,n\na,1\nx,2,3\nb,3\n", "line 3: 3 fields, but the header has 2"),
        ("a.csv", b'text,n\na,1\n"x" y,2\nb,3\n', "line 3: ',' expected after"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(name, content, problem, tmp_path):
    (tmp_path / name).write_bytes(content)
    first, bad, last = rows(tmp_path / name)
    assert (first.record["text"], last.record["text"]) == ("a", "b")
    assert bad.record is None
    with pytest.raises(ValueError, match=f"{name}, {problem}"):
        raise ValueError(bad.problem)


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"not gzip", lambda content: b""])
def test_a_damaged_archive_is_named(damage, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(b'{"text": "a"}\n' * 100)))
    if not (tmp_path / "a.jsonl.gz").stat().st_size:  # gzip itself takes no bytes for no text
        assert rows(tmp_path / "a.jsonl.gz") == []
        return
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged or truncated"):
        rows(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_columns_are_read_as_rows(kind, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    monkeypatch.setattr(inputs, "ROWS_PER_BATCH", 2)
    table = pyarrow.table({"n": [1, 2, 3], "text": ["one", None, "ü"], "parts": [["a", "b"], [], ["c"]]})
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with (ipc.new_stream if kind == "stream" else ipc.new_file)(path, table.schema) as writer:
            writer.write_table(table)
    assert [row.record for row in rows(path, ["text", "parts"])] == [
        {"text": "one", "parts": ["a", "b"]},
        {"text": None, "parts": []},
        {"text": "ü", "parts": ["c"]},
    ]
    assert [row.place for row in rows(path)][2] == f"{path}, row 3"
    with pytest.raises(ValueError, match="no column 'body' among n, text, parts"):
        rows(path, ["body"])
    path.write_bytes(path.read_bytes()[:-20] if kind == "parquet" else b"x" * 40)
    with pytest.raises(ValueError, match=f"{path.name}: damaged or truncated"):
        rows(path)


def test_a_row_of_columns_that_is_not_utf8_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pyarrow.array([b"one", b"\xff", b"two"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    first, bad, last = rows(tmp_path / "a.parquet")
    assert (first.record, last.record) == ({"text": "one"}, {"text": "two"})
    assert (bad.record, bad.problem) == (None, f"{tmp_path}/a.parquet, row 2: its text is not UTF-8")


def test_an_array_that_is_not_utf8_is_named_by_line_and_column(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "\xc3\xbc"},\n {"text": "\xff"}]')
    with pytest.raises(ValueError, match=r"a\.json, line 2, column 12: the byte 0xff is not UTF-8"):
        rows(tmp_path / "a.json")


def test_without_keys_a_row_has_every_column_that_holds_something(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": ["x", None], "b": [None, [1]]}), tmp_path / "a.parquet")
    assert [row.record for row in rows(tmp_path / "a.parquet", None)] == [{"a": "x"}, {"b": [1]}]


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("a.jsonl.zst", "zstandard")]
)
def test_a_format_whose_package_is_absent_names_it(name, package, monkeypatch):
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{name}: .* are read by the package {package}, which is not installed"):
        check_readable([Path(name)])


def inflater():
    """What the package's decompressor does with a frame, played by zlib."""
    return zlib.decompressobj(wbits=31)


def test_zstandard_files_are_read_over_all_their_frames_and_not_past_a_truncated_one(tmp_path, monkeypatch):
    decompressor = types.SimpleNamespace(decompressobj=inflater)
    monkeypatch.setitem(sys.modules, "zstandard", types.SimpleNamespace(ZstdDecompressor=lambda: decompressor))
    frames = [gzip.compress(json.dumps({"text": text}).encode() + b"\n") for text in ("one", "two")]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert texts(tmp_path / "a.jsonl.zst") == ["one", "two"]
    (tmp_path / "a.jsonl.zst").write_bytes(frames[0] + frames[1][:-1])
    with pytest.raises(ValueError, match="damaged or truncated: the last frame is not complete"):
        texts(tmp_path / "a.jsonl.zst")


def test_zstandard_itself_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = b"".join(json.dumps({"text": str(number)}).encode() + b"\n" for number in range(9999))
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(content) + zstandard.compress(content))
    assert texts(path) == [str(number) for number in range(9999)] * 2
    path.write_bytes(zstandard.compress(content)[:-50])
    with pytest.raises(ValueError, match="damaged or truncated"):
        texts(path)
    (tmp_path / "a.json.zst").write_bytes(zstandard.compress(b'[{"text": "one"}]'))
    assert texts(tmp_path / "a.json.zst") == ["one"]
