"""What converters make of their arguments, and what they refuse."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import sentencepiece
from commands import CONVERSION, HF_CHECKPOINT, ROOT, StartedError, clean_environment
from tiny import write_model

from megatron_patch.launch.__main__ import main
from megatron_patch.launch.tables import LAUNCHERS
from megatron_patch.launch.vocabulary import count_pieces, tokenizer_size

GOLDEN = ROOT / "tests" / "golden"
DOCUMENTED = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/commands.md").read_text(), re.DOTALL)
NAMES = {
    "mistral-convert": "MODEL_SIZE HG_CKPT_PATH MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EXTRA_VOCAB_SIZE "
    "NUM_EXPERTS EXPERTS_TOPK EP mg2hf WS",
    "mistral-megatron": "MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP MN EXTRA_VOCAB_SIZE mg2hf",
    "deepseek-convert": "MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EP PR USE_TE mg2hf HG_CKPT_PATH",
    "qwen-megablocks": "MODEL_SIZE HG_CKPT_PATH MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EXTRA_VOCAB_SIZE "
    "NUM_EXPERTS EXPERTS_TOPK EP mg2hf",
    "qwen-dense": "MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP mg2hf HG_CKPT_PATH",
    "qwen-dense-to-moe": "MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EP NUM_EXPERTS NUM_SPLITS MOE_FFN",
    "qwen-moe": "MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EP mg2hf HG_CKPT_PATH",
    "llama-convert": "MODEL_SIZE HG_CKPT_PATH MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EXTRA_VOCAB_SIZE "
    "NUM_EXPERTS EXPERTS_TOPK EP NUM_EXPERT_SPLITS mg2hf",
}
EIGHT = ["", "/mcore", "/out", "1", "1", "auto", "0", "true"]
DEEPSEEK = ["A2.4B", "/hf", "/out", "2", "1", "4", "fp32", "true", "false"]
CKPT = ["--model-type", "GPT", "--load-dir", "in", "--save-dir", "out"]


def after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def changed(**values: str) -> list[str]:
    """The documented 7B conversion with some arguments replaced."""
    names = NAMES["mistral-convert"].split()[:12]
    return [values.get(name, text) for name, text in zip(names, CONVERSION, strict=True)]


@pytest.mark.parametrize("launcher", NAMES)
def test_the_tables_are_the_documents(launcher):
    assert " ".join(arg.name for arg in LAUNCHERS[launcher].tables[0]) == NAMES[launcher]


@pytest.mark.parametrize("block", DOCUMENTED, ids=[re.search(r"[\w.]+\.(?:sh|py)", block)[0] for block in DOCUMENTED])
def test_a_documented_command_is_planned_by_dash(block):
    result = subprocess.run(
        ["dash" if shutil.which("dash") else "sh", "-c", block],
        cwd=ROOT,
        env=clean_environment(MP_DRY_RUN="1"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert {"arguments", "output", "command", "warnings"} <= set(plan)
    if "model_checkpoints_convertor" not in block and "toolkits/checkpoint" not in block:
        assert set(plan["output"]) and plan["command"][2].startswith(("megatron_patch.data.", "megatron_patch.train."))
        return
    assert plan["command"][1:3] == ["-m", "megatron_patch.convert"]
    source, target = plan["command"][3:5]
    assert target == plan["output"]["checkpoint"]
    assert not source.endswith("/release")


def test_every_converter_is_documented():
    scripts = [
        *(ROOT / "toolkits/model_checkpoints_convertor").rglob("*.sh"),
        *(ROOT / "toolkits/checkpoint").glob("*.py"),
    ]
    assert len(scripts) == 14
    assert not [script.name for script in scripts if not any(script.name in block for block in DOCUMENTED)]


def test_a_conversion_is_one_convert_command(planned):
    there = planned("mistral-convert", CONVERSION)["command"]
    assert there[1:5] == ["-m", "megatron_patch.convert", HF_CHECKPOINT, CONVERSION[4]]
    assert (after(there, "--format"), after(there, "--tp"), "--assets" in there) == ("mcore", "4", False)
    assert "--ep" not in there and "--upcycle-experts" not in there
    back = planned("mistral-convert", [*CONVERSION[:3], "/mcore", "/hf", *CONVERSION[5:11], "true", "--overwrite"])
    command = back["command"]
    assert (after(command, "--format"), after(command, "--assets")) == ("hf", HF_CHECKPOINT)
    assert command[-1] == "--overwrite"


def test_experts_asked_of_a_dense_model_are_made_of_it(planned):
    plan = planned("mistral-convert", changed(NUM_EXPERTS="8", EXPERTS_TOPK="2", EP="4"))
    assert (after(plan["command"], "--upcycle-experts"), after(plan["command"], "--upcycle-topk")) == ("8", "2")
    assert plan["model"] == {"family": "mixtral", "parameters": 46_702_792_704}
    mixtral = planned("mistral-convert", changed(MODEL_SIZE="8x7B", NUM_EXPERTS="8", EXPERTS_TOPK="2", EP="4"))
    assert "--upcycle-experts" not in mixtral["command"]
    assert mixtral["model"] == plan["model"]


def test_an_uneven_first_stage_and_local_names_are_passed_on(planned, monkeypatch):
    monkeypatch.setenv("MP_PP0_LAYERS", "13")
    command = planned("deepseek-convert", [*DEEPSEEK[:4], "2", "4", "bf16", "false", "false"])["command"]
    flags = ("--pp", "--ep", "--first-stage-layers", "--transformer-impl", "--dtype")
    assert [after(command, flag) for flag in flags] == ["2", "4", "13", "local", "bf16"]
    plan = planned("deepseek-convert", DEEPSEEK)
    assert "--first-stage-layers" not in plan["command"]
    assert any("MP_PP0_LAYERS has no effect" in warning for warning in plan["warnings"])


def test_an_option_whose_value_is_that_of_an_argument_is_no_second_saying_of_it(planned):
    command = planned("deepseek-convert", [*DEEPSEEK, "--etp", DEEPSEEK[3]])["command"]
    assert after(command, "--etp") == after(command, "--tp") == DEEPSEEK[3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (DEEPSEEK, (True, False, None)),
        ([*DEEPSEEK[:8], "true", "/model"], (True, True, "/model")),
        ([*DEEPSEEK[:7], "true", "/model"], (None, True, "/model")),
    ],
    ids=["nine", "ten", "nine without USE_TE"],
)
def test_deepseek_is_read_in_every_spelling(planned, arguments, expected):
    values = planned("deepseek-convert", arguments)["arguments"]
    assert (values.get("USE_TE"), values["mg2hf"], values["HG_CKPT_PATH"]) == expected


@pytest.mark.parametrize(
    ("launcher", "arguments", "told"),
    [
        ("mistral-convert", CONVERSION[:11], "12 to 13 arguments are needed, 11 were given"),
        ("mistral-convert", [*CONVERSION, "16", "again"], "12 to 13 arguments are needed, 14 were given"),
        ("qwen-megablocks", ["a"] * 11, "10 or 12 arguments are needed, 11 were given"),
        ("deepseek-convert", DEEPSEEK[:8], "9 to 10 arguments are needed, 8 were given"),
        ("llama-megatron", EIGHT[:7], "8 arguments are needed, 7 were given"),
        ("mistral-convert", changed(TP="0"), "argument 6 (TP) is '0'; allowed: a whole number ≥ 1"),
        ("mistral-convert", changed(mg2hf="maybe"), "argument 12 (mg2hf) is 'maybe'; allowed: true or false"),
        ("mistral-convert", changed(MODEL_SIZE="9B"), "argument 1 (MODEL_SIZE) is '9B'; allowed: 7B, 7B-v0.2"),
        ("deepseek-convert", [*DEEPSEEK[:6], "fp8", "true", "false"], "argument 7 (PR) is 'fp8'; allowed: fp32, fp16"),
        ("llama-megatron", [*EIGHT[:5], "gpt-7b", "0", "true"], "argument 6 (MN) is 'gpt-7b'; allowed: llama-7b,"),
        ("mistral-convert", [*CONVERSION, "--over-write"], "did you mean --overwrite?"),
        ("mistral-convert", [*CONVERSION, "--tp", "8"], "unknown option '--tp'"),
        ("deepseek-convert", [*DEEPSEEK, "--dtype=bf16"], "--dtype follows from the arguments before it"),
        ("convert-ckpt", CKPT[:2], "--load-dir is missing; allowed: the directory to read"),
        ("convert-ckpt", [*CKPT, "--loader", "bloom_hf"], "--loader is 'bloom_hf'; allowed: llama2_hf"),
        ("convert-ckpt", ["--model-type", "BERT", *CKPT[2:]], "--model-type is 'BERT'; allowed: GPT"),
        ("convert-ckpt", [*CKPT, "--save-model-type", "save_hf"], "--save-model-type is 'save_hf'; allowed"),
        ("convert-ckpt", [*CKPT, "--loder", "megatron"], "did you mean --loader?"),
        ("convert-ckpt", [*CKPT, "--loader"], "--loader is followed by 0 values"),
        ("convert-ckpt", [*CKPT, "--load-dir", "b"], "--load-dir is given twice"),
        ("convert-ckpt", ["in", *CKPT], "'in' follows no flag"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(refused, monkeypatch, launcher, arguments, told):
    monkeypatch.setenv("MP_DRY_RUN", "1")
    assert told in refused(launcher, arguments)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"TP": "3"}, "argument 6 (TP) is 3, which does not divide 8 query groups"),
        ({"PP": "3"}, "argument 7 (PP) is 3, which does not divide 32 layers"),
        ({"EP": "4"}, "argument 11 (EP) is 4, but the model has no experts"),
        (
            {"NUM_EXPERTS": "8", "EXPERTS_TOPK": "2", "EP": "3"},
            "argument 11 (EP) is 3, which does not divide 8 experts",
        ),
        ({"NUM_EXPERTS": "8"}, "argument 10 (EXPERTS_TOPK) is 0; 1 to 8 experts can be chosen"),
        ({"MODEL_SIZE": "8x7B", "NUM_EXPERTS": "4"}, "argument 9 (NUM_EXPERTS) is 4, and config.json says 8"),
        ({"MODEL_SIZE": "8x7B", "EXPERTS_TOPK": "1"}, "argument 10 (EXPERTS_TOPK) is 1, and config.json says 2"),
    ],
)
def test_what_the_model_cannot_be_is_refused_before_torch(refused, monkeypatch, values, told):
    monkeypatch.setenv("MP_DRY_RUN", "1")
    assert told in refused("mistral-convert", changed(**values))


def test_a_world_size_is_the_product_or_has_no_effect(refused, planned):
    mixtral = changed(MODEL_SIZE="8x7B", EP="4")
    assert "argument 13 (WS) is 8, but TP 4 × PP 1 × EP 4 = 16" in refused("mistral-convert", [*mixtral, "8"])
    warnings = planned("mistral-convert", [*CONVERSION, "16"])["warnings"]
    assert any("argument 13 (WS) is 16: no effect without experts" in warning for warning in warnings)


def test_experts_that_a_checkpoint_has_not_are_refused_on_the_way_back(refused):
    write_model(Path("hf"), "mistral")
    back = changed(MODEL_SIZE="auto", HG_CKPT_PATH="hf", SOURCE_CKPT_PATH="mcore", NUM_EXPERTS="8", mg2hf="true")
    assert "argument 9 (NUM_EXPERTS) is 8, and config.json describes none; use 0" in refused("mistral-convert", back)


def test_layers_that_do_not_fill_the_stages_are_refused(refused, monkeypatch):
    monkeypatch.setenv("MP_PP0_LAYERS", "2")
    monkeypatch.setenv("MP_DRY_RUN", "1")
    message = refused("deepseek-convert", [*DEEPSEEK[:4], "3", *DEEPSEEK[5:]])
    assert "MP_PP0_LAYERS is 2: 25 of 27 layers do not fill 2 equal stages (argument 5 (PP) is 3)" in message


@pytest.mark.parametrize(
    ("splits", "width", "told"),
    [
        ("3", "1408", "(NUM_SPLITS) 3 does not divide"),
        ("65", "1408", "(NUM_SPLITS) is 65; 64 experts can hold"),
        ("4", "1375", "(MOE_FFN) 1375 is below a part's width 1376"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_the_users_words(refused, monkeypatch, splits, width, told):
    monkeypatch.setenv("MP_DRY_RUN", "1")
    assert told in refused("qwen-dense-to-moe", ["1.8B", "/hf", "/out", "1", "1", "4", "64", splits, width])


@pytest.mark.parametrize(
    ("extra", "told"), [("2", ""), ("0", ""), ("3", "20 + 3 are not config.json's vocab_size 22; use 2")]
)
def test_an_extra_vocabulary_is_checked_and_never_added(capsys, monkeypatch, tmp_path, extra, told):
    write_model(tmp_path, "mistral")
    monkeypatch.setenv("MP_DRY_RUN", "1")
    status = main(
        ["mistral-convert", *changed(MODEL_SIZE="auto", HG_CKPT_PATH=str(tmp_path), EXTRA_VOCAB_SIZE=extra, TP="2")]
    )
    assert status == (2 if told else 0)
    assert told in capsys.readouterr().err


def test_a_tokenizer_is_counted_without_its_library(tmp_path):
    (tmp_path / "text").write_text("a short text of a few words, to train a few pieces on\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=24, minloglevel=9
    )
    assert count_pieces((tmp_path / "tokenizer.model").read_bytes()) == 24
    assert tokenizer_size(tmp_path) == 24
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    assert tokenizer_size(tmp_path) == 2
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        count_pieces(b"\x0f\x00")


def test_a_source_is_read_at_the_iteration_it_names_or_not_at_all(refused, planned, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("200")
    arguments = ["", str(tmp_path / "iter_0000200"), *EIGHT[2:]]
    assert planned("mistral-megatron", arguments)["command"][3] == str(tmp_path)
    message = refused("mistral-megatron", ["", str(tmp_path / "iter_0000100"), *EIGHT[2:]])
    assert "iter_0000100 was named, but" in message and "says '200'" in message


def test_a_missing_source_and_an_occupied_target_stop_a_real_conversion(refused, tmp_path):
    source = str(GOLDEN / "Mistral-7B-v0.1")
    (tmp_path / "precious").write_text("")
    assert "config.json does not exist" in refused("mistral-convert", CONVERSION)
    occupied = changed(HG_CKPT_PATH=source, SOURCE_CKPT_PATH=source, TARGET_CKPT_PATH=str(tmp_path))
    assert "is not empty; pass --overwrite" in refused("mistral-convert", occupied)
    with pytest.raises(StartedError):
        main(["mistral-convert", *occupied, "--overwrite"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--loader", "megatron"], "--loader is megatron, but hf holds none: there is no latest_checkpointed"),
        (["--loader", "llama2_hf", "--saver", "mixtral"], "--saver is mixtral, but config.json describes no experts"),
        (
            ["--loader", "llama2_hf", "--true-vocab-size", "21"],
            "--true-vocab-size is 21, and config.json's vocab_size 22",
        ),
        (["--loader", "llama2_hf", "--add-qkv-bias"], "--add-qkv-bias: config.json describes no such bias"),
        (["--loader", "llama2_hf", "--w-pack", "True"], "--w-pack is true"),
        (["--loader", "mixtral_hf"], "architectures[0] is 'MistralForCausalLM'; supported here: MixtralForCausalLM"),
        (
            ["--loader", "llama2_hf", "--save-model-type", "hf", "--target-tensor-parallel-size", "2"],
            "--target-tensor-parallel-size 2: a Hugging Face directory is not cut; use 1",
        ),
    ],
)
def test_modellink_flags_that_contradict_the_model_are_refused(refused, tmp_path, flags, told):
    write_model(Path("hf"), "mistral")
    assert told in refused("convert-ckpt", ["--model-type", "GPT", "--load-dir", "hf", "--save-dir", "out", *flags])


def test_help_lists_flags_and_numbers_positionals(capsys):
    assert main(["convert-ckpt", "--help"]) == 0
    assert "  --save-dir                        the directory to write;" in capsys.readouterr().out
    assert main(["qwen-megablocks", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "mg2hf" in line] == [["12", "mg2hf"], ["10", "mg2hf"]]


def test_sizes_that_modellink_leaves_out_are_the_sources(planned):
    for name in ("mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"):
        Path("in/iter_0000001", name).mkdir(parents=True)
    Path("in/latest_checkpointed_iteration.txt").write_text("1")
    command = planned("convert-ckpt", [*CKPT, "--target-tensor-parallel-size", "1"])["command"]
    assert (after(command, "--tp"), after(command, "--pp")) == ("1", "2")
    command = planned("convert-ckpt", [*CKPT, "--loader", "mixtral_mg", "--saver", "mixtral"])["command"]
    assert "--tp" not in command  # convert's default is 1
