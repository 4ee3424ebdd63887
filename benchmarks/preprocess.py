"""How fast text becomes tokens, beside Megatron-LM's algorithm and tokenizers: `python3 benchmarks/preprocess.py`.

Without options that is 220 MB, 2 workers and two rounds: about 7 minutes on 2 cores, 2 GB of disk, which it gives back.

The text is that of the standard library and site-packages, each file once; the tokenizer is a Llama-style BPE trained
from a part of it. Every figure is the fastest of alternating runs over one file. A run is a process of its own that
times itself after its tokenizer is loaded and its workers are ready. Megatron-LM's algorithm: a pool of processes, one
`json.loads` and one call of transformers' tokenizer per line, ids sent back and written in order; below it the same
with the bare tokenizer of the `tokenizers` library, which Megatron-LM does not do. `encode_batch_fast` alone: nothing
read, parsed or written while the clock runs, in batches larger than ours, so that its threads seldom wait for a last
text. All that write, write the same bytes. Memory is the highest of the process that writes (of ours there is no
other), the interpreter and its libraries included.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import sentencepiece
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.data.preprocess import Recipe, preprocess
from megatron_patch.data.tokenizer import load_tokenizer

SUFFIXES = {".py", ".pyi", ".pyx", ".h", ".hpp", ".c", ".rst", ".md", ".txt", ".js", ".json", ".yaml"}
LONGEST = 1 << 20  # bytes of a file that still counts as text somebody wrote
LINES_PER_TASK = 32  # Megatron-LM's
BYTES_ALONE = 8 << 20  # what encode_batch_fast alone is given at once
PART = 4  # memory is also measured over this part of the file
OURS_OF_PART = f"ours, 1/{PART} of the file"
Encode = Callable[[PreTrainedTokenizerFast, str], list[int]]
CHARACTERS_PER_LINE = 4000  # of those that the tokenizer is trained from


def main() -> None:
    """Print, per way, seconds, MB/s and memory, and how ours compares."""
    options = _parser().parse_args()
    if options.way:
        name, source, directory, output = options.way
        print(json.dumps(measure(WAYS[name], Path(source), directory, output, options.workers)))
        return
    size, vocabulary = (2, 2000) if options.tiny else (options.megabytes, 32000)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        source = write_corpus(directory / "corpus.jsonl", size * 10**6)
        part = write_part(source, directory / "part.jsonl", source.stat().st_size // PART)
        train_tokenizer(source, directory / "tokenizer", vocabulary)
        jobs = {name: (name, source) for name in WAYS} | {OURS_OF_PART: ("ours", part)}
        results = {name: [] for name in jobs}
        for _ in range(1 if options.tiny else options.runs):
            for job, (way, file) in jobs.items():
                results[job].append(start(way, file, directory, options.workers))
                print(f"{job}: {results[job][-1]['seconds']:.1f} s", file=sys.stderr)
        report(results, source, part, options.workers, vocabulary)
        check_equal(directory)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=220)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="2 MB, once: to see that it runs")
    parser.add_argument("--directory", type=Path, help="where; default: the system's temporary directory")
    parser.add_argument("--way", nargs=4, metavar=("NAME", "SOURCE", "TOKENIZER", "OUTPUT"), help="run one way only")
    return parser


def texts_here() -> Iterator[str]:
    """The text files of the standard library and of installed packages, each content once."""
    seen = set()
    for root in sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file() or not 0 < path.stat().st_size <= LONGEST:
                continue
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest in seen:
                continue
            seen.add(digest)
            try:
                yield content.decode()
            except UnicodeDecodeError:
                continue


def write_corpus(path: Path, size: int) -> Path:
    """JSON lines of about `size` bytes. Raises ValueError where there is less text than that."""
    written = 0
    with path.open("wb") as file:
        for text in texts_here():
            written += file.write(json.dumps({"text": text}).encode() + b"\n")
            if written >= size:
                return path
    raise ValueError(f"only {written / 1e6:.0f} MB of text are installed here; ask for less with --megabytes")


def write_part(source: Path, path: Path, size: int) -> Path:
    """The first lines of `source`, about `size` bytes."""
    with source.open("rb") as file:
        path.write_bytes(b"".join(file.readlines(size)))
    return path


def train_tokenizer(source: Path, directory: Path, vocabulary: int) -> None:
    """A sentencepiece BPE with byte fallback, read as Llama's, from the beginning of texts all over `source`."""
    with source.open("rb") as file:
        step = max(1, source.stat().st_size // 5_000_000)  # about every text of the tiny corpus
        lines = (json.loads(line)["text"][:CHARACTERS_PER_LINE] for line in islice(file, None, None, step))
        sentences = [part for text in lines for part in text.splitlines() if part.strip()]
    directory.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


def start(way: str, source: Path, directory: Path, workers: int) -> dict[str, float]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--workers", str(workers), "--way", way, str(source)]
    command += [str(directory / "tokenizer"), str(directory / f"{way}-{source.stem}".replace(" ", "_"))]
    environment = os.environ | {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure(way: Callable[..., float], source: Path, directory: str, output: str, workers: int) -> dict[str, float]:
    """Seconds of one way, and the megabytes this process took at most."""
    seconds = way(source, directory, output, workers)
    return {"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def ours(source: Path, directory: str, output: str, workers: int) -> float:
    """What the command does after loading its tokenizer."""
    tokenizer = load_tokenizer(directory)
    begin = time.perf_counter()
    preprocess([source], output, tokenizer, Recipe())
    return time.perf_counter() - begin


def megatron(encode: Encode, source: Path, directory: str, output: str, workers: int) -> float:
    """A line at a time over a pool of processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = get_context("spawn")
    ready = context.Barrier(workers + 1)
    with context.Pool(workers, prepare, (directory, ready)) as pool, source.open("rb") as file:
        ready.wait()
        begin = time.perf_counter()
        with IndexedDatasetBuilder(f"{output}_text_document", "uint16") as builder:
            for ids in pool.imap(partial(encode_line, encode, directory), file, LINES_PER_TASK):
                builder.add(np.array(ids, np.int64), [len(ids)] if ids else [], [int(bool(ids))])
        return time.perf_counter() - begin


def prepare(directory: str, ready: Barrier) -> None:
    """Load a worker's tokenizer, and wait for the other workers."""
    loaded(directory)
    ready.wait()


def encode_line(encode: Encode, directory: str, line: bytes) -> list[int]:
    """One line's ids."""
    return encode(loaded(directory), json.loads(line)["text"])


def by_transformers(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """As Megatron-LM's own wrapper of Hugging Face tokenizers does it."""
    return tokenizer(text, add_special_tokens=False).input_ids


def by_tokenizers(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The same without what transformers adds."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@cache
def loaded(directory: str) -> PreTrainedTokenizerFast:
    """A process loads its tokenizer once."""
    return load_tokenizer(directory)


def tokenizers_alone(source: Path, directory: str, output: str, workers: int) -> float:
    """Only `encode_batch_fast`, its results dropped."""
    tokenizer, seconds = loaded(directory).backend_tokenizer, 0.0
    with source.open("rb") as file:
        while lines := file.readlines(BYTES_ALONE):
            texts = [json.loads(line)["text"] for line in lines]
            begin = time.perf_counter()
            tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            seconds += time.perf_counter() - begin
    return seconds


WAYS = {
    "ours": ours,
    "Megatron-LM's algorithm": partial(megatron, by_transformers),
    "the same, bare tokenizers": partial(megatron, by_tokenizers),
    "encode_batch_fast alone": tokenizers_alone,
}


def report(results: dict[str, list[dict]], source: Path, part: Path, workers: int, vocabulary: int) -> None:
    """One line per way, then how ours compares, in time and in memory."""
    print(
        f"{source.stat().st_size / 1e6:.0f} MB of JSON lines, vocabulary {vocabulary}, {workers} workers, "
        f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), load {os.getloadavg()[1]:.1f}, "
        f"tokenizers {version('tokenizers')}, transformers {version('transformers')}; fastest of {len(results['ours'])}"
    )
    fastest = {name: min(run["seconds"] for run in runs) for name, runs in results.items()}
    memory = {name: max(run["megabytes"] for run in runs) for name, runs in results.items()}
    for name in results:
        size = (part if name == OURS_OF_PART else source).stat().st_size / 1e6
        print(f"{name:28} {fastest[name]:8.1f} s {size / fastest[name]:7.2f} MB/s {memory[name]:7.0f} MB of memory")
    for name in list(WAYS)[1:]:
        pairs = [
            theirs["seconds"] / ours["seconds"] for ours, theirs in zip(results["ours"], results[name], strict=True)
        ]
        rounds = ", ".join(f"{ratio:.2f}" for ratio in pairs)
        print(f"ours is {fastest[name] / fastest['ours']:.2f} × as fast as {name} (round by round: {rounds})")
    more = memory["ours"] - memory[OURS_OF_PART]
    print(f"{PART} times the file takes {more:+.0f} MB, {memory['ours'] / memory[OURS_OF_PART]:.2f} × the memory")


def check_equal(directory: Path) -> None:
    """Raise ValueError unless all three that write wrote the same tokens."""
    written: Iterable[bytes] = [path.read_bytes() for path in sorted(directory.glob("*-corpus_text_document.bin"))]
    if len(written) != 3 or len(set(written)) != 1:
        raise ValueError("the three that write wrote different tokens")
    print("all wrote the same tokens")


if __name__ == "__main__":
    main()
