"""The corpus: the Python standard library's own source, one file = one document, held-out files for validation."""

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT_SHARE = 1 / 8


def library_files(root: Path) -> list[Path]:
    """Every Python file of the library under `root`, tests and installed packages excluded, in a stable order."""
    files = (path for path in root.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def is_held_out(name: str) -> bool:
    """Whether the file `name` belongs to validation: decided by its name alone, so the same on every machine."""
    first_bytes = hashlib.sha256(name.encode()).digest()[:8]
    return int.from_bytes(first_bytes, "big") < HELD_OUT_SHARE * 2**64


def documents(root: Path) -> Iterator[dict[str, str]]:
    """`{"name", "text"}` of every file that is not empty and decodes as UTF-8."""
    for path in library_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield {"name": path.relative_to(root).as_posix(), "text": text}


def split(found: Iterable[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out documents. A held-out text that is also a training text goes to neither."""
    training, held_out = [], []
    for document in found:
        (held_out if is_held_out(document["name"]) else training).append(document)
    seen = {document["text"] for document in training}
    return training, [document for document in held_out if document["text"] not in seen]


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """One object per line."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """One object per line; the file appears whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    unfinished.replace(path)


def main() -> None:
    """Write `train.jsonl` and `valid.jsonl`."""
    reader = argparse.ArgumentParser(prog="python3 -m examples.quickstart.corpus", description=__doc__)
    reader.add_argument("directory", type=Path, help="receives train.jsonl and valid.jsonl")
    directory = reader.parse_args().directory
    root = Path(sysconfig.get_path("stdlib"))
    training, held_out = split(documents(root))
    directory.mkdir(parents=True, exist_ok=True)
    write_jsonl(directory / "valid.jsonl", held_out)
    write_jsonl(directory / "train.jsonl", training)
    for name, rows in (("train", training), ("valid", held_out)):
        size = sum(len(row["text"]) for row in rows) / 1e6
        print(f"{name}: {len(rows)} documents, {size:.1f} million characters")
    print(f"source: {root}")


if __name__ == "__main__":
    main()
