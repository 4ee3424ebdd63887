"""What preprocessing reads: files, directories and patterns as a list of files, and each file as batches of records."""

import csv
import gzip
import io
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from glob import glob
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_patch.data.json_lines import Check, Record, check_object, is_array, parse_line, read_array
from megatron_patch.data.zstd import ZstandardFile

FORMATS = {
    ".jsonl": "JSON", ".json": "JSON", ".txt": "text", ".csv": "CSV", ".parquet": "Parquet", ".arrow": "Arrow",
}  # fmt: skip
PACKAGES = {".parquet": "pyarrow", ".arrow": "pyarrow", ".zst": "zstandard"}
COMPRESSIONS = (".gz", ".zst")
COLUMNAR = ("Parquet", "Arrow")
ROWS_PER_BATCH = 1000
BUFFER = 1 << 17
FROM_LINES = "text"  # the key of a text file's lines


class Row(NamedTuple):
    """One record and its place (`file, line 3`); a row that cannot be read has a sentence instead of a record.

    Where the reader accepts lists, the record is one or a list of them.
    """

    place: str
    record: Any
    problem: str = ""


class Rows(NamedTuple):
    """Some consecutive rows, the lines among them that were blank, and how many of the file's bytes are read by now."""

    rows: list[Row]
    blank: int
    position: int


def resolve_inputs(words: Sequence[str], is_recursive: bool = False) -> list[Path]:
    """The files that `words` name, each a file, a directory or a pattern; those of one word in natural order.

    A directory gives its files of a known format, which must be one; datasets' own `.json` and hidden files are passed
    over. Raises ValueError or FileNotFoundError for a word that names nothing, and for a file named twice.
    """
    found = [path for word in words for path in _resolve(word, is_recursive)]
    twice = [path for path, count in Counter(path.resolve() for path in found).items() if count > 1]
    if twice:
        raise ValueError(f"input {str(twice[0])!r} is named twice; name every file once")
    return found


def check_readable(paths: Iterable[Path]) -> None:
    """Raise ValueError naming the package that a file's format needs and that is not installed."""
    for path in paths:
        for suffix in path.suffixes[-2:]:
            package = PACKAGES.get(suffix)
            if package and find_spec(package) is None:
                raise ValueError(f"{path}: {suffix} files are read by the package {package}, which is not installed")


