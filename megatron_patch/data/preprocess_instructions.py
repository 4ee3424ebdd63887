"""Records to ModelLink's instruction data: `python3 -m megatron_patch.data.preprocess_instructions --input FILE …`."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.chat_template import resolve_renderer
from megatron_patch.data.command_line import count, dataset_parser, limit_threads, positive, status_of
from megatron_patch.data.handlers import HANDLERS, Handler, check_recipe, resolve_handler
from megatron_patch.data.index_header import INSTRUCTION_FIELDS, instruction_prefixes, smallest_dtype
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.inputs import Row, check_readable, read_rows, resolve_inputs
from megatron_patch.data.instructions import Tokenised, encoded
from megatron_patch.data.left_out import LeftOut, nothing_left_out
from megatron_patch.data.packing import packed
from megatron_patch.data.prompts import PROMPTS, Rendered, Renderer, resolve_prompt
from megatron_patch.data.sft_index import DTYPE, IGNORED
from megatron_patch.data.sidecar import describe, describe_source
from megatron_patch.data.tokenizer import ends_with_eos, identity, load_tokenizer, vocabulary_size

BYTES_PER_BATCH = 1 << 20
SAMPLES_AT_ONCE = 1024  # while writing


class Recipe(NamedTuple):
    """How samples are made of records.

    `handler` says which columns are read, changed by `map_keys` (JSON), `prompt_type` which template renders them.
    `append_eod`: what ends otherwise ends with EOS. `seq_length` leaves out records of as many tokens or more; with
    `pack` several share a sample of at most as many.
    """

    handler: str
    map_keys: str | None = None
    prompt_type: str | None = None
    append_eod: bool = False
    seq_length: int | None = None
    pack: bool = False


class Report(NamedTuple):
    """What was written: `samples` hold `records`; `longest` is a sample's tokens."""

    prefixes: tuple[str, ...]
    samples: int
    records: int
    tokens: int
    longest: int


def preprocess(
    paths: Sequence[str | os.PathLike[str]],
    output_prefix: str,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    left_out: LeftOut,
    log: Callable[[int], None] = lambda records: None,
) -> Report:
    """Write `<output_prefix>_packed_{input_ids,attention_mask,labels}_document`, int32, one sequence per sample.

    Labels are −100 where nothing is learned, and not shifted; the mask numbers the records of a sample. A handler of
    texts writes `<output_prefix>_text_document`. The files appear when all records are done; `log` is told how many
    are. Raises ValueError naming the place of a record that cannot be used, and when none remains.
    """
    files = [Path(path) for path in paths]
    check_readable(files)
    handler, counts = resolve_handler(recipe.handler, recipe.map_keys), Counter()
    check_recipe(recipe.handler, pack=recipe.pack, seq_length=recipe.seq_length, prompt_type=recipe.prompt_type)
    _check_tokenizer(recipe, tokenizer)
    records = _kept(_tokenised(files, tokenizer, handler, recipe, left_out), recipe, left_out, counts, log)
    size = attrgetter("ids.size")
    rows = packed(records, size, recipe.seq_length) if recipe.pack else ([record] for record in records)
    names = (f"{output_prefix}_text_document",) if handler.is_text else instruction_prefixes(output_prefix)
    dtype = smallest_dtype(vocabulary_size(tokenizer)) if handler.is_text else DTYPE
    with ExitStack() as stack:
        builders = [stack.enter_context(IndexedDatasetBuilder(name, dtype)) for name in names]
        for samples in _together(rows):
            _append(builders, samples, counts)
        if not counts["samples"]:
            why = f"no record to make a sample of{left_out.in_brackets()}"
            raise ValueError(f"{files[0]} holds {why}; nothing was written")
        report = Report(names, *(counts[name] for name in Report._fields[1:]))
        told = _description(report, files, tokenizer, dtype, recipe, left_out)
        for builder, field in zip(builders, INSTRUCTION_FIELDS, strict=False):
            of_field = {} if handler.is_text else {"kind": "instructions", "field": field, "segment_marks": True}
            builder.complete(told | of_field)
        for name in names:  # rather none of them than new ones beside old ones
            Path(f"{name}.idx").unlink(missing_ok=True)
        for builder in builders:
            builder.publish()
    return report


def _description(
    report: Report,
    files: Iterable[Path],
    tokenizer: PreTrainedTokenizerFast,
    dtype: str,
    recipe: Recipe,
    left_out: LeftOut,
) -> dict[str, Any]:
    totals = {"documents": report.samples, "tokens": report.tokens, "longest": report.longest}
    made = recipe._asdict() | {"records": report.records, "skipped": dict(sorted(left_out.counts.items()))}
    return describe(identity(tokenizer), dtype, totals, map(describe_source, files), **made)


