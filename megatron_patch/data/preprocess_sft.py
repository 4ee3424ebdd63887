"""Fine-tuning records to a `.bin/.idx` pair: `python3 -m megatron_patch.data.preprocess_sft --input FILE …`."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from megatron_patch.data.chat_template import resolve_renderer
from megatron_patch.data.command_line import count, limit_threads, positive, status_of
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.instructions import Tokenised, nothing_left, pad_id, tokenised
from megatron_patch.data.packing import pack
from megatron_patch.data.prompts import PROMPTS, Renderer
from megatron_patch.data.sft_index import DTYPE, document
from megatron_patch.data.show import shown
from megatron_patch.data.sidecar import describe, describe_source
from megatron_patch.data.tokenizer import identity, load_tokenizer


class Report(NamedTuple):
    """What was written: `documents` samples that hold `records`; `skipped` records had no room for an answer."""

    prefix: str
    documents: int
    records: int
    tokens: int
    truncated: int
    skipped: int


def preprocess(
    path: str,
    output_prefix: str,
    tokenizer: PreTrainedTokenizerFast,
    renderer: Renderer,
    *,
    seq_length: int,
    is_packed: bool,
) -> Report:
    """Write `<output_prefix>_text_document`: a document of 2 × `seq_length` numbers per record, or per pack of them.

    The files appear when all records are done. Raises ValueError naming file and place of a malformed record, and when
    no record remains.
    """
    counts: Counter[str] = Counter()
    records = _usable(tokenised(path, tokenizer, renderer), seq_length, counts)
    prefix = f"{output_prefix}_text_document"
    with IndexedDatasetBuilder(prefix, DTYPE) as builder:
        for row in _packed(records, seq_length) if is_packed else ([record] for record in records):
            builder.add(document(row, seq_length, pad_id(tokenizer)), [2 * seq_length], [1])
            counts["documents"] += 1
        if not counts["documents"]:
            raise ValueError(nothing_left(path, counts["skipped"], seq_length))
        report = Report(prefix, *(counts[name] for name in Report._fields[1:]))
        builder.finalize(_description(report, path, tokenizer, seq_length, is_packed))
    return report


def _usable(records: Iterable[Tokenised], seq_length: int, counts: Counter[str]) -> Iterator[Tokenised]:
    for record in records:
        if not record.learned[1 : seq_length + 1].any():
            counts["skipped"] += 1
            continue
        size = min(len(record.ids), seq_length)
        counts.update(records=1, tokens=size, truncated=int(len(record.ids) > seq_length))
        yield record


def _packed(records: Iterable[Tokenised], seq_length: int) -> Iterator[list[Tokenised]]:
    """Rows of records; what waits in memory is what the open rows hold."""
    waiting: dict[int, Tokenised] = {}

    def sizes() -> Iterator[int]:
        for place, record in enumerate(records):
            waiting[place] = record
            yield min(len(record.ids), seq_length)

    for row in pack(sizes(), seq_length):
        yield [waiting.pop(place) for place in row]


def _description(
    report: Report, path: str, tokenizer: PreTrainedTokenizerFast, seq_length: int, is_packed: bool
) -> dict:
    counts = {"documents": report.documents, "tokens": report.documents * 2 * seq_length}
    made = {"seq_length": seq_length, "pack": is_packed, "segment_marks": True, "records": report.records}
    skipped = {"truncated": report.truncated, "skipped": report.skipped}
    return describe(identity(tokenizer), DTYPE, counts, [describe_source(path)], kind="fine-tuning", **made, **skipped)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    limit_threads(options.workers)
    return status_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    tokenizer = load_tokenizer(options.tokenizer_model, options.trust_remote_code)
    renderer = resolve_renderer(options.prompt_type, tokenizer, options.family_prompt)
    for record in islice(tokenised(options.input, tokenizer, renderer), options.show_samples):
        print(shown(record, tokenizer, is_terminal=sys.stdout.isatty()), end="\n\n")
    report = preprocess(
        options.input,
        options.output_prefix,
        tokenizer,
        renderer,
        seq_length=options.seq_length,
        is_packed=options.pack,
    )
    _tell(report, options.seq_length, time.perf_counter() - started)


def _tell(report: Report, seq_length: int, seconds: float) -> None:
    filled = report.tokens / (report.documents * seq_length)
    print(
        f"{report.prefix}: {report.records:,} records in {report.documents:,} samples of {seq_length:,} tokens, "
        f"{filled:.1%} filled ({DTYPE})"
    )
    if report.truncated or report.skipped:
        print(
            f"{report.truncated:,} records truncated; {report.skipped:,} left out, their prompts alone are longer than "
            f"{seq_length:,} tokens"
        )
    print(f"{report.tokens:,} tokens in {seconds:.1f} s ({report.tokens / seconds:,.0f} tokens/s)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_patch.data.preprocess_sft", allow_abbrev=False)
    flag, switch = parser.add_argument, {"action": "store_true"}
    flag("--input", required=True, help="JSON or JSON lines, one conversation per record")
    flag("--output-prefix", required=True, help="<prefix>_text_document.bin, .idx and .json are written")
    flag("--tokenizer-model", required=True, metavar="DIR", help="tokenizer directory")
    flag("--seq-length", type=positive, required=True, help="tokens per sample, SEQ_LEN of the training")
    flag("--pack", **switch, help="several records per sample")
    names = ", ".join(PROMPTS)
    flag("--prompt-type", help=f"template: {names}; absent: the tokenizer's own, else --family-prompt's")
    flag("--family-prompt", default="alpaca", help="template where the tokenizer has none")
    flag("--show-samples", type=count, default=0, metavar="N", help="print N records, what is learned highlighted")
    flag("--workers", type=positive, default=os.cpu_count() or 1, help="tokenising threads")
    flag("--trust-remote-code", **switch, help="let the tokenizer directory run its code")
    return parser


if __name__ == "__main__":
    sys.exit(main())
