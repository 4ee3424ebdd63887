"""Fine-tuning records to a `.bin/.idx` pair: `python3 -m megatron_patch.data.preprocess_sft --input FILE …`."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from megatron_patch.data.chat_template import resolve_renderer
from megatron_patch.data.command_line import count, dataset_parser, limit_threads, positive, status_of
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.instructions import Item, Material, Tokenised, material_of, nothing_left, pad_id, tokenised
from megatron_patch.data.json_lines import check_objects
from megatron_patch.data.left_out import LeftOut, nothing_left_out
from megatron_patch.data.packing import packed
from megatron_patch.data.prompts import PROMPTS
from megatron_patch.data.records import resolve_names
from megatron_patch.data.sft_index import DTYPE, document
from megatron_patch.data.show import shown
from megatron_patch.data.sidecar import FINE_TUNING, describe, describe_source
from megatron_patch.data.tokenizer import identity, load_tokenizer

Group = list[Tokenised]  # the records of one sample


class Report(NamedTuple):
    """What was written: `documents` samples that hold `records`; `skipped` records had no room for an answer."""

    prefix: str
    documents: int
    records: int
    tokens: int
    truncated: int
    skipped: int


def preprocess(
    material: Material, output_prefix: str, *, seq_length: int, is_packed: bool, left_out: LeftOut | None = None
) -> Report:
    """Write `<output_prefix>_text_document`: a document of 2 × `seq_length` numbers per record, or per pack of them.

    A list of records is a pack of its own either way. What cannot be used goes to `left_out`; without it, it raises
    ValueError naming file and place, as an input of which no record remains does in any case. The files appear when all
    records are done.
    """
    left_out = nothing_left_out() if left_out is None else left_out
    counts: Counter[str] = Counter()
    groups = _usable(tokenised(material, left_out, check_objects), seq_length, counts, left_out)
    pad, prefix = pad_id(material.tokenizer), f"{output_prefix}_text_document"
    with IndexedDatasetBuilder(prefix, DTYPE) as builder:
        for records in _rows(groups, seq_length, is_packed=is_packed):
            builder.add(document(records, seq_length, pad), [2 * seq_length], [1])
            counts["documents"] += 1
        if not counts["documents"]:
            why = nothing_left(material.files, counts["skipped"], seq_length)
            raise ValueError(why + left_out.in_brackets())
        report = Report(prefix, *(counts[name] for name in Report._fields[1:]))
        builder.finalize(_description(report, material, seq_length, is_packed, left_out))
    return report


def _usable(
    items: Iterable[Item], seq_length: int, counts: Counter[str], left_out: LeftOut
) -> Iterator[tuple[Group, bool]]:
    """What goes into a sample together, and whether nothing else may be added."""
    for item in items:
        total = sum(len(record.ids) for record in item.records)
        if item.is_pack and total > seq_length:
            left_out.add(
                "pack too long",
                f"{item.place}: its {len(item.records)} records have {total} tokens together, but a sample has "
                f"{seq_length}; take some of them out, or raise SEQ_LEN",
            )
            continue
        if not any(record.learned[1 : seq_length + 1].any() for record in item.records):
            counts["skipped"] += len(item.records)
            continue
        size = min(total, seq_length)
        counts.update(records=len(item.records), tokens=size, truncated=int(total > seq_length))
        yield item.records, item.is_pack


def _rows(groups: Iterable[tuple[Group, bool]], seq_length: int, *, is_packed: bool) -> Iterator[Group]:
    """The records of each sample."""

    def size(group: tuple[Group, bool]) -> int:
        records, is_complete = group
        return seq_length if is_complete else min(len(records[0].ids), seq_length)

    for row in packed(groups, size, seq_length) if is_packed else ([group] for group in groups):
        yield [record for records, _ in row for record in records]


def _description(
    report: Report, material: Material, seq_length: int, is_packed: bool, left_out: LeftOut
) -> dict[str, Any]:
    counts = {"documents": report.documents, "tokens": report.documents * 2 * seq_length}
    made = {"seq_length": seq_length, "pack": is_packed, "segment_marks": True, "records": report.records}
    skipped = {
        "truncated": report.truncated,
        "skipped": report.skipped,
        "left_out": dict(sorted(left_out.counts.items())),
    }
    sources = [describe_source(path) for path in material.files]
    return describe(identity(material.tokenizer), DTYPE, counts, sources, kind=FINE_TUNING, **made, **skipped)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    limit_threads(options.workers)
    return status_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    names = resolve_names(options.map_keys)
    tokenizer = load_tokenizer(options.tokenizer_model, options.trust_remote_code)
    renderer = resolve_renderer(options.prompt_type, tokenizer, options.family_prompt)
    material = material_of(options.input, tokenizer, renderer, names, is_recursive=options.recursive)
    allowed = nothing_left_out(is_allowed=options.skip_bad_lines)
    every = chain.from_iterable(item.records for item in tokenised(material, allowed, check_objects))
    for record in islice(every, options.show_samples):
        print(shown(record, tokenizer, is_terminal=sys.stdout.isatty()), end="\n\n")
    left_out = nothing_left_out(is_allowed=options.skip_bad_lines)
    report = preprocess(
        material, options.output_prefix, seq_length=options.seq_length, is_packed=options.pack, left_out=left_out
    )
    _tell(report, left_out, options.seq_length, time.perf_counter() - started)


def _tell(report: Report, left_out: LeftOut, seq_length: int, seconds: float) -> None:
    left_out.tell()
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
    parser = dataset_parser("preprocess_sft", "<prefix>_text_document")
    flag, switch = parser.add_argument, {"action": "store_true"}
    flag("--seq-length", type=positive, required=True, help="tokens per sample, SEQ_LEN of the training")
    flag("--pack", **switch, help="several records per sample")
    names = ", ".join(PROMPTS)
    flag("--prompt-type", help=f"template: {names}; absent: the tokenizer's own, else --family-prompt's")
    flag("--family-prompt", default="alpaca", help="template where the tokenizer has none")
    flag("--map-keys", metavar="JSON", help="keys of the records' prompt, query, response, system or messages")
    flag("--show-samples", type=count, default=0, metavar="N", help="print N records, what is learned highlighted")
    return parser


if __name__ == "__main__":
    sys.exit(main())
