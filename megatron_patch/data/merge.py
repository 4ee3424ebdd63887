"""Several `.bin/.idx` pairs as one: `python3 -m megatron_patch.data.merge --input DIR --output-prefix P`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_patch.data.command_line import status_of
from megatron_patch.data.index_header import IndexHeader, read_header
from megatron_patch.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megatron_patch.data.inputs import natural
from megatron_patch.data.sidecar import FINE_TUNING, describe, read_sidecar

SUMMED = ("documents", "sequences", "tokens", "empty", "records")


def merge_datasets(prefixes: Sequence[str], output_prefix: str) -> IndexHeader:
    """Write the documents of all `prefixes`, in this order, as one pair; it appears when it is complete.

    Where all have a sidecar the result has one. Raises ValueError when token types, tokenizers or kinds of content
    differ.
    """
    headers = [read_header(prefix) for prefix in prefixes]
    sidecars = [read_sidecar(prefix) for prefix in prefixes]
    _check_alike([header.dtype for header in headers], prefixes, "token types")
    described = {prefix: sidecar for prefix, sidecar in zip(prefixes, sidecars, strict=True) if sidecar}
    for what, said in (("tokenizers", _tokenizer), ("kinds of content", _content)):
        _check_alike([said(sidecar) for sidecar in described.values()], list(described), what)
    with IndexedDatasetBuilder(output_prefix, headers[0].dtype) as builder:
        for prefix in tqdm(prefixes, unit="dataset", disable=None):
            builder.append(IndexedDataset(prefix))
        builder.finalize(_together(sidecars) if all(sidecars) else None)
    return read_header(output_prefix)


def find_datasets(directory: str | os.PathLike[str], output_prefix: str) -> list[str]:
    """The prefixes of all pairs in `directory`, in natural order, without the one that is to be written again.

    Raises FileNotFoundError for a directory without pairs and for half a pair, ValueError where what is to be written
    again is not what an earlier merging of the others wrote.
    """
    every = {path.with_suffix("") for suffix in (".bin", ".idx") for path in Path(directory).glob(f"*{suffix}")}
    output = Path(output_prefix).resolve()
    prefixes = [os.fspath(path) for path in sorted(every, key=natural) if path.resolve() != output]
    if not prefixes:
        raise FileNotFoundError(f"{os.fspath(directory)!r} is no directory that holds .bin/.idx pairs")
    documents = sum(read_header(prefix).documents for prefix in prefixes)
    stands_there = len(prefixes) < len(every) and Path(f"{output_prefix}.idx").is_file()
    if stands_there and read_header(output_prefix).documents != documents:
        raise ValueError(
            f"{output_prefix} stands in {os.fspath(directory)!r} among what is to be merged, and would be lost; "
            "name another --output-prefix, or remove it if it was merged of the others before"
        )
    return prefixes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="megatron_patch.data.merge", allow_abbrev=False)
    parser.add_argument("--input", required=True, metavar="DIR", help="directory of .bin/.idx pairs")
    parser.add_argument("--output-prefix", required=True, help="<prefix>.bin and .idx are written")
    options = parser.parse_args(argv)
    return status_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    prefixes = find_datasets(options.input, options.output_prefix)
    header = merge_datasets(prefixes, options.output_prefix)
    for prefix in prefixes:
        print(f"read {prefix}")
    print(f"{header.prefix}: {header.documents:,} documents, {header.tokens:,} tokens ({header.dtype})")


def _check_alike(values: Sequence[str], prefixes: Sequence[str], what: str) -> None:
    for value, prefix in zip(values, prefixes, strict=True):
        if value != values[0]:
            raise ValueError(f"{prefixes[0]} and {prefix} have different {what}; only alike datasets are merged")


def _tokenizer(sidecar: dict[str, Any]) -> str:
    return sidecar["tokenizer"]["sha256"]


def _content(sidecar: dict[str, Any]) -> tuple[Any, ...]:
    """What its documents are: texts of any length, or samples of one."""
    kind = sidecar.get("kind")
    return (kind, sidecar.get("field"), sidecar["seq_length"] if kind == FINE_TUNING else None)


def _together(sidecars: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts added up, sources of all; of how they were made, what is the same for all."""
    first = sidecars[0]
    counts = {
        name: sum(sidecar[name] for sidecar in sidecars)
        for name in SUMMED
        if all(name in sidecar for sidecar in sidecars)
    }
    counts["longest"] = max(sidecar.get("longest", 0) for sidecar in sidecars)
    told = {"format_version", "tokenizer", "dtype", "sources", "skipped", *counts}
    made = {
        name: value
        for name, value in first.items()
        if name not in told and all(name in sidecar and sidecar[name] == value for sidecar in sidecars)
    }
    sources = [source for sidecar in sidecars for source in sidecar.get("sources", [])]
    return describe(first["tokenizer"], first["dtype"], counts, sources, **made)


if __name__ == "__main__":
    sys.exit(main())
