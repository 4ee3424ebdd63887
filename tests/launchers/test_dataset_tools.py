"""The documented commands of other projects' preprocessing, and merging: planned, refused and run."""

import json
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
from commands import ROOT, clean_environment

from megatron_patch.data import merge, preprocess
from megatron_patch.data.indexed import IndexedDataset
from megatron_patch.data.tokenizer import load_tokenizer

MODELLINK = (
    "--input ./dataset/train-00000-of-00001.parquet --tokenizer-name-or-path ./model_from_hf/Mistral/ "
    "--output-prefix ./dataset/Mistral-7B/alpaca --workers 4 --log-interval 1000 --tokenizer-type PretrainedFromHF"
)
MIXTRAL_TRAIN = (
    "--input ./data/common_crawl --output-prefix ./encoded/common_crawl --json_keys text --dataset-impl mmap "
    "--tokenizer-type PretrainedTokenizerFromHF --tokenizer-model ./model_from_hf/Mistral --append-eod --workers 8"
)


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """A word-level tokenizer that puts a BOS in front of texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("<s>", "</s>", "<unk>", *map(str, range(20))))}
    core = Tokenizer(models.WordLevel(words, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    directory = tmp_path_factory.mktemp("tokenizer")
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **ends).save_pretrained(directory)
    return directory


@pytest.fixture
def workplace(tmp_path, tokenizer_files):
    """What the documented commands find in their directory."""
    (tmp_path / "model_from_hf").mkdir()
    (tmp_path / "model_from_hf/Mistral").symlink_to(tokenizer_files)
    (tmp_path / "data/common_crawl").mkdir(parents=True)
    for number in (10, 2, 1, 0):
        (tmp_path / f"data/common_crawl/{number}.jsonl").write_text(json.dumps({"text": f"{number} 19"}) + "\n\n")
    return tmp_path


def run(planned, launcher, module, arguments):
    command = planned(launcher, arguments)["command"]
    assert command[:2] == [sys.executable, "-m"] and command[2] == module.__name__
    return module.main(command[3:])


def documents(prefix):
    dataset = IndexedDataset(prefix)
    return [dataset[first].tolist() for first, last in pairwise(dataset.document_indices.tolist()) if last > first]


def test_mixtral_trains_command_reads_a_directory_in_natural_order(planned, workplace, capsys):
    assert run(planned, "preprocess-data", preprocess, shlex.split(MIXTRAL_TRAIN)) == 0
    ids = load_tokenizer("model_from_hf/Mistral").convert_tokens_to_ids
    expected = [ids(["<s>", str(number), "19", "</s>"]) for number in (0, 1, 2, 10)]
    assert documents("encoded/common_crawl_text_document") == expected
    assert "left out: 4 blank" in capsys.readouterr().out


def test_modellinks_command_reads_parquet(planned, workplace):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (workplace / "dataset").mkdir()
    table = pyarrow.table({"instruction": ["1", "2"], "text": ["3 4", "5"]})
    parquet.write_table(table, workplace / "dataset/train-00000-of-00001.parquet")
    assert run(planned, "preprocess-data", preprocess, shlex.split(MODELLINK)) == 0
    ids = load_tokenizer("model_from_hf/Mistral").convert_tokens_to_ids
    assert documents("dataset/Mistral-7B/alpaca_text_document") == [ids(["<s>", "3", "4"]), ids(["<s>", "5"])]


def test_a_malformed_line_leaves_nothing(planned, workplace, capsys):
    with (workplace / "data/common_crawl/2.jsonl").open("a") as file:
        file.write('{"text": \n')
    assert run(planned, "preprocess-data", preprocess, shlex.split(MIXTRAL_TRAIN)) == 1
    assert "2.jsonl, line 3, column" in capsys.readouterr().err
    assert not list((workplace / "encoded").iterdir())


def test_the_scripts_run_from_anywhere(workplace):
    for script, arguments, output in (
        ("preprocess_data.py", shlex.split(MIXTRAL_TRAIN), "./encoded/common_crawl_text_document"),
        ("merge_datasets.py", ["--input", "data", "--output-prefix", "all/of it"], "all/of it"),
    ):
        command = [sys.executable, str(ROOT / "toolkits" / script), *arguments]
        environment = clean_environment(MP_DRY_RUN="1")
        result = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert output in json.loads(result.stdout)["output"].values()


def test_several_inputs_and_keys_reach_the_command(planned):
    arguments = shlex.split("--input a 'b c' --output-prefix o --json-keys x y --tokenizer-model t --seq-length 9")
    plan = planned("preprocess-data", arguments)
    assert plan["output"] == {"x_document": "o_x_document", "y_document": "o_y_document"}
    options = preprocess._parser().parse_args(plan["command"][3:])
    assert (options.input, options.json_keys, options.seq_length) == (["a", "b c"], ["x", "y"], 9)
    assert (options.workers, options.append_eod, options.prepend_bos) == (1, False, True)
    assert plan["warnings"][0].startswith("input 'a' is no file")


def test_merging_is_planned_and_done(planned, workplace, capsys):
    arguments = shlex.split(MIXTRAL_TRAIN)
    for number, name in enumerate(("encoded/9", "encoded/10")):
        given = [*arguments, "--recursive"]
        given[1], given[3] = f"data/common_crawl/{number}.jsonl", name
        assert run(planned, "preprocess-data", preprocess, given) == 0
        capsys.readouterr()
    assert run(planned, "merge-datasets", merge, ["--input", "encoded", "--output-prefix", "encoded/all"]) == 0
    ids = load_tokenizer("model_from_hf/Mistral").convert_tokens_to_ids
    assert documents("encoded/all") == [ids(["<s>", text, "19", "</s>"]) for text in "01"]


BASIC = "--input data --output-prefix o"


def test_sentences_are_sequences_of_their_documents(planned, workplace, capsys):
    text = {"text": "1 2. 3?\n4 5. 6"}
    (workplace / "in.jsonl").write_text(json.dumps(text) + "\n")
    arguments = shlex.split("--input in.jsonl --output-prefix o --tokenizer-model model_from_hf/Mistral --append-eod")
    plan = planned("preprocess-data", [*arguments, "--split-sentences"])
    assert plan["output"] == {"text_sentence": "o_text_sentence"}
    assert run(planned, "preprocess-data", preprocess, [*arguments, "--split-sentences"]) == 0
    dataset = IndexedDataset("o_text_sentence")
    assert dataset.sequence_lengths.tolist() == [1 + 3, 2, 3, 1 + 1]  # BOS, words and marks, EOS
    assert dataset.document_indices.tolist() == [0, 4]
    assert "1 documents, 4 sentences, 11 tokens" in capsys.readouterr().out
    (warning,) = planned("preprocess-data", [*arguments, "--keep-newlines"])["warnings"]
    assert "no effect without --split-sentences" in warning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (MIXTRAL_TRAIN.replace("./model_from_hf/Mistral", ""), "--tokenizer-model is followed by 0 values, not one"),
        (BASIC, "--tokenizer-name-or-path and --tokenizer-model are missing"),
        (f"{BASIC} --tokenizer-model a --tokenizer-name-or-path b", "name two tokenizers"),
        (f"{BASIC} --tokenizer-model a --json-keys x --json_keys y", "one flag in two spellings"),
        (f"{BASIC} --tokenizer-model a --tokenizer-type GPT2BPETokenizer", "--tokenizer-type is 'GPT2BPETokenizer'"),
        (f"{BASIC} --tokenizer-model a --worker 3", "did you mean --workers?"),
        (f"{BASIC} --tokenizer-model absent", "tokenizer directory 'absent' does not exist"),
        (f"{BASIC} --tokenizer-model absent", "holds no .jsonl"),
    ],
)
def test_what_cannot_be_run_is_refused(refused, workplace, arguments, message):
    assert message in refused("preprocess-data", shlex.split(arguments))


def test_merging_what_is_absent_is_refused(refused):
    assert "input 'absent' is no directory" in refused(
        "merge-datasets", ["--input", "absent", "--output-prefix", "all"]
    )
