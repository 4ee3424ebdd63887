"""What each training launcher's own arguments become, and what it refuses that others do not have."""

import json

import numpy as np
import pytest
from commands import ROOT, through_shell
from tiny import RECORDS, SCRIPTS, tiny_command, write_material

from megatron_patch.config.flags import from_flags
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.launch.tables import LAUNCHERS

NODES = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500", "NPROC_PER_NODE": "4"}
PATCHED = (
    "ENV MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE {}LR MIN_LR SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TP PP AC DO FL SP TE"
)
DOCUMENTED = {  # as the documents number them, and as the later launchers do
    "llama-pretrain": (24, "SAVE_INTERVAL DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_TOKENS WARMUP_TOKENS"),
    "llama-finetune": (22, "TRAIN_DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH EPOCH"),
    "qwen-megablocks-pretrain": (
        25,
        "MOE SAVE_INTERVAL DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_TOKENS WARMUP_TOKENS",
    ),
    "qwen-finetune-ga": (
        25,
        "SAVE_INTERVAL TRAIN_DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS WARMUP_ITERS",
    ),
    "qwen-mcore-finetune": (
        26,
        "MOE SAVE_INTERVAL TRAIN_DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS WARMUP_ITERS",
    ),
}
SAME = {
    "qwen-pretrain": "llama-pretrain",
    "qwen-finetune": "llama-finetune",
    "llama-mcore-pretrain": "qwen-megablocks-pretrain",
    "qwen-mcore-pretrain": "qwen-megablocks-pretrain",
    "llama-mcore-finetune": "qwen-mcore-finetune",
    "qwen-megablocks-finetune": "qwen-mcore-finetune",
}


@pytest.fixture
def material(tmp_path, monkeypatch):
    write_material(tmp_path, "llama", "qwen1_5", "qwen1_5_moe", "mistral", "mixtral", "deepseek_v2")
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    return tmp_path


def names(launcher: str, number: int = 0) -> list[str]:
    return [arg.name for arg in LAUNCHERS[launcher].tables[number]]


def tiny(launcher: str, *options: str, number: int = 0, **changes: str) -> list[str]:
    return [*tiny_command(LAUNCHERS[launcher].tables[number], SCRIPTS[launcher][1], **changes), *options]


def flags(plan: dict):
    """The run that the planned command's ranks will see."""
    command = plan["command"]
    return from_flags(command[command.index("megatron_patch.train") + 1 :])


@pytest.mark.parametrize("launcher", [*DOCUMENTED, *SAME])
def test_the_tables_are_the_documents(launcher):
    count, rest = DOCUMENTED[SAME.get(launcher, launcher)]
    batch = "" if "EPOCH" in rest else "GLOBAL_BATCH_SIZE "
    assert " ".join(names(launcher)) == f"{PATCHED.format(batch)} {rest} OUTPUT_BASEPATH"
    assert len(names(launcher)) == count
    for number in range(1, len(LAUNCHERS[launcher].tables)):
        longer = names(launcher)
        longer.insert(longer.index("MOE") + 1, "EP")
        assert names(launcher, number) == longer


