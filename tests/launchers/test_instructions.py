"""ModelLink's fine-tuning from its document: the command that makes instruction data, and the runs that read it."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from commands import MISTRAL, PRETRAINING, ROOT, changed, clean_environment, through_shell
from tiny import write_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_patch.config.flags import from_flags
from megatron_patch.data import handlers, preprocess_instructions
from megatron_patch.data.indexed import IndexedDataset
from megatron_patch.launch.dataset_tables import HANDLERS, PRETRAIN_HANDLER

# The document's lines; the directory of the program alone is this repository's.
DOCUMENT = """
mkdir ./finetune_dataset/Mistral-7B/
python {root}/toolkits/preprocess_data.py \\
    --input ./finetune_dataset/Alpaca_data_gpt4_zh.jsonl \\
    --output-prefix ./finetune_dataset/Mistral-7B/alpaca \\
    --tokenizer-type PretrainedFromHF \\
    --tokenizer-name-or-path ./model_from_hf/Mistral-7B-Instruct-v0.2/ \\
    --append-eod \\
    --tokenizer-not-use-fast \\
    --handler-name GeneralInstructionHandler \\
    --workers 4
"""
PREFIX = "./finetune_dataset/Mistral-7B/alpaca"
RECORDS = [{"instruction": f"{number}", "input": "7", "output": f"{number} ### Response: 9"} for number in range(6)]
BASIC = "--input data.jsonl --output-prefix o --tokenizer-model t"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Where the document's command has run: its input, its tokenizer and what it made."""
    place = tmp_path_factory.mktemp("workplace")
    words = {
        word: number for number, word in enumerate(("<s>", "</s>", "<unk>", "###", "Response:", *map(str, range(15))))
    }
    core = Tokenizer(models.WordLevel(words, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    model = place / "model_from_hf/Mistral-7B-Instruct-v0.2"
    write_model(model, "mistral")
    PreTrainedTokenizerFast(tokenizer_object=core, **ends).save_pretrained(model)
    (place / "finetune_dataset").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (place / "finetune_dataset/Alpaca_data_gpt4_zh.jsonl").write_text(lines)
    command, environment = DOCUMENT.format(root=ROOT), clean_environment()
    made = subprocess.run(["bash", "-ec", command], cwd=place, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "6 records in 6 samples" in made.stdout
    return place


@pytest.fixture
def at(workplace, monkeypatch):
    """The workplace as the directory that launchers run in."""
    monkeypatch.chdir(workplace)
    return workplace


def test_the_documents_command_makes_three_files_that_agree(at):
    made = sorted(path.name for path in Path(PREFIX).parent.iterdir())
    fields = ("attention_mask", "input_ids", "labels")
    assert made == sorted(f"alpaca_packed_{field}_document.{end}" for field in fields for end in ("bin", "idx", "json"))
    mask, ids, labels = (IndexedDataset(f"{PREFIX}_packed_{field}_document") for field in fields)
    answer = [5, 3, 4, 14]  # 0 ### Response: 9
    for number in range(len(RECORDS)):
        learned = [answer[0] + number, *answer[1:], 1]
        assert ids[number][-5:].tolist() == learned and ids[number][0] == 0
        assert labels[number].tolist() == [-100] * (len(ids[number]) - 5) + learned
        assert mask[number].tolist() == [1] * len(ids[number])


def test_the_documents_launcher_plans_a_run_of_them(at):
    directories = {"CKPT_PATH": "model_from_hf/Mistral-7B-Instruct-v0.2", "TOKENIZER_MODEL": ""}
    small = {"GPUS_PER_NODE": "1", "TP": "1"} | directories
    options = ["--model-size", "auto", "--seq-length", "64", "--split", "50/50"]
    script = ROOT / "examples/mistral/tune_mistral_7b_ptd.sh"
    status, plan, error = through_shell("bash", script, options, at, MP_DRY_RUN="1", **small)
    assert status == 0, error
    data = from_flags(plan["command"][plan["command"].index("megatron_patch.train") + 1 :]).data
    assert (data.is_instruction_dataset, data.train_data_path) == (True, (PREFIX,))
    assert plan["schedule"]["dataset_tokens"] == 3 * 64


def run_of(path, *options, **values):
    arguments = changed(PRETRAINING, **dict.fromkeys(("DATASET_PATH", "VALID_DATASET_PATH"), path), **values)
    return [*arguments, "--finetune", "--is-instruction-dataset", *options]


SMALL = {
    **dict.fromkeys(("SEQ_LEN", "PAD_LEN"), "64"),
    **{"MODEL_SIZE": "auto", "TP": "1", "SFT": "true", "PR": "fp32", "FL": "false", "GLOBAL_BATCH_SIZE": "2"},
    **{"PRETRAIN_CHECKPOINT_PATH": "model_from_hf/Mistral-7B-Instruct-v0.2", "TRAIN_TOKENS_OR_ITERS": "3"},
    **{"WARMUP_TOKENS_OR_ITERS": "1", "OUTPUT_BASEPATH": "out", "SAVE_INTERVAL": "2"},
}


def test_appended_options_make_another_launcher_read_them(at):
    arguments = run_of(PREFIX, "--eval-iters", "1", "--split", "50,50,0", **SMALL)
    status, _, error = through_shell("sh", MISTRAL, arguments, at, NPROC_PER_NODE="1", OMP_NUM_THREADS="1")
    assert status == 0, error
    log = [json.loads(line) for line in next((at / "out/log").iterdir()).read_text().splitlines()]
    assert len([line for line in log if "lm loss" in line]) == 3


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("./absent", [], "absent_packed_input_ids_document.idx does not exist"),
        (f"{PREFIX}_packed_input_ids_document", [], "give its prefix without _packed_…"),
        (PREFIX, ["--split", "100,0,0"], "leaves nothing of dataset"),
        (PREFIX, ["--reset-attention-mask"], "reset_attention_mask is of pre-training documents"),
    ],
)
def test_what_a_run_cannot_read_is_said(refused, at, path, options, message):
    assert message in refused("mistral", run_of(path, *options, **SMALL | {"OUTPUT_BASEPATH": "other"}))


@pytest.mark.parametrize("name", [name for name in HANDLERS if name != PRETRAIN_HANDLER])
def test_every_handler_is_planned_as_a_command_that_it_takes(planned, name):
    plan = planned("preprocess-data", shlex.split(f"{BASIC} --handler-name {name.lower()} --append-eod"))
    options = preprocess_instructions._parser().parse_args(plan["command"][3:])
    assert (options.handler, options.append_eod, options.log_interval) == (name, True, 1000)
    text = {"text_document": "o_text_document"}
    packed = {
        f"packed_{field}_document": f"o_packed_{field}_document" for field in ("input_ids", "attention_mask", "labels")
    }
    assert plan["output"] == (text if "Pretrain" in name else packed)


def test_the_table_has_every_handler():
    assert set(HANDLERS) == {PRETRAIN_HANDLER, *handlers.HANDLERS}


def test_everything_about_instructions_reaches_the_command(planned):
    given = ["--pack", "--seq-length", "64", "--map-keys", '{"prompt": "ask"}', "--prompt-type", "mistral"]
    given += ["--handler-name", "AlpacaStyleInstructionHandler", "--log-interval", "0", "--streaming"]
    plan = planned("preprocess-data", [*shlex.split(BASIC), *given])
    options = preprocess_instructions._parser().parse_args(plan["command"][3:])
    assert (options.pack, options.seq_length, options.map_keys) == (True, 64, '{"prompt": "ask"}')
    assert (options.prompt_type, options.log_interval, options.append_eod) == ("mistral", 0, False)


def test_answers_without_an_end_are_warned_of(planned):
    plan = planned("preprocess-data", shlex.split(f"{BASIC} --handler-name GeneralInstructionHandler"))
    assert "only with --append-eod; without, models do not learn to stop" in plan["warnings"][-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--handler-name os", "--handler-name is 'os'; allowed: GeneralPretrainHandler, AlpacaPretrainHandler"),
        ("--handler-name MOSSMultiTurnHandler --pack", "--pack needs --seq-length"),
        ("--handler-name MOSSMultiTurnHandler --split-sentences", "--split-sentences is of GeneralPretrainHandler"),
        ("--handler-name MOSSMultiTurnHandler --prompt-type x", "--prompt-type 'x' is not one of mistral"),
        ('--handler-name MOSSMultiTurnHandler --map-keys \'{"prompt": "x"}\'', "has no 'prompt', only chat"),
        ("--handler-name AlpacaPretrainHandler --pack --seq-length 8", "makes texts to pre-train on"),
        ("--pack --seq-length 8", "--pack is of instruction handlers"),
        ("--prompt-type mistral", "--prompt-type is of instruction handlers"),
        ("--hf-datasets-params absent.json", "--hf-datasets-params 'absent.json' does not exist"),
    ],
)
def test_what_cannot_be_made_is_refused(refused, options, message):
    assert message in refused("preprocess-data", shlex.split(f"{BASIC} {options}"))


