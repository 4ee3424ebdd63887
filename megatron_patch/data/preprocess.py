"""Text to `.bin/.idx` pairs: `python3 -m megatron_patch.data.preprocess --input FILE --output-prefix P …`.

Reading, tokenising and writing work on batches of their own, in threads; the tokenizer's batches use all cores.
"""

import argparse
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_patch.data.command_line import dataset_parser, limit_threads, positive, status_of
from megatron_patch.data.encoding import Encode, batch_encoder
from megatron_patch.data.index_header import smallest_dtype
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.inputs import Row, Rows, check_readable, read_rows, resolve_inputs
from megatron_patch.data.json_lines import check_characters
from megatron_patch.data.left_out import LeftOut, nothing_left_out
from megatron_patch.data.sentences import split_sentences
from megatron_patch.data.sidecar import describe, describe_source
from megatron_patch.data.tokenizer import begins_with_bos, identity, load_tokenizer, vocabulary_size

# Input bytes tokenised at once: enough to keep every worker busy, and what bounds memory.
BYTES_PER_BATCH = 1 << 20

Item, Made = TypeVar("Item"), TypeVar("Made")
Document = list[list[int]]  # its sequences


class Recipe(NamedTuple):
    """How documents are made: one per record and key, from the tokens of its text or list of texts.

    `append_eod` ends and `prepend_bos` begins every document that has tokens; `seq_length` leaves out the records with
    a document of as many tokens or more; `skip_bad_lines` leaves out the records that cannot be used.
    `split_sentences` makes every sentence a sequence of its document; they keep the white space that follows them if
    `keep_newlines`.
    """

    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    seq_length: int | None = None
    skip_bad_lines: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False

    @property
    def level(self) -> str:
        """What a sequence is, which ends the output's name."""
        return "sentence" if self.split_sentences else "document"


class Report(NamedTuple):
    """What was written for one key; `longest` is a document's tokens."""

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    longest: int
    empty: int


class Summary(NamedTuple):
    """A report per key, the input's bytes, and what was left out of it."""

    reports: list[Report]
    bytes: int
    left_out: LeftOut


class Texts(NamedTuple):
    """The texts of some records, for each key a list per record, and what was left out."""

    by_key: dict[str, list[list[str]]]
    read: int
    left_out: LeftOut


def preprocess(
    paths: Sequence[str | os.PathLike[str]], output_prefix: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> Summary:
    """Tokenise every record of `paths` into `<output_prefix>_<key>_document` (or `_sentence`), one document per record
    and key.

    A document without tokens gets neither BOS nor EOD but keeps its place. The files appear when all records are done.
    Raises ValueError naming file, line and column, or when there is no document or no token.
    """
    files = [Path(path) for path in paths]
    check_readable(files)
    if len(set(recipe.json_keys)) < len(recipe.json_keys):
        raise ValueError(f"--json-keys {' '.join(recipe.json_keys)}: a key is named twice; name every key once")
    begin, end = _ends(tokenizer, recipe)
    dtype = smallest_dtype(vocabulary_size(tokenizer))
    left_out = nothing_left_out()
    with ExitStack() as stack:
        prefixes = [f"{output_prefix}_{key}_{recipe.level}" for key in recipe.json_keys]
        builders = [stack.enter_context(IndexedDatasetBuilder(prefix, dtype)) for prefix in prefixes]
        tallies = [Counter() for _ in builders]
        encode = batch_encoder(tokenizer)
        # The threads of one batch are busy with the next while its longest text is still being encoded.
        together = 2 if tokenizer.is_fast else 1
        encoded = _in_turn(lambda texts: (texts, _encoded(texts, encode)), _ahead(_texts(files, recipe)), together)
        made = ((texts, _documents(texts, ids, recipe, begin, end)) for texts, ids in encoded)
        for texts, documents in _progress(made, files):
            left_out.include(texts.left_out)
            for builder, tally, ids in zip(builders, tallies, documents, strict=True):
                _append(builder, tally, ids)
        reports = [_report(prefix, dtype, tally) for prefix, tally in zip(prefixes, tallies, strict=True)]
        _check_any(reports, files, left_out)
        sources = [describe_source(path) for path in files]
        for builder, report, key in zip(builders, reports, recipe.json_keys, strict=True):
            builder.complete(_description(report, key, tokenizer, recipe, sources, left_out))
        for builder in builders:
            builder.publish()
    return Summary(reports, sum(source["bytes"] for source in sources), left_out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    limit_threads(options.workers)
    return status_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe._fields})
    started = time.perf_counter()
    paths = resolve_inputs(options.input, options.recursive)
    tokenizer = load_tokenizer(
        options.tokenizer_model, options.trust_remote_code, use_fast=not options.tokenizer_not_use_fast
    )
    summary = preprocess(paths, options.output_prefix, tokenizer, recipe)
    _tell(summary, time.perf_counter() - started)