def _check_tokenizer(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
    if recipe.append_eod and tokenizer.eos_token_id is None:
        raise ValueError(f"--append-eod: the tokenizer in {tokenizer.name_or_path!r} has no EOS token")
    if not tokenizer.is_fast:
        raise ValueError(
            f"the slow tokenizer in {tokenizer.name_or_path!r} does not say where in a text its tokens stand, by which "
            "labels are made; leave --tokenizer-not-use-fast out"
        )


def _renderer(handler: Handler, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Renderer:
    if recipe.prompt_type is None and handler.template is not None:
        return resolve_prompt(handler.template, tokenizer, has_eos=recipe.append_eod)
    return resolve_renderer(recipe.prompt_type, tokenizer, "modellink")


def _tokenised(
    files: Iterable[Path], tokenizer: PreTrainedTokenizerFast, handler: Handler, recipe: Recipe, left_out: LeftOut
) -> Iterator[Tokenised]:
    renderer = _renderer(handler, recipe, tokenizer)
    eos = tokenizer.eos_token_id
    is_ended = renderer.adds_special_tokens and ends_with_eos(tokenizer)
    for record in encoded(_rendered(files, handler, renderer, left_out), tokenizer, renderer):
        # An EOS that the tokenizer adds to every text would be a second one, and not learned.
        ids, learned = (part[:-1] for part in record) if is_ended else record
        if recipe.append_eod and ids[-1:] != eos:
            yield Tokenised(np.append(ids, np.int32(eos)), np.append(learned, True))
        else:
            yield Tokenised(ids, learned)


def _rendered(files: Iterable[Path], handler: Handler, renderer: Renderer, left_out: LeftOut) -> Iterator[Rendered]:
    for path in files:
        for rows in read_rows(path, None, BYTES_PER_BATCH):
            if rows.blank:
                left_out.counts["blank"] += rows.blank
            for row in rows.rows:
                try:
                    yield _render(row, handler, renderer)
                except ValueError as error:
                    left_out.add("malformed", str(error))


def _render(row: Row, handler: Handler, renderer: Renderer) -> Rendered:
    if row.record is None:
        raise ValueError(row.problem)
    try:
        said = handler.read(row.record, handler.columns)
        if not isinstance(said, str):
            return renderer.render(said)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from None
    return Rendered(said, ())


def _kept(
    records: Iterable[Tokenised], recipe: Recipe, left_out: LeftOut, counts: Counter[str], log: Callable[[int], None]
) -> Iterator[Tokenised]:
    for record in records:
        if recipe.seq_length is not None and len(record.ids) >= recipe.seq_length:
            left_out.counts["too long"] += 1
            continue
        counts["records"] += 1
        log(counts["records"])
        yield record


def _together(rows: Iterable[list[Tokenised]]) -> Iterator[list[list[Tokenised]]]:
    rows = iter(rows)
    while samples := list(islice(rows, SAMPLES_AT_ONCE)):
        yield samples


def _append(
    builders: Sequence[IndexedDatasetBuilder], samples: Sequence[Sequence[Tokenised]], counts: Counter[str]
) -> None:
    lengths = [sum(len(record.ids) for record in sample) for sample in samples]
    every = [record for sample in samples for record in sample]
    numbers = [np.full(len(record.ids), number) for sample in samples for number, record in enumerate(sample, 1)]
    columns = [[record.ids for record in every], numbers, [_labels(record) for record in every]]
    for builder, column in zip(builders, columns, strict=False):
        builder.add(np.concatenate(column), lengths, [1] * len(lengths))
    counts.update(samples=len(samples), tokens=sum(lengths))
    counts["longest"] = max(counts["longest"], *lengths)


def _labels(record: Tokenised) -> npt.NDArray:
    """Nothing tells a first token, so that it is not learned."""
    labels = np.where(record.learned, record.ids, IGNORED)
    labels[:1] = IGNORED
    return labels


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    limit_threads(options.workers)
    return status_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe._fields})
    started, left_out = time.perf_counter(), nothing_left_out(is_allowed=options.skip_bad_lines)
    paths = resolve_inputs(options.input, options.recursive)
    tokenizer = load_tokenizer(
        options.tokenizer_model, options.trust_remote_code, use_fast=not options.tokenizer_not_use_fast
    )

    def log(records: int) -> None:
        if options.log_interval and records % options.log_interval == 0:
            rate = records / (time.perf_counter() - started)
            print(f"{records:,} records ({rate:,.0f} records/s)", file=sys.stderr, flush=True)

    report = preprocess(paths, options.output_prefix, tokenizer, recipe, left_out, log)
    left_out.tell()
    print(
        f"{', '.join(report.prefixes)}: {report.records:,} records in {report.samples:,} samples, {report.tokens:,} "
        f"tokens, longest {report.longest:,}"
    )
    print(f"{report.tokens / (time.perf_counter() - started):,.0f} tokens/s")


def _parser() -> argparse.ArgumentParser:
    parser = dataset_parser("preprocess_instructions", "<prefix>_packed_<field>_document")
    flag, switch = parser.add_argument, {"action": "store_true"}
    flag("--handler", required=True, choices=list(HANDLERS), help="what a record's columns mean")
    flag("--map-keys", metavar="JSON", help='columns of other names, such as {"prompt": "question"}')
    flag("--prompt-type", help=f"template: {', '.join(PROMPTS)}; absent: the handler's own")
    flag("--append-eod", **switch, help="end every answer, or text, with the EOS token")
    flag("--seq-length", type=positive, help="leave out records of as many tokens or more")
    flag("--pack", **switch, help="several records per sample of --seq-length tokens")
    flag("--log-interval", type=count, default=0, metavar="N", help="say after every N records how far it is")
    flag("--tokenizer-not-use-fast", **switch, help="accepted: labels need the fast tokenizer")
    return parser


if __name__ == "__main__":
    sys.exit(main())