@pytest.mark.parametrize("launcher", SCRIPTS)
def test_every_launcher_knows_its_options_and_runs_on_several_nodes(planned, refused, material, monkeypatch, launcher):
    for name, text in NODES.items():
        monkeypatch.setenv(name, text)
    sizes = {"ENV": "dlc", "BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "8", "TRAIN_TOKENS_OR_ITERS": "512"}
    plan = planned(launcher, tiny(launcher, "--log-interval", "7", **sizes))
    assert (plan["parallel"]["world"], flags(plan).log_interval) == (8, 7)
    assert plan["output"]["log"].startswith("out/log/")
    told = refused(launcher, tiny(launcher, "--log-intervall", "7"))
    assert "unknown option '--log-intervall'; did you mean --log-interval?" in told


def test_what_launchers_set_otherwise_reaches_the_ranks(planned, material):
    run = flags(planned("llama-pretrain", tiny("llama-pretrain")))
    assert (run.optimizer.lr_decay_style, run.model.init_method_std, run.data.split) == ("linear", 0.006, "98,2,0")
    assert (run.train_iters, run.optimizer.lr_warmup_iters, run.optimizer.lr_decay_iters) == (2, 1, 2)
    run = flags(planned("llama-pretrain", tiny("llama-pretrain", "--lr-decay-style", "constant")))
    assert run.optimizer.lr_decay_style == "constant"
    run = flags(planned("qwen-mcore-pretrain", tiny("qwen-mcore-pretrain")))
    assert (run.optimizer.lr_decay_style, run.data.split, run.model.max_position_embeddings) == ("cosine", "99,1,0", 32)
    assert (run.model.num_moe_experts, run.model.moe_router_topk, run.checkpoint.upcycle) == (8, 2, True)
    run = flags(planned("qwen-finetune-ga", tiny("qwen-finetune-ga", TRAIN_ITERS="9", WARMUP_ITERS="2")))
    assert (run.data.dataset, run.train_iters, run.optimizer.lr_decay_iters) == ("JSON-SFT", 9, 7)


def test_names_tell_kind_engine_family_and_arguments(planned, material):
    places = {launcher: planned(launcher, tiny(launcher))["output"]["checkpoint"] for launcher in SCRIPTS}
    assert len(set(places.values())) == len(places)
    for launcher, kind in (
        ("deepseek", "pretrain-mcore-deepseek-v2-auto-lr-1e-3-minlr-1e-4-bs-2-gbs-4-seqlen-16-pr-fp32-tp-1-pp-1-cp-1"),
        ("llama-finetune", "finetune-megatron-llama-auto-lr-1e-3-minlr-1e-4-bs-2-seqlen-16-pr-fp32-tp-1-pp-1-ac-none"),
        ("qwen-megablocks-pretrain", "pretrain-megablocks-qwen1.5-auto-lr-1e-3-minlr-1e-4-bs-2-gbs-4-seqlen-16-pr-"),
    ):
        assert places[launcher].startswith(f"out/checkpoint/{kind}")
    assert places["llama-finetune"].endswith("-do-false-sp-false-epochs-2")
    assert places["qwen-megablocks-pretrain"].endswith("-moe-true-ti-2-wi-1")


def test_epochs_are_counted_from_the_records(planned, material, monkeypatch):
    run = flags(planned("llama-finetune", tiny("llama-finetune")))
    each = -(-RECORDS // 2)
    assert (run.train_iters, run.optimizer.lr_decay_iters, run.checkpoint.save_interval) == (2 * each, 2 * each, each)
    monkeypatch.setenv("NPROC_PER_NODE", "3")
    plan = planned("llama-finetune", tiny("llama-finetune"))
    assert (flags(plan).global_batch_size, flags(plan).train_iters) == (6, 4)
    assert any("an epoch is 2 iterations of 6 samples" in warning for warning in plan["warnings"])
    accumulated = ("--global-batch-size", "18", "--save-interval", "7")
    run = flags(planned("llama-finetune", tiny("llama-finetune", *accumulated, EPOCH="3")))
    assert (run.global_batch_size, run.train_iters, run.checkpoint.save_interval) == (18, 3, 7)


def test_epochs_of_samples_and_of_arrays_are_counted_too(planned, refused, material, monkeypatch):
    (material / "array.json").write_text(json.dumps([{"instruction": "w3", "output": "w4"}] * 5))
    run = flags(planned("llama-finetune", tiny("llama-finetune", TRAIN_DATASET_PATH="array.json", EPOCH="1")))
    assert run.train_iters == 3
    monkeypatch.setenv("MP_SFT_PACKING", "true")
    assert "EPOCH cannot be counted" in refused("llama-finetune", tiny("llama-finetune"))
    monkeypatch.setenv("MP_DATASET_TYPE", "idxmap")
    with IndexedDatasetBuilder(material / "samples", "int32") as builder:
        builder.add(np.zeros(32 * 10), [32] * 10, [1] * 10)
    paths = {"TRAIN_DATASET_PATH": "samples", "VALID_DATASET_PATH": "samples"}
    command = tiny("llama-finetune", "--split", "80,20,0", **paths)
    run = flags(planned("llama-finetune", command))
    assert (run.data.dataset, run.train_iters) == ("MMAP-SFT", 2 * 4)
    weighted = {"TRAIN_DATASET_PATH": "0.5 samples 0.5 samples"}
    assert "a blend with weights has no end" in refused("llama-finetune", tiny("llama-finetune", **paths | weighted))


def test_records_that_are_not_there_leave_a_dry_run_without_iterations(planned, refused, material, monkeypatch):
    plan = planned("llama-finetune", tiny("llama-finetune", TRAIN_DATASET_PATH="absent.json"))
    assert plan["schedule"]["train_iters"] is plan["schedule"]["save_interval"] is None
    assert any("how many iterations argument 21 (EPOCH) takes is unknown" in warning for warning in plan["warnings"])
    monkeypatch.delenv("MP_DRY_RUN")
    assert "absent.json" in refused("llama-finetune", tiny("llama-finetune", TRAIN_DATASET_PATH="absent.json"))
    (material / "empty.json").write_text("\n")
    assert "holds no record" in refused("llama-finetune", tiny("llama-finetune", TRAIN_DATASET_PATH="empty.json"))


def test_the_order_of_another_release_is_refused_with_the_table(refused, material):
    """It has as many arguments: a second path in the third place, and no TE."""
    command = tiny("llama-pretrain")
    command.insert(2, "../..")
    del command[names("llama-pretrain").index("TE") + 1]
    told = refused("llama-pretrain", command)
    assert "argument 3 (MODEL_SIZE) is '../..'" in told and " 24  OUTPUT_BASEPATH           'out'" in told


@pytest.mark.parametrize(("ranks", "ep"), [("1", 1), ("2", 2), ("6", 2), ("8", 8)])
def test_megablocks_shares_experts_out_over_the_data_parallel_ranks(planned, material, monkeypatch, ranks, ep):
    monkeypatch.setenv("NPROC_PER_NODE", ranks)
    plan = planned(
        "qwen-megablocks-pretrain",
        tiny("qwen-megablocks-pretrain", BATCH_SIZE="1", GLOBAL_BATCH_SIZE="24", TRAIN_TOKENS="4096"),
    )
    assert plan["parallel"]["ep"] == ep
    assert any(f"EP is {ep}: what data-parallel ranks and experts can share" in text for text in plan["warnings"])


def test_26_arguments_are_one_expert_rank_and_27_say_how_many(planned, material, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    sizes = {"BATCH_SIZE": "1", "EP": "4"}
    for number, ep in ((0, 1), (1, 4)):
        plan = planned("qwen-mcore-finetune", tiny("qwen-mcore-finetune", number=number, **sizes))
        assert plan["parallel"]["ep"] == ep


def test_experts_are_what_the_checkpoint_or_moe_says(planned, refused, material):
    plan = planned("qwen-mcore-pretrain", tiny("qwen-mcore-pretrain", PRETRAIN_CHECKPOINT_PATH="qwen1_5_moe"))
    assert (flags(plan).model.num_moe_experts, flags(plan).checkpoint.upcycle) == (4, False)
    command = tiny("qwen-mcore-pretrain", PRETRAIN_CHECKPOINT_PATH="qwen1_5_moe", MOE="false")
    assert "argument 19 (MOE) is false, and qwen1_5_moe has experts; use true" in refused(
        "qwen-mcore-pretrain", command
    )
    plan = planned("qwen-mcore-pretrain", tiny("qwen-mcore-pretrain", MOE="false"))
    assert (flags(plan).family, flags(plan).checkpoint.upcycle) == ("qwen1_5", False)
    plan = planned(
        "qwen-mcore-pretrain", tiny("qwen-mcore-pretrain", MODEL_SIZE="0.5B", PRETRAIN_CHECKPOINT_PATH="none")
    )
    assert (flags(plan).model.num_moe_experts, flags(plan).checkpoint.upcycle) == (8, False)
    command = tiny("qwen-mcore-pretrain", MODEL_SIZE="0.5B", PRETRAIN_CHECKPOINT_PATH="qwen1_5_moe")
    assert "num_layers is 4 in qwen1_5_moe/config.json and 24" in refused("qwen-mcore-pretrain", command)
    assert "--upcycle follows from argument 19 (MOE)" in refused(
        "qwen-mcore-pretrain", tiny("qwen-mcore-pretrain", "--upcycle")
    )


def test_an_extra_vocabulary_must_add_up(planned, refused, material):
    told = refused("qwen-pretrain", tiny("qwen-pretrain", EXTRA_VOCAB_SIZE="293"))
    assert "argument 10 (EXTRA_VOCAB_SIZE) is 293: the tokenizer's 22 + 293 are not config.json's vocab_size 22" in told
    plan = planned("qwen-pretrain", [*tiny("qwen-pretrain", EXTRA_VOCAB_SIZE="2")[:24]])  # the model's own has 20
    assert not any("EXTRA_VOCAB_SIZE" in warning for warning in plan["warnings"])


def test_a_size_has_its_former_name_too_and_pad_len_may_be_the_longest_sample(planned, material):
    size = {"MODEL_SIZE": "13B", "PRETRAIN_CHECKPOINT_PATH": "none", "PAD_LEN": "40000"}
    plan = planned("qwen-megablocks-pretrain", tiny("qwen-megablocks-pretrain", MOE="false", **size))
    assert (plan["arguments"]["MODEL_SIZE"], plan["model"]["num_layers"]) == ("14B", 40)
    assert plan["model"]["max_position_embeddings"] == 40000
    assert "argument 9 (PAD_LEN) is 40000: max_position_embeddings, 32768 otherwise" in plan["warnings"]


def test_only_launchers_with_moe_make_experts(refused, material):
    told = refused("llama-pretrain", tiny("llama-pretrain", "--upcycle"))
    assert "--upcycle follows from MOE, an argument of other launchers" in told


def test_transformer_engine_is_accepted_and_told_once(planned, material):
    notes = [text for text in planned("qwen-pretrain", tiny("qwen-pretrain", TE="true"))["warnings"] if "(TE)" in text]
    assert notes == ["argument 18 (TE) is true: accepted, but layers are PyTorch's; PR fp8 uses torchao"]
    assert not any("(TE)" in text for text in planned("qwen-pretrain", tiny("qwen-pretrain"))["warnings"])


def test_raw_records_are_not_for_a_launcher_that_pre_trains(refused, material, monkeypatch):
    monkeypatch.setenv("MP_DATASET_TYPE", "raw")
    assert "this launcher pre-trains: MP_DATASET_TYPE=raw is for fine-tuning; unset it" in refused(
        "llama-pretrain", tiny("llama-pretrain")
    )


SCRIPT = ["--seq-length", "16", "--train-iters", "40", "--lr", "1e-3", "--data-path", "tokens", "--save", "kept"]
SCRIPT += ["--load", "mistral", "--tokenizer-name-or-path", "words/tokenizer.model", "--model-size", "auto"]


def test_the_last_word_of_a_script_counts(planned, material):
    more = ["--lr", "5e-4", "--train-iters=20", "--lr-warmup-fraction", "0.1", "--sliding-window", "3", "--fp16"]
    run = flags(planned("mistral-script", [*SCRIPT, *more, "--eval-iters", "0", "--split", "100,0,0"]))
    assert (run.optimizer.lr, run.optimizer.lr_warmup_iters, run.optimizer.lr_decay_iters) == (5e-4, 2, 20)
    assert (run.model.window_size, run.precision, run.data.tokenizer_model) == (3, "fp16", "words")
    assert (run.checkpoint.load, run.checkpoint.save, run.tensorboard_dir) == ("mistral", "kept", None)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--hidden-dropout", "0.1"], "--hidden-dropout is '0.1'; allowed: 0: this package has no dropout"),
        (["--save", "./mistral/"], "mistral/ is where the run starts from; name another directory to write"),
        (["--lr", "fast"], "--lr is 'fast'; allowed: a number from 0 to 1"),
        (["--lr", "3"], "--lr is '3'; allowed: a number from 0 to 1"),
        (["--sequence-paralel"], "unknown option '--sequence-paralel'; did you mean --sequence-parallel?"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank is 2; allowed: 0 to 1 (--nnodes counts nodes)"),
        (["--micro-batch-size", "3"], "--global-batch-size 32 is not a multiple of --micro-batch-size 3"),
        (["--seq-length", "100000"], "100000 tokens per sample are more than max_position_embeddings 64"),
    ],
)
def test_a_script_names_the_flag_that_is_wrong(refused, material, extra, told):
    assert told in refused("mistral-script", [*SCRIPT, *extra])


def test_several_nodes_of_a_script_are_its_variables(tmp_path):
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head", "WORLD_SIZE": "3", "MP_DRY_RUN": "1"}
    script = ROOT / "examples/mistral/tune_mistral_7b_ptd.sh"
    status, plan, err = through_shell("sh", script, ["--use-mc2", "--next-tockens", "0"], tmp_path, **variables)
    assert status == 0, err
    assert (plan["parallel"]["world"], plan["parallel"]["dp"]) == (16, 2)
    assert plan["command"][plan["command"].index("--node-rank") + 1] == "1"
    assert flags(plan).data.is_instruction_dataset and flags(plan).data.seq_length == 32768
    assert not list(tmp_path.iterdir())
