"""Megatron-Core reads the three files of instruction data, and finds in them what its tokens say."""

import json
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.index_header import instruction_prefixes
from megatron_patch.data.preprocess_instructions import main

READER = Path(__file__).with_name("indexed_reader.py")
WORDS = ("<s>", "</s>", "<unk>", "[INST]", "[/INST]", "one", "two", "three", "four")
RECORDS = [
    {"instruction": "one", "input": "two", "output": "three four"},
    {"instruction": "one", "history": [["two", "two three"]], "output": "four"},
    {"instruction": "three", "output": "one [/INST] two"},
]
ANSWERS = [["three four </s>"], ["two three </s>", "four </s>"], ["one [/INST] two </s>"]]


def test_megatron_core_reads_the_answers_as_labels(tmp_path):
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **ends).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    for name, options in (("alone", []), ("packed", ["--pack", "--seq-length", "64"])):
        arguments = ["--input", str(tmp_path / "records.jsonl"), "--output-prefix", str(tmp_path / name)]
        arguments += ["--tokenizer-model", str(tmp_path / "tokenizer"), "--handler", "AlpacaStyleInstructionHandler"]
        assert main([*arguments, "--prompt-type", "mistral", "--workers", "1", *options]) == 0
    prefixes = [prefix for name in ("alone", "packed") for prefix in instruction_prefixes(str(tmp_path / name))]
    done = subprocess.run([sys.executable, str(READER), *prefixes], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    datasets = json.loads(done.stdout)
    for dataset, count in zip(datasets, (3, 3, 3, 1, 1, 1), strict=True):
        assert (dataset["dtype"], dataset["documents"]) == ("int32", list(range(count + 1)))
    assert answers(*datasets[:3]) == answers(*datasets[3:]) == ANSWERS


def answers(ids, mask, labels):
    """What is learned of each record, a text for every stretch of it."""
    found = []
    for row in zip(*(dataset["sequences"] for dataset in (ids, mask, labels)), strict=True):
        number = 0
        for token, segment, label in zip(*row, strict=True):
            if segment != number:
                assert (token, label) == (0, -100)  # each record begins with BOS
                found.append("")
                number = segment
            assert label in (-100, token)
            found[-1] += f" {WORDS[token]}" if label != -100 else "|"
    return [[answer.strip() for answer in text.split("|") if answer] for text in found]
