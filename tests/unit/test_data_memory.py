"""Memory of preprocessing: that of a few batches whatever the size of the input, and in proportion to a long line."""

import json
import random
import subprocess
import sys

import pytest

# Peaks of anonymous memory in MB, of one process that reads each input in turn; the first is to warm it up.
PROGRAM = """
import sys, threading
from importlib import import_module
from pathlib import Path

command, where, sources, *options = sys.argv[1:]
module = import_module(f"megatron_patch.data.{command}")
import_module(f"megatron_patch.data.{where}").BYTES_PER_BATCH = 1 << 15

def used():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1000

def watch(seen, over):
    while not over.wait(0.005):
        seen.append(used())

for source in sources.split(","):
    seen, over = [used()], threading.Event()
    watching = threading.Thread(target=watch, args=(seen, over))
    watching.start()
    status = module.main(["--input", source, *options])
    over.set()
    watching.join()
    print("peak", max(seen), "status", status)
"""
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def peaks(command, where, sources, *options):
    arguments = [sys.executable, "-c", PROGRAM, command, where, ",".join(map(str, sources)), *map(str, options)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("peak")]
    assert [line[3] for line in lines] == ["0"] * len(sources), result.stderr
    return [float(line[1]) for line in lines]


@pytest.mark.parametrize(
    ("command", "where", "key", "more"),
    [
        ("preprocess", "preprocess", "text", ["--append-eod"]),
        ("preprocess_sft", "instructions", "output", ["--seq-length", "512", "--pack"]),
    ],
)
def test_memory_grows_with_the_longest_line_and_not_with_the_input(
    command, where, key, more, tmp_path, tokenizer_directory
):
    generator, words = random.Random(0), ["self", "return", "value", "import", "None", "\n    ", "def"]
    lines = [{"instruction": "q", key: " ".join(generator.choices(words, k=150))} for _ in range(1600)]
    long = {"instruction": "q", key: "return value, None\n    " * 12_000}
    for name, records in {"small": lines[:200], "large": lines, "long": [*lines[:200], long]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = [tmp_path / f"{name}.jsonl" for name in ("small", "small", "large", "long")]
    options = ["--output-prefix", tmp_path / "out", "--tokenizer-model", tokenizer_directory, "--workers", "2", *more]
    _, small, large, longest = peaks(command, where, sources, *options)
    assert large < small + 8, "the input has 1.5 MB, eight times the other; 10 % of the peak would be 18"
    assert longest < large + 200 * len(long[key]) / 1e6, "200 bytes for each of a line that is nine batches long"
