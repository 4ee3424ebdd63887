"""JSON objects: alone, one per line of a file, or as an array. Standard library only."""

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

Record = dict[str, Any]
Check = Callable[[Any, str], Any]  # (value, place) → the value, or ValueError naming the place


def check_object(value: Any, where: str) -> Record:
    """`value`, an object. Raises ValueError naming `where` for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__} instead of an object with named fields")
    return value


def parse_object(text: str | bytes, where: str) -> Record:
    """The object that a whole JSON text is. Raises ValueError naming `where` for anything else."""
    try:
        value = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    return check_object(value, where)


def check_objects(value: Any, where: str) -> Record | list[Record]:
    """An object, or a list of them, which is not empty. Raises ValueError naming `where` for anything else."""
    if not isinstance(value, list):
        return check_object(value, where)
    if not value:
        raise ValueError(f"{where}: an empty list instead of records that belong together")
    return [check_object(one, f"{where}, its record {number}") for number, one in enumerate(value, 1)]


def parse_line(line: bytes, path: str | os.PathLike[str], number: int, check: Check = check_object) -> Any:
    """One line as what `check` accepts, an object. Raises ValueError naming file, line and column."""
    where = f"{os.fspath(path)}, line {number}"
    try:
        value = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ValueError(f"{where}, column {error.start + 1}: the byte {byte:#04x} is not UTF-8") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise ValueError(f"{where}: {error}") from None
    return check(value, where)


def check_characters(text: str) -> None:
    """Raise ValueError for half of a surrogate pair: JSON can spell it, but it is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"character {error.start + 1} is {half!a}, half of a surrogate pair") from None


def is_array(file: io.BufferedReader | gzip.GzipFile) -> bool:
    """Whether what follows in a file is a JSON array; its position stays."""
    return file.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_array(file: BinaryIO, path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Every value of a JSON array, read as a whole, with its place (`file, record 3`). Raises ValueError."""
    content = file.read()
    try:
        array = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        line, column = content.count(b"\n", 0, error.start) + 1, error.start - content.rfind(b"\n", 0, error.start)
        byte = content[error.start]
        raise ValueError(f"{path}, line {line}, column {column}: the byte {byte:#04x} is not UTF-8") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise ValueError(f"{path}: {error}") from None
    for number, value in enumerate(array, 1):
        yield f"{path}, record {number}", value