PARQUET = {"path": "parquet", "data_files": {"train": ["a", "b"], "test": "c"}}


@pytest.mark.parametrize(
    ("params", "inputs"),
    [
        ({"path": "json", "data_files": "a.jsonl", "split": "train", "streaming": True}, ["a.jsonl"]),
        (PARQUET, ["a", "b"]),
        (PARQUET | {"split": "test", "data_dir": "in"}, ["in/c"]),
        ({"path": "csv", "data_dir": "in"}, ["in"]),
        ({"path": "."}, ["."]),
    ],
)
def test_datasets_parameters_name_local_files(planned, tmp_path, params, inputs):
    (tmp_path / "params.json").write_text(json.dumps(params))
    plan = planned(
        "preprocess-data", shlex.split("--hf-datasets-params params.json --output-prefix o --tokenizer-model t")
    )
    assert plan["command"][4 : 4 + len(inputs) + 1] == [*inputs, "--output-prefix"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "list instead of an object"),
        ('{"path": "tatsu-lab/alpaca"}', "path is 'tatsu-lab/alpaca', neither one of json"),
        ('{"path": "json"}', "names no files; data_files does"),
        ('{"path": "json", "data_files": "a", "split": "train[:10%]"}', "split is 'train[:10%]'"),
        ('{"path": "json", "data_files": {"valid": "a"}}', "split 'train' is not one of data_files (valid)"),
        ('{"path": "json", "data_files": [3]}', "neither a path nor a list of paths"),
        ('{"path": "json", "data_files": "a", "revision": "main"}', "revision is not used here"),
    ],
)
def test_datasets_parameters_that_ask_for_more_are_refused(refused, tmp_path, text, message):
    (tmp_path / "params.json").write_text(text)
    given = "--hf-datasets-params params.json --output-prefix o --tokenizer-model t"
    assert message in refused("preprocess-data", shlex.split(given))


def test_an_input_is_needed(refused):
    assert "--input is missing" in refused("preprocess-data", shlex.split("--output-prefix o --tokenizer-model t"))