def _parser() -> argparse.ArgumentParser:
    parser = dataset_parser("preprocess", "<prefix>_<key>_document")
    flag, switch = parser.add_argument, {"action": "store_true"}
    flag("--json-keys", nargs="+", default=["text"], help="keys that hold text, a pair of files each")
    flag("--append-eod", **switch, help="end every document with the EOS token")
    flag("--prepend-bos", **switch, help="begin every document with the BOS token, if the tokenizer's own texts do")
    flag("--seq-length", type=positive, help="leave out records with a document of as many tokens or more")
    flag("--split-sentences", **switch, help="every sentence is a sequence of its document, in <prefix>_<key>_sentence")
    flag("--keep-newlines", **switch, help="sentences keep the white space that follows them")
    flag("--tokenizer-not-use-fast", **switch, help="the slow tokenizer, where the directory has one")
    return parser


def _ends(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[list[int], list[int]]:
    """The tokens that begin and end every document."""
    if recipe.append_eod and tokenizer.eos_token_id is None:
        raise ValueError(f"--append-eod: the tokenizer in {tokenizer.name_or_path!r} has no EOS token")
    has_bos = recipe.prepend_bos and begins_with_bos(tokenizer)
    return [tokenizer.bos_token_id] * has_bos, [tokenizer.eos_token_id] * recipe.append_eod


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """`items`, the next one of which is made in a thread while one is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _in_turn(make: Callable[[Item], Made], items: Iterable[Item], together: int) -> Iterator[Made]:
    """What `make` returns for each item, `together` of which are made in threads while one is used."""
    with ThreadPoolExecutor(together) as threads:
        coming = deque()
        for item in items:
            coming.append(threads.submit(make, item))
            if len(coming) > together:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _texts(files: Iterable[Path], recipe: Recipe) -> Iterator[Texts]:
    done = 0
    for path in files:
        for rows in read_rows(path, recipe.json_keys, BYTES_PER_BATCH):
            yield _batch(rows, recipe, done + rows.position)
        done += path.stat().st_size


def _batch(rows: Rows, recipe: Recipe, read: int) -> Texts:
    by_key = {key: [] for key in recipe.json_keys}
    left_out = nothing_left_out(is_allowed=recipe.skip_bad_lines)
    for row in rows.rows:
        reason, sentence = _problem(row, recipe.json_keys)
        if reason:
            left_out.add(reason, sentence)
            continue
        for key, values in by_key.items():
            value = row.record[key]
            values.append(_sentences(value if isinstance(value, list) else [value], recipe))
    if rows.blank:
        left_out.counts["blank"] = rows.blank
    return Texts(by_key, read, left_out)


def _sentences(texts: list[str], recipe: Recipe) -> list[str]:
    if not recipe.split_sentences:
        return texts
    return [sentence for text in texts for sentence in split_sentences(text, keep_space=recipe.keep_newlines)]


def _problem(row: Row, keys: Iterable[str]) -> tuple[str, str]:
    """Why a row cannot be used, as one word to count and one sentence to read; two empty texts if it can."""
    if row.record is None:
        return "malformed", row.problem
    for key in keys:
        if key not in row.record:
            names = ", ".join(map(str, row.record)) or "none"
            return "missing key", f"{row.place}: no key {key!r} among {names}; name others with --json-keys"
        texts = row.record[key] if isinstance(row.record[key], list) else [row.record[key]]
        if not all(isinstance(text, str) for text in texts):
            return "not text", f"{row.place}: {key!r} is neither text nor a list of texts"
        for text in texts:
            try:
                check_characters(text)
            except ValueError as error:
                return "malformed", f"{row.place}: {key!r}: {error}"
    return "", ""


def _encoded(texts: Texts, encode: Encode) -> list[Iterable[list[int]]]:
    """For each key the ids of every text, to be read once."""
    return [encode(list(chain.from_iterable(documents))) for documents in texts.by_key.values()]


def _documents(
    texts: Texts, ids: list[Iterable[list[int]]], recipe: Recipe, begin: list[int], end: list[int]
) -> list[list[Document]]:
    """For each key a document per record; records with one that is too long are gone from all, and counted."""
    documents = [
        [_ended(document, begin, end) for document in _sequences(values, iter(every), recipe)]
        for values, every in zip(texts.by_key.values(), ids, strict=True)
    ]
    if recipe.seq_length is None:
        return documents
    is_short = [
        all(sum(map(len, document)) < recipe.seq_length for document in record)
        for record in zip(*documents, strict=True)
    ]
    if not all(is_short):
        texts.left_out.counts["too long"] += is_short.count(False)
    return [list(compress(column, is_short)) for column in documents]


def _sequences(documents: list[list[str]], ids: Iterator[list[int]], recipe: Recipe) -> Iterator[Document]:
    """The sequences of each document: one of all its texts, or one for each; none of them empty."""
    for texts in documents:
        own = islice(ids, len(texts))
        sequences = own if recipe.split_sentences else [list(chain.from_iterable(own))]
        yield [sequence for sequence in sequences if sequence]


def _ended(document: Document, begin: list[int], end: list[int]) -> Document:
    if document:
        document[0][:0] = begin
        document[-1] += end
    return document


def _append(builder: IndexedDatasetBuilder, tally: Counter[str], documents: list[Document]) -> None:
    lengths = [len(ids) for document in documents for ids in document]
    total = sum(lengths)
    every = chain.from_iterable(chain.from_iterable(documents))
    builder.add(np.fromiter(every, np.int64, total), lengths, [len(document) for document in documents])
    empty = sum(not document for document in documents)
    tally.update(documents=len(documents), sequences=len(lengths), tokens=total, empty=empty)
    longest = max((sum(map(len, document)) for document in documents), default=0)
    tally["longest"] = max(tally["longest"], longest)


def _report(prefix: str, dtype: str, tally: Counter[str]) -> Report:
    return Report(prefix, dtype, *(tally[name] for name in Report._fields[2:]))


def _check_any(reports: list[Report], files: list[Path], left_out: LeftOut) -> None:
    for report in reports:
        if not report.tokens:
            what = "token" if report.documents else "document"
            why = f"no {what}{left_out.in_brackets()}"
            raise ValueError(f"{report.prefix}: the input, {_named(files)}, holds {why}; nothing was written")


def _named(files: list[Path]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more files" if len(files) > 1 else "")


def _description(
    report: Report,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    sources: list[dict[str, Any]],
    left_out: LeftOut,
) -> dict[str, Any]:
    counts = {name: getattr(report, name) for name in Report._fields[2:]}
    made = {name: value for name, value in recipe._asdict().items() if name not in ("json_keys", "skip_bad_lines")}
    skipped = dict(sorted(left_out.counts.items()))
    return describe(identity(tokenizer), report.dtype, counts, sources, key=key, **made, skipped=skipped)


def _progress(
    items: Iterable[tuple[Texts, list[list[Document]]]], files: list[Path]
) -> Iterator[tuple[Texts, list[list[Document]]]]:
    """`items`, with a bar on a terminal."""
    total = sum(path.stat().st_size for path in files)
    documents = tokens = 0
    started = time.perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc=files[0].name) as bar:
        for texts, columns in items:
            documents += len(columns[0])
            tokens += sum(len(ids) for column in columns for document in column for ids in document)
            rate = tokens / (time.perf_counter() - started)
            bar.update(texts.read - bar.n)
            bar.set_postfix_str(f"{documents:,} documents, {rate:,.0f} tokens/s", refresh=False)
            yield texts, columns


def _tell(summary: Summary, seconds: float) -> None:
    summary.left_out.tell()
    for report in summary.reports:
        sentences = f" {report.sequences:,} sentences," if report.prefix.endswith("_sentence") else ""
        print(
            f"{report.prefix}: {report.documents:,} documents,{sentences} {report.tokens:,} tokens ({report.dtype}), "
            f"longest {report.longest:,}, {report.empty:,} empty"
        )
    tokens = sum(report.tokens for report in summary.reports)
    rates = f"{tokens / seconds:,.0f} tokens/s, {summary.bytes / seconds / 1e6:.1f} MB/s"
    print(f"{summary.reports[0].documents:,} records, {tokens:,} tokens in {seconds:.1f} s ({rates})")


if __name__ == "__main__":
    sys.exit(main())