def natural(path: Path) -> tuple[Any, ...]:
    """A sort key in which 2.jsonl comes before 10.jsonl."""
    parts = (re.split(r"([0-9]+)", part) for part in path.parts)
    return tuple(tuple((0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in part) for part in parts)


def read_rows(path: Path, keys: Sequence[str] | None, batch_bytes: int, check: Check = check_object) -> Iterator[Rows]:
    """Every row of one file, in batches of about `batch_bytes`. Columnar files are asked for `keys` only.

    Without `keys` these give every column, and a row has those in which it holds something. `check` is what a JSON
    value must pass to be a record.

    Raises ValueError for a file that cannot be read further; a single bad row is a `Row` that says so.
    """
    try:
        if format_of(path) in COLUMNAR:
            yield from _columns(path, keys)
            return
        with path.open("rb") as raw:
            yield from _plain(path, raw, batch_bytes, check)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or truncated: {error}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("pyarrow", "zstandard"):  # optional, so not importable here
            raise ValueError(f"{path}: damaged or truncated: {error}") from None
        raise


def format_of(path: Path) -> str:
    """The format that `path`'s suffix names; a file of an unknown suffix holds JSON lines."""
    return FORMATS.get(_suffix(path), "JSON")


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _resolve(word: str, is_recursive: bool) -> list[Path]:
    path = Path(word)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _in_directory(path, is_recursive)
    names = glob(word, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    found = sorted(map(Path, names), key=natural)
    files = [path for path in found if path.is_file()]
    if not files:
        raise FileNotFoundError(f"input {word!r} is no file, no directory and no pattern of existing files")
    return files


def _in_directory(directory: Path, is_recursive: bool) -> list[Path]:
    every = (path.relative_to(directory) for path in (directory.rglob("*") if is_recursive else directory.iterdir()))
    shown = sorted((path for path in every if not any(part.startswith(".") for part in path.parts)), key=natural)
    files = [directory / path for path in shown if _suffix(path) in FORMATS]
    files = [path for path in files if path.is_file() and not _is_sidecar(path)]
    formats = Counter(map(format_of, files))
    if not files:
        deeper = "" if is_recursive else "; --recursive also reads what its directories hold"
        raise FileNotFoundError(f"input directory {str(directory)!r} holds no {', '.join(FORMATS)} file{deeper}")
    if len(formats) > 1:
        counts = " and ".join(f"{count} {name}" for name, count in formats.items())
        raise ValueError(
            f"input directory {str(directory)!r} holds {counts} files; "
            f"choose with a pattern such as '{directory}/*{files[0].suffix}'"
        )
    return files


def _is_sidecar(path: Path) -> bool:
    return path.suffix == ".json" and path.with_suffix(".idx").is_file()


def _plain(path: Path, raw: io.BufferedReader, batch_bytes: int, check: Check) -> Iterator[Rows]:
    with _decompressed(path, raw) as file:
        format = format_of(path)
        if format == "CSV":
            yield from _gathered(_csv(path, file), batch_bytes, raw)
        elif format == "JSON" and _suffix(path) != ".jsonl" and is_array(file):
            rows = (Row(place, *_checked(value, place, check)) for place, value in read_array(file, path))
            yield from _gathered(rows, batch_bytes, raw)
        else:
            parse = _text_line if format == "text" else partial(parse_line, check=check)
            yield from _lines(path, file, batch_bytes, raw, parse)


def _decompressed(path: Path, raw: io.BufferedReader) -> io.BufferedReader | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        return io.BufferedReader(ZstandardFile(raw), BUFFER)
    return raw


def _lines(
    path: Path, file: BinaryIO, batch_bytes: int, raw: BinaryIO, parse: Callable[[bytes, Path, int], Record]
) -> Iterator[Rows]:
    number = 0
    while lines := file.readlines(batch_bytes):
        numbered = [(number + k, line) for k, line in enumerate(lines, 1) if line.strip()]
        yield Rows([_parsed(parse, line, path, k) for k, line in numbered], len(lines) - len(numbered), raw.tell())
        number += len(lines)


def _parsed(parse: Callable[[bytes, Path, int], Record], line: bytes, path: Path, number: int) -> Row:
    try:
        return Row(f"{path}, line {number}", parse(line, path, number))
    except ValueError as error:
        return Row(f"{path}, line {number}", None, str(error))


def _text_line(line: bytes, path: Path, number: int) -> Record:
    try:
        return {FROM_LINES: line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        where = f"{path}, line {number}, column {error.start + 1}"
        raise ValueError(f"{where}: the byte {line[error.start]:#04x} is not UTF-8") from None


def _csv(path: Path, file: BinaryIO) -> Iterator[Row | None]:
    """A field may hold line breaks, so a row has the number of its last line. None: a blank line."""
    csv.field_size_limit(sys.maxsize)
    undecodable: list[str] = []
    reader = csv.reader(_decoded(path, file, undecodable), strict=True)
    header = next(reader, [])
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(f"{path}, line {reader.line_num}", None, f"{path}, line {reader.line_num}: {error}")
            continue
        place = f"{path}, line {reader.line_num}"
        if not values:
            yield None
        elif undecodable:
            yield Row(place, None, undecodable.pop())
            undecodable.clear()
        elif len(values) != len(header):
            yield Row(place, None, f"{place}: {len(values)} fields, but the header has {len(header)}")
        else:
            yield Row(place, dict(zip(header, values, strict=True)))


def _decoded(path: Path, file: BinaryIO, undecodable: list[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield _text_line(line, path, number)[FROM_LINES] + "\n"
        except ValueError as error:
            undecodable.append(str(error))
            yield line.decode(errors="replace")


def _checked(value: Any, place: str, check: Check) -> tuple[Any, str]:
    try:
        return check(value, place), ""
    except ValueError as error:
        return None, str(error)


def _gathered(rows: Iterable[Row | None], batch_bytes: int, raw: BinaryIO) -> Iterator[Rows]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += _characters(row)
        if size >= batch_bytes:
            yield _together(batch, raw)
            batch, size = [], 0
    if batch:
        yield _together(batch, raw)


def _together(batch: list[Row | None], raw: BinaryIO) -> Rows:
    rows = [row for row in batch if row is not None]
    return Rows(rows, len(batch) - len(rows), raw.tell())


def _characters(row: Row | None) -> int:
    if row is None or row.record is None:
        return 1
    records = row.record if isinstance(row.record, list) else [row.record]
    values = [value for record in records for value in record.values()]
    return 1 + sum(len(value if isinstance(value, str) else str(value)) for value in values)


def _columns(path: Path, keys: Sequence[str] | None) -> Iterator[Rows]:
    check_readable([path])
    size, number = path.stat().st_size, 0
    total, names, tables = _parquet(path, keys) if format_of(path) == "Parquet" else _arrow(path)
    missing = [key for key in keys or () if key not in names]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]!r} among {', '.join(names)}; name others with --json-keys")
    for table in tables:
        wanted = table if keys is None else table.select(list(keys))
        rows = list(_row_by_row(wanted, path, number, keeps_empty=keys is not None))
        number += len(rows)
        yield Rows(rows, 0, size * number // max(total or number, 1))


def _row_by_row(table: Any, path: Path, before: int, *, keeps_empty: bool) -> Iterator[Row]:
    try:
        records = table.to_pylist()
    except UnicodeDecodeError:  # which row it is, the package does not say
        records = [_one(table, number) for number in range(table.num_rows)]
    for number, record in enumerate(records, before + 1):
        place = f"{path}, row {number}"
        if record is None:
            yield Row(place, None, f"{place}: its text is not UTF-8")
        elif keeps_empty:
            yield Row(place, record)
        else:
            yield Row(place, {key: value for key, value in record.items() if value is not None})


def _one(table: Any, number: int) -> Record | None:
    try:
        return table.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _parquet(path: Path, keys: Sequence[str] | None) -> tuple[int, list[str], Iterator[Any]]:
    file = import_module("pyarrow.parquet").ParquetFile(path, memory_map=True)
    names = file.schema_arrow.names
    columns = None if keys is None else [key for key in keys if key in names]
    return file.metadata.num_rows, names, file.iter_batches(ROWS_PER_BATCH, columns=columns)


def _arrow(path: Path) -> tuple[int, list[str], Iterator[Any]]:
    """Both of Arrow's encodings: `datasets` writes streams."""
    pyarrow, ipc = import_module("pyarrow"), import_module("pyarrow.ipc")
    source = pyarrow.memory_map(str(path))
    try:
        file = ipc.open_file(source)
        batches = (file.get_batch(k) for k in range(file.num_record_batches))
    except pyarrow.ArrowInvalid:
        source.seek(0)
        file = batches = ipc.open_stream(source)
    return 0, file.schema.names, _sliced(batches)


def _sliced(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        for first in range(0, batch.num_rows, ROWS_PER_BATCH):
            yield batch.slice(first, ROWS_PER_BATCH)
