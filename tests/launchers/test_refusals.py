"""Every class of bad command, in process: what is said, exit status 2, and nothing started."""

import json
import os
import sys
from pathlib import Path

import pytest
from commands import (
    CONVERSION,
    DATASET,
    HF_CHECKPOINT,
    NAMES,
    PREPROCESSING,
    PRETRAINING,
    RAW_FINE_TUNING,
    ROOT,
    SFT_PREPROCESSING,
    StartedError,
    changed,
)

from megatron_patch.families import ALL
from megatron_patch.launch import training_tables
from megatron_patch.launch.__main__ import main
from megatron_patch.launch.cluster import cores
from megatron_patch.launch.tables import LAUNCHERS

GOLDEN = ROOT / "tests" / "golden"


def test_the_tables_are_the_documents():
    assert [arg.name for arg in training_tables.TRAINING] == NAMES


def test_every_size_that_is_offered_is_a_families():
    for launcher in LAUNCHERS.values():
        arguments = [arg for table in launcher.tables for arg in table if arg.name == "MODEL_SIZE"]
        known = {size for family in launcher.families for size in ALL[family].sizes}
        for offered in (arg.allowed.split(" or auto")[0].split(", ") for arg in arguments):
            assert set(offered) <= known


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("ENV", "local"), ("BATCH_SIZE", "0"), ("BATCH_SIZE", "1.5"), ("BATCH_SIZE", "two"), ("BATCH_SIZE", "-1")),
        *(("GLOBAL_BATCH_SIZE", "inf"), ("LR", "fast"), ("LR", "nan"), ("LR", "-1e-5"), ("MIN_LR", "inf")),
        *(("SEQ_LEN", "1e400"), ("PAD_LEN", ""), ("PR", "int8"), ("TP", "1e99"), ("PP", "0"), ("CP", "x"), ("EP", "")),
        *(("SP", "yes"), ("DO", "1"), ("FL", ""), ("SFT", "none"), ("AC", "true"), ("OPTIMIZER_OFFLOAD", "1.5")),
        *(("SAVE_INTERVAL", "0"), ("DATASET_PATH", " "), ("VALID_DATASET_PATH", "")),
        *(("PRETRAIN_CHECKPOINT_PATH", ""), ("TRAIN_TOKENS_OR_ITERS", "0"), ("WARMUP_TOKENS_OR_ITERS", "-1")),
        *(("OUTPUT_BASEPATH", ""), ("MODEL_SIZE", "9B"), ("MODEL_SIZE", "")),
        *(("TRAIN_TOKENS_OR_ITERS", "9" * 400), ("SAVE_INTERVAL", str(2**63)), ("OUTPUT_BASEPATH", "-out")),
    ],
)
def test_a_bad_value_is_named_with_number_name_value_and_what_is_allowed(refused, name, text):
    message = refused("mistral", changed(PRETRAINING, **{name: text}))
    assert message.startswith(f"mistral: argument {NAMES.index(name) + 1} ({name}) is {text!r}; allowed: ")
    assert len(message.splitlines()) == 1


def test_all_bad_values_are_told_together(refused):
    message = refused("mistral", changed(PRETRAINING, TP="four", SP="maybe"))
    assert [line.split(";")[0] for line in message.splitlines()] == [
        "mistral: argument 10 (TP) is 'four'",
        "argument 14 (SP) is 'maybe'",
    ]


@pytest.mark.parametrize("count", [0, 25, 27])
def test_a_wrong_count_shows_what_was_received(refused, count):
    message = refused("mistral", [*PRETRAINING, "one more"][:count])
    assert f"26 arguments are needed, {count} were given" in message
    assert message.count("(missing)") == max(26 - count, 0)
    assert ("(extra)" in message and "'one more'" in message) == (count > 26)


def test_numbers_are_read_as_people_write_them(planned):
    plan = planned("mistral", changed(PRETRAINING, TRAIN_TOKENS_OR_ITERS="1e9", WARMUP_TOKENS_OR_ITERS="10_000"))
    assert plan["arguments"]["TRAIN_TOKENS_OR_ITERS"] == 10**9
    assert (plan["schedule"]["train_iters"], plan["schedule"]["lr_warmup_iters"]) == (976562, 9)


def test_switches_are_read_in_any_case(planned):
    plan = planned("mistral", changed(PRETRAINING, SP="True", DO="FALSE", AC="None", OPTIMIZER_OFFLOAD="False"))
    assert plan["parallel"]["sequence_parallel"] is True
    assert plan["parallel"]["use_distributed_optimizer"] is False


