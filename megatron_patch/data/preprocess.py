"""JSON lines to `.bin/.idx` pairs: `python3 -m megatron_patch.data.preprocess --input FILE --output-prefix P …`."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.index_header import smallest_dtype
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.json_lines import Record, check_characters, parse_line
from megatron_patch.data.tokenizer import load_tokenizer, vocabulary_size

# Input bytes tokenised at once: enough to keep every worker busy, and what bounds memory.
BYTES_PER_BATCH = 1 << 20


class Report(NamedTuple):
    """What was written for one key."""

    prefix: str
    dtype: str
    documents: int
    tokens: int


def preprocess(
    path: str,
    output_prefix: str,
    tokenizer: PreTrainedTokenizerFast,
    json_keys: Sequence[str] = ("text",),
    *,
    append_eod: bool = False,
) -> list[Report]:
    """Tokenise every line of `path` into `<output_prefix>_<key>_document`, one document per line and key.

    A value is a text or a list of texts, which are tokenised apart and joined. A document without tokens gets no EOD
    but keeps its place. The files appear when all lines are done. Raises ValueError naming file, line and column.
    """
    if append_eod and tokenizer.eos_token_id is None:
        raise ValueError(f"--append-eod: the tokenizer in {tokenizer.name_or_path!r} has no EOS token")
    eod = tokenizer.eos_token_id if append_eod else None
    dtype = smallest_dtype(vocabulary_size(tokenizer))
    counts = dict.fromkeys(json_keys, (0, 0))
    with ExitStack() as stack:
        builders = {
            key: stack.enter_context(IndexedDatasetBuilder(f"{output_prefix}_{key}_document", dtype))
            for key in json_keys
        }
        for batch in _batches(path):
            for key, builder in builders.items():
                documents = _tokenise([_texts(record, key, place) for place, record in batch], tokenizer, eod)
                tokens = _append(builder, documents)
                counts[key] = (counts[key][0] + len(documents), counts[key][1] + tokens)
    return [Report(builders[key].prefix, dtype, *counts[key]) for key in json_keys]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    # The tokenizer's thread pool reads these once, at its first use.
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(options.workers))
    started = time.perf_counter()
    try:
        tokenizer = load_tokenizer(options.tokenizer_model, options.trust_remote_code)
        reports = preprocess(
            options.input, options.output_prefix, tokenizer, options.json_keys, append_eod=options.append_eod
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130  # what a shell reports for a command that Ctrl-C ended
    seconds = time.perf_counter() - started
    for report in reports:
        print(f"{report.prefix}: {report.documents:,} documents, {report.tokens:,} tokens ({report.dtype})")
    tokens = sum(report.tokens for report in reports)
    print(f"{reports[0].documents:,} lines, {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_patch.data.preprocess", allow_abbrev=False)
    parser.add_argument("--input", required=True, help="JSON lines, one document per line")
    parser.add_argument("--output-prefix", required=True, help="<prefix>_<key>_document.bin and .idx are written")
    parser.add_argument("--tokenizer-model", required=True, metavar="DIR", help="tokenizer directory")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys that hold text, a pair of files each")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the EOS token")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="tokenising threads")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer directory run its code")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _batches(path: str) -> Iterator[list[tuple[str, Record]]]:
    """Records with their places, in lists of about BYTES_PER_BATCH bytes; a bar on a terminal shows the progress."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"input {path!r} does not exist or is not a file")
    bar = tqdm(total=Path(path).stat().st_size, unit="B", unit_scale=True, disable=None, desc=Path(path).name)
    with Path(path).open("rb") as file, bar:
        number = 0
        while lines := file.readlines(BYTES_PER_BATCH):
            numbered = [(number + k, line) for k, line in enumerate(lines, 1) if line.strip()]
            yield [(f"{path}, line {k}", parse_line(line, path, k)) for k, line in numbered]
            number += len(lines)
            bar.update(sum(map(len, lines)))


def _texts(record: Record, key: str, place: str) -> list[str]:
    if key not in record:
        raise ValueError(f"{place}: no key {key!r} among {', '.join(record) or 'none'}; name others with --json-keys")
    texts = record[key] if isinstance(record[key], list) else [record[key]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: {key!r} is neither text nor a list of texts")
    for text in texts:
        try:
            check_characters(text)
        except ValueError as error:
            raise ValueError(f"{place}: {key!r}: {error}") from None
    return texts


def _tokenise(documents: list[list[str]], tokenizer: PreTrainedTokenizerFast, eod: int | None) -> list[list[int]]:
    flat = [text for texts in documents for text in texts]
    encodings = iter(tokenizer.backend_tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    result = []
    for texts in documents:
        ids = list(chain.from_iterable(encoding.ids for encoding in islice(encodings, len(texts))))
        if ids and eod is not None:
            ids.append(eod)
        result.append(ids)
    return result


def _append(builder: IndexedDatasetBuilder, documents: list[list[int]]) -> int:
    lengths = [len(ids) for ids in documents]
    total = sum(lengths)
    tokens = np.fromiter(chain.from_iterable(documents), np.int64, total)
    builder.add(tokens, [length for length in lengths if length], [int(length > 0) for length in lengths])
    return total


if __name__ == "__main__":
    sys.exit(main())