@pytest.mark.parametrize(
    ("name", "text"), [("MP_DATASET_TYPE", "json"), ("MP_VP", "-1"), ("MP_SFT_PACKING", "2"), ("MP_DRY_RUN", "maybe")]
)
def test_a_bad_variable_is_named_with_what_is_allowed(refused, monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    assert f"environment variable {name} is {text!r}; allowed: " in refused("mistral", PRETRAINING)


FLOAT8 = "argument 9 (PR) is fp8, which needs a CUDA GPU of compute capability 8.9 or more"


@pytest.fixture
def without_accelerators(monkeypatch):
    monkeypatch.setattr("megatron_patch.launch.cluster._device_files", lambda kind, root: 0)


@pytest.mark.usefixtures("without_accelerators")
def test_float8_without_a_gpu_is_refused(refused):
    assert FLOAT8 in refused("mistral", changed(PRETRAINING, PR="fp8"))


@pytest.mark.usefixtures("without_accelerators")
def test_a_dry_run_of_float8_without_a_gpu_warns(planned):
    assert any(FLOAT8 in warning for warning in planned("mistral", changed(PRETRAINING, PR="fp8"))["warnings"])


def test_raw_records_without_fine_tuning_are_refused(refused, monkeypatch):
    monkeypatch.setenv("MP_DATASET_TYPE", "raw")
    assert "SFT" in refused("mistral", PRETRAINING)


def test_an_unknown_option_is_refused_with_the_nearest(refused):
    assert "unknown option '--log-intervall'; did you mean --log-interval?" in refused(
        "mistral", [*PRETRAINING, "--log-intervall", "10"]
    )
    assert "did you mean --overwrite?" in refused("mistral-convert", [*CONVERSION, "--over-write"])
    assert "did you mean --workers?" in refused("pretraining-dataset", [*PREPROCESSING, "--worker=3"])


def test_an_option_that_a_positional_decides_is_refused(refused):
    assert "--load follows from argument 23" in refused("mistral", [*PRETRAINING, "--load", "elsewhere"])


def test_rules_between_settings_are_told_together_in_the_users_words(refused, monkeypatch):
    monkeypatch.setenv("MP_DRY_RUN", "1")
    message = refused(
        "mistral",
        changed(PRETRAINING, TP="3", GLOBAL_BATCH_SIZE="8", SEQ_LEN="100000", TRAIN_TOKENS_OR_ITERS="10", MIN_LR="1"),
    )
    for told in (
        "num_attention_heads 32 is not a multiple of TP (argument 10) 3",
        "num_query_groups 8 is not a multiple of TP (argument 10) 3",
        "100000 tokens per sample are more than max_position_embeddings 32768",
        "train_iters 0 must be at least 1; one iteration takes GLOBAL_BATCH_SIZE (argument 4) 8 × 100000",
        "LR (argument 5) 1e-05 must be at least MIN_LR (argument 6) 1.0",
    ):
        assert told in message


def test_a_checkpoint_of_another_size_is_told_with_the_rules_that_are_broken(refused, monkeypatch):
    monkeypatch.setenv("MP_DRY_RUN", "1")
    message = refused("mistral", with_checkpoint(MODEL_SIZE="8x7B", TP="3"))
    assert "MODEL_SIZE" in message and "num_query_groups 8 is not a multiple of TP (argument 10) 3" in message


def test_a_world_that_the_axes_do_not_divide_is_refused(refused, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "6")
    assert "= 4 does not divide 6 ranks" in refused("mistral", with_checkpoint())
    monkeypatch.setenv("NPROC_PER_NODE", "four")
    assert "environment variable NPROC_PER_NODE is 'four'" in refused("mistral", with_checkpoint())


def with_checkpoint(**changes: str) -> list[str]:
    return changed(PRETRAINING, **{"PRETRAIN_CHECKPOINT_PATH": str(GOLDEN / "Mistral-7B-v0.1")} | changes)


def test_paths_that_are_missing_stop_a_real_run_together(refused):
    assert "config.json does not exist" in refused("mistral", PRETRAINING)
    message = refused("mistral", with_checkpoint())
    assert f"dataset '{DATASET}': {DATASET}.idx does not exist" in message
    assert "holds none of latest_checkpointed_iteration.txt, model.safetensors" in message


def test_paths_that_are_missing_are_warnings_of_a_dry_run(planned):
    warnings = " ".join(planned("mistral", PRETRAINING)["warnings"])
    assert f"{DATASET}.idx does not exist" in warnings
    assert "config.json does not exist" in warnings


def test_checkpoints_of_an_earlier_run_are_kept(refused, planned, monkeypatch, tmp_path):
    monkeypatch.setenv("MP_DATASET_TYPE", "raw")
    start = tmp_path / "start"
    start.mkdir()
    (start / "config.json").write_bytes((GOLDEN / "Mistral-7B-v0.1" / "config.json").read_bytes())
    (start / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # whole, with no tensor
    for name in ("train.json", "valid.json"):
        (tmp_path / name).write_text("")
    paths = {"DATASET_PATH": "train.json", "VALID_DATASET_PATH": "valid.json", "PRETRAIN_CHECKPOINT_PATH": "start"}
    command = changed(RAW_FINE_TUNING, **paths, OUTPUT_BASEPATH=str(tmp_path))
    earlier = Path(planned("mistral", command)["output"]["checkpoint"])
    earlier.mkdir(parents=True)
    (earlier / "latest_checkpointed_iteration.txt").write_text("9")
    monkeypatch.delenv("MP_DRY_RUN")
    assert f"{earlier} already holds checkpoints" in refused("mistral", command)
    with pytest.raises(StartedError):
        main(["mistral", *command, "--overwrite"])
    assert os.environ["OMP_NUM_THREADS"] == str(cores())


def test_a_shape_that_contradicts_the_size_is_refused_even_dry(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("MP_DRY_RUN", "1")
    hf = json.loads((GOLDEN / "Mistral-7B-v0.1" / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    message = refused("mistral", changed(PRETRAINING, PRETRAIN_CHECKPOINT_PATH=str(tmp_path)))
    assert "num_hidden_layers is 2 in" in message
    assert "and 32 in MODEL_SIZE 7B" in message


def test_no_checkpoint_needs_a_size_and_a_tokenizer(refused, planned, tmp_path):
    start = changed(PRETRAINING, PRETRAIN_CHECKPOINT_PATH="none")
    assert "--tokenizer-model must name" in refused("mistral", start)
    assert "argument 2 (MODEL_SIZE) is 'auto', which reads" in refused("mistral", ["dsw", "auto", *start[2:]])
    plan = planned("mistral", [*start, "--tokenizer-model", str(tmp_path)])
    assert "--load" not in plan["command"]


def test_a_python_without_torch_is_named(refused, monkeypatch, tmp_path):
    source = str(GOLDEN / "Mistral-7B-v0.1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused("mistral-convert", ["7B", source, "", source, str(tmp_path / "target"), *CONVERSION[5:]])
    assert f"{sys.executable} has no torch" in message


def test_preprocessing_of_records_refuses_what_is_not_there(refused):
    message = refused("sft-dataset", SFT_PREPROCESSING)
    assert "input '/mnt/alpaca_zh.json' is no file" in message and HF_CHECKPOINT in message
    assert "argument 3 (SEQ_LEN)" in refused("sft-dataset", [*SFT_PREPROCESSING[:2], "0", *SFT_PREPROCESSING[3:]])
    unknown = refused("sft-dataset", [*SFT_PREPROCESSING, "--map-keys", '{"question": "q"}'])
    assert unknown.strip().endswith(
        "--map-keys names 'question', which is not one of prompt, query, response, system, history, messages"
    )
    assert "did you mean --prompt-type?" in refused("sft-dataset", [*SFT_PREPROCESSING, "--prompt-typ=alpaca"])


def test_preprocessing_refuses_an_unknown_tokenizer_and_missing_files(refused, tmp_path):
    message = refused("pretraining-dataset", ["/i", "mistralbpe", "text", "/o", "/l"])
    assert "argument 2 (TOKENIZER) is 'mistralbpe'; allowed: auto, MistralTokenizer" in message
    assert "input '/mnt/corpus.jsonl' is no file" in refused("pretraining-dataset", PREPROCESSING)
    assert f"input directory {str(tmp_path)!r} holds no .jsonl" in refused(
        "pretraining-dataset", [str(tmp_path), *PREPROCESSING[1:]]
    )
    assert "argument 6 (DATASET_NAME) is missing" in refused("pretraining-dataset", ["/i", "GPT2BPETokenizer", *"abc"])


def test_an_unknown_launcher_is_refused_with_the_known(capsys):
    assert main(["mixtral"]) == 2
    assert "there are mistral, deepseek, llama-pretrain, " in capsys.readouterr().err


def test_help_shows_the_table(capsys):
    assert main(["mistral", "--help"]) == 0
    assert "26  OUTPUT_BASEPATH" in capsys.readouterr().out
