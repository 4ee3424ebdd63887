"""What a good command becomes: names, flags, ranks, variables and warnings."""

import json
import shutil

import numpy as np
import pytest
from commands import CONVERSION, PREPROCESSING, PRETRAINING, RAW_FINE_TUNING, ROOT, SFT_PREPROCESSING, changed

from megatron_patch.config.flags import from_flags
from megatron_patch.config.memory import MemoryConfig
from megatron_patch.data.indexed import IndexedDatasetBuilder
from megatron_patch.launch.cluster import accelerators, cores, many_nodes, one_node
from megatron_patch.launch.positional import UsageError

GOLDEN = ROOT / "tests" / "golden"
NAME = (
    "pretrain-mcore-mistral-7B-lr-1e-5-minlr-1e-6-bs-1-gbs-8-seqlen-128-pr-bf16-tp-4-pp-1-cp-1-ep-1-ac-none-do-true-"
    "sp-true-ti-9-wi-0"
)
NODES = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500", "NPROC_PER_NODE": "4"}


def flags(plan: dict):
    """The run that the planned command's ranks will see."""
    command = plan["command"]
    return from_flags(command[command.index("megatron_patch.train") + 1 :])


def after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_names_and_places_are_the_contracts(planned):
    output = planned("mistral", PRETRAINING)["output"]
    base = "/workspace/output_mcore_mistral_pretrain"
    assert output["checkpoint"] == f"{base}/checkpoint/{NAME}"
    assert output["log"] == f"{base}/log/{NAME}.jsonl"
    stamp = output["tensorboard"].removeprefix(f"{base}/tensorboard/{NAME}_")
    assert [len(part) for part in stamp.replace("-", ".").split(".")] == [4, 2, 2, 2, 2, 2]


def test_a_fine_tuning_has_its_own_name_and_reads_records(planned, monkeypatch):
    monkeypatch.setenv("MP_DATASET_TYPE", "raw")
    plan = planned("mistral", changed(RAW_FINE_TUNING, PAD_LEN="64"))
    assert "/checkpoint/finetune-mcore-mistral-7B-" in plan["output"]["checkpoint"]
    assert plan["output"]["checkpoint"].endswith("-tp-1-pp-1-cp-1-ep-1-ac-none-do-true-sp-true-ti-10000-wi-100")
    run = flags(plan)
    assert (run.data.dataset, run.data.seq_length, run.data.max_padding_length) == ("JSON-SFT", 128, 64)
    assert not run.parallel.sequence_parallel  # nothing to cut at TP 1
    assert not run.data.sft_packing
    monkeypatch.setenv("MP_SFT_PACKING", "true")
    assert flags(planned("mistral", RAW_FINE_TUNING)).data.sft_packing


def test_packing_means_nothing_to_pre_training(planned, monkeypatch):
    monkeypatch.setenv("MP_SFT_PACKING", "true")
    plan = planned("mistral", PRETRAINING)
    assert any("MP_SFT_PACKING is true: no effect in pre-training" in warning for warning in plan["warnings"])
    assert not flags(plan).data.sft_packing


def test_the_ranks_see_what_the_positionals_say(planned):
    run = flags(planned("mistral", changed(PRETRAINING, FL="false", PR="fp32", SAVE_INTERVAL="7")))
    assert (run.micro_batch_size, run.global_batch_size, run.precision, run.use_flash_attn) == (1, 8, "fp32", False)
    assert (run.optimizer.lr, run.optimizer.min_lr, run.checkpoint.save_interval) == (1e-5, 1e-6, 7)
    assert run.parallel.tensor_model_parallel_size == 4
    assert run.parallel.sequence_parallel and run.parallel.use_distributed_optimizer
    assert (run.model.num_layers, run.model.window_size, run.model.rotary_base) == (32, 4096, 10000.0)


def test_optimizer_constants_are_the_contracts(planned):
    run = flags(planned("mistral", PRETRAINING))
    adam = run.optimizer
    assert (adam.adam_beta1, adam.adam_beta2, adam.weight_decay, adam.clip_grad) == (0.9, 0.95, 0.1, 1.0)
    assert (adam.lr_decay_style, run.model.init_method_std) == ("cosine", 0.008)
    assert (run.eval_interval, run.eval_iters, run.log_interval, run.data.split) == (10000, 10, 1, "99,1,0")


@pytest.mark.parametrize(
    ("changes", "variables", "expected"),
    [
        ({"AC": "full"}, {"MP_AC_LAYERS": "4"}, {"recompute_granularity": "full", "recompute_num_layers": 4}),
        ({"AC": "sel"}, {}, {"recompute_granularity": "selective"}),
        ({"AC": "offload"}, {"MP_AC_LAYERS": "3"}, {"cpu_offloading_num_layers": 3}),
        ({"AC": "offload"}, {}, {"cpu_offloading_num_layers": 1}),
        ({"OPTIMIZER_OFFLOAD": "static"}, {}, {"optimizer_offload_policy": "static"}),
        ({"OPTIMIZER_OFFLOAD": "auto"}, {}, {"optimizer_offload_policy": "auto"}),
        (
            {"OPTIMIZER_OFFLOAD": "0.5"},
            {},
            {"optimizer_offload_policy": "static", "optimizer_offload_fraction": 0.5},
        ),
        ({"OPTIMIZER_OFFLOAD": "0"}, {}, {}),
    ],
)
def test_what_is_traded_for_memory_reaches_the_ranks(planned, monkeypatch, changes, variables, expected):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert flags(planned("mistral", changed(PRETRAINING, **changes))).memory == MemoryConfig(**expected)


def test_every_axis_reaches_the_ranks_and_the_plan_counts_them(planned, monkeypatch):
    monkeypatch.setenv("MP_PP0_LAYERS", "8")
    monkeypatch.setenv("MP_VP", "4")
    axes = {"TP": "2", "PP": "4", "CP": "2", "EP": "2", "MODEL_SIZE": "8x7B", "GLOBAL_BATCH_SIZE": "16", "PR": "fp16"}
    plan = planned("mistral", changed(PRETRAINING, **axes))
    run = flags(plan)
    assert (run.family, run.precision) == ("mixtral", "fp16")
    assert run.parallel.num_layers_per_virtual_pipeline_stage == 4
    assert plan["parallel"]["layers_of_stages"] == [8, 8, 8, 8]
    assert plan["parallel"]["virtual_chunks"] == 2
    assert (plan["parallel"]["world"], plan["parallel"]["dp"], plan["parallel"]["edp"]) == (16, 1, 1)


def test_options_override_derived_flags(planned):
    plan = planned("mistral", [*PRETRAINING, "--log-interval", "10", "--lr=3e-4", "--no-use-flash-attn", "--overwrite"])
    run = flags(plan)
    assert (run.log_interval, run.optimizer.lr, run.use_flash_attn, run.checkpoint.overwrite) == (10, 3e-4, False, True)
    assert plan["schedule"]["lr"] == 3e-4


def test_a_blend_and_one_prefix_with_a_space_are_told_apart(planned, tmp_path):
    prefix = tmp_path / "my corpus"
    with IndexedDatasetBuilder(prefix, "uint16") as builder:
        builder.add(np.zeros(400), [4] * 100, [1] * 100)
    blend = f"0.3 '{prefix}' 0.7 /b"
    run = flags(planned("mistral", changed(PRETRAINING, DATASET_PATH=str(prefix), VALID_DATASET_PATH=blend)))
    assert run.data.train_data_path == (str(prefix),)
    assert run.data.valid_data_path == ("0.3", str(prefix), "0.7", "/b")


def test_auto_takes_the_architecture_from_the_checkpoint(planned, tmp_path):
    hf = json.loads((GOLDEN / "Mistral-7B-v0.3" / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    changes = {"MODEL_SIZE": "auto", "PRETRAIN_CHECKPOINT_PATH": str(tmp_path)}
    plan = planned("mistral", changed(PRETRAINING, **changes))
    assert plan["model"]["parameters"] == 2 * 218_112_000 + 2 * 32768 * 4096 + 4096
    assert plan["model"]["active_parameters"] == plan["model"]["parameters"]
    assert (plan["model"]["rotary_base"], plan["model"]["window_size"]) == (1e6, None)


def test_what_config_json_overrides_is_warned_of(planned):
    changes = {"PRETRAIN_CHECKPOINT_PATH": str(GOLDEN / "Mistral-7B-v0.3")}
    warnings = planned("mistral", changed(PRETRAINING, **changes))["warnings"]
    assert any(warning.startswith("rope_theta 1000000.0 comes from ") for warning in warnings)


@pytest.mark.parametrize(
    ("changes", "variables", "told"),
    [
        ({"TP": "1"}, {}, "SP (argument 14) is true: no effect without tensor parallelism"),
        ({}, {"MP_AC_LAYERS": "2"}, "MP_AC_LAYERS has no effect"),
        ({}, {"MP_PP0_LAYERS": "2"}, "MP_PP0_LAYERS has no effect"),
        ({"PAD_LEN": "64"}, {}, "PAD_LEN (argument 8) is 64: no effect"),
    ],
)
def test_a_setting_without_effect_is_a_warning(planned, monkeypatch, changes, variables, told):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    count = sum(told in warning for warning in planned("mistral", changed(PRETRAINING, **changes))["warnings"])
    assert count == 1
    if variables:
        monkeypatch.delenv(name)
    assert not any(told in warning for warning in planned("mistral", PRETRAINING)["warnings"])


def test_without_accelerators_the_smallest_world_shares_the_cores(tmp_path):
    ranks = one_node({}, 3, root=tmp_path)
    assert (ranks.world, after(ranks.options, "--nproc-per-node")) == (3, "3")
    assert after(ranks.options, "--local-addr") == "127.0.0.1"
    assert "no accelerator" in ranks.counted


def test_threads_are_the_users_or_the_cores_divided(planned, monkeypatch):
    assert planned("mistral", PRETRAINING)["environment"] == {"OMP_NUM_THREADS": str(max(1, cores() // 4))}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert planned("mistral", PRETRAINING)["environment"] == {}


@pytest.mark.parametrize(
    ("devices", "variables", "expected"),
    [
        ("nvidia0 nvidia1 nvidia2 nvidiactl nvidia-uvm", {}, 3),
        ("nvidia0 nvidia1 nvidia2", {"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        ("nvidia0 nvidia1", {"CUDA_VISIBLE_DEVICES": "GPU-8932f937,MIG-1"}, 2),
        ("nvidia0 nvidia1", {"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ("nvidia0 nvidia1", {"CUDA_VISIBLE_DEVICES": ""}, 0),
        ("", {"CUDA_VISIBLE_DEVICES": "0,1"}, 0),
        ("davinci0 davinci1 davinci_manager", {}, 2),
        ("davinci0 davinci1", {"ASCEND_RT_VISIBLE_DEVICES": "1"}, 1),
    ],
)
def test_accelerators_are_counted_without_torch(tmp_path, devices, variables, expected):
    (tmp_path / "dev").mkdir()
    for name in devices.split():
        (tmp_path / "dev" / name).touch()
    assert accelerators(variables, tmp_path)[0] == expected


def test_rocm_counts_the_nodes_that_compute(tmp_path):
    for node, units in enumerate((0, 304, 304)):
        folder = tmp_path / "sys/class/kfd/kfd/topology/nodes" / str(node)
        folder.mkdir(parents=True)
        (folder / "properties").write_text(f"cpu_cores_count 64\nsimd_count {units}\n")
    assert accelerators({}, tmp_path)[0] == 2
    assert accelerators({"HIP_VISIBLE_DEVICES": "1"}, tmp_path)[0] == 1


def test_the_number_of_ranks_is_the_users(tmp_path):
    assert one_node({"NPROC_PER_NODE": "5"}, 1, root=tmp_path).world == 5


def test_several_nodes_are_what_the_cluster_says():
    ranks = many_nodes(NODES)
    assert ranks.world == 8
    assert [after(ranks.options, option) for option in ("--nnodes", "--node-rank", "--nproc-per-node")] == [
        "2",
        "1",
        "4",
    ]
    assert (after(ranks.options, "--master-addr"), after(ranks.options, "--master-port")) == ("head", "29500")
    by_container = {name: text for name, text in NODES.items() if name != "NPROC_PER_NODE"}
    assert many_nodes(by_container | {"KUBERNETES_CONTAINER_RESOURCE_GPU": "8"}).world == 16


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"MASTER_ADDR": None, "RANK": None}, "needs in the environment: RANK, MASTER_ADDR"),
        ({"WORLD_SIZE": None}, "needs in the environment: WORLD_SIZE"),
        ({"MASTER_PORT": ""}, "needs in the environment: MASTER_PORT"),
        ({"NPROC_PER_NODE": None}, "needs in the environment: NPROC_PER_NODE (or KUBERNETES_CONTAINER_RESOURCE_GPU)"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE is '0'; allowed: a whole number ≥ 1"),
        (
            {"NPROC_PER_NODE": None, "KUBERNETES_CONTAINER_RESOURCE_GPU": "all"},
            "KUBERNETES_CONTAINER_RESOURCE_GPU is 'all'; allowed: a whole number ≥ 1",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; allowed: a whole number ≥ 1"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536; allowed: 1 to 65535"),
        ({"RANK": "2"}, "RANK is 2; allowed: 0 to 1"),
    ],
)
def test_an_incomplete_cluster_is_named(change, told):
    environ = {name: text for name, text in (NODES | change).items() if text is not None}
    with pytest.raises(UsageError) as error:
        many_nodes(environ)
    assert told in str(error.value)


def test_a_run_on_several_nodes_is_planned(planned, monkeypatch):
    for name, text in NODES.items():
        monkeypatch.setenv(name, text)
    parallel = planned("mistral", changed(PRETRAINING, ENV="dlc"))["parallel"]
    assert {axis: parallel[axis] for axis in ("tp", "dp", "world")} == {"tp": 4, "dp": 2, "world": 8}


@pytest.mark.parametrize(
    ("tokenizer", "extra", "prefix"),
    [
        ("MistralTokenizer", [], "mmap_mistral_datasets"),
        ("mixtraltokenizer", [], "mmap_mixtral_datasets"),
        ("LLama3Tokenizer", [], "mmap_llama3_datasets"),
        ("DeepSeekV2Tokenizer", [], "mmap_deepseekv2_datasets"),
        ("GPT2BPETokenizer", ["pile"], "mmap_pile_datasets"),
        ("auto", [], "mmap_datasets"),
    ],
)
def test_preprocessing_names_its_output_as_documented(planned, tokenizer, extra, prefix):
    plan = planned("pretraining-dataset", ["/i", tokenizer, "text, title", "/o", "/l", *extra])
    assert plan["output"] == {
        "text_document": f"/o/{prefix}_text_document",
        "title_document": f"/o/{prefix}_title_document",
    }
    command = plan["command"]
    assert command[command.index("--json-keys") + 1 :][:3] == ["text", "title", "--append-eod"]
    assert after(command, "--tokenizer-model") == "/l"


def test_the_tools_accept_the_commands_that_are_planned(planned, tmp_path, monkeypatch, capsys):
    """The colleagues' own parsers read what the launchers write."""
    from megatron_patch import convert
    from megatron_patch.data import preprocess, preprocess_sft

    jobs = []

    def convert_nothing(job):
        jobs.append(job)
        raise ValueError("recorded")

    monkeypatch.setattr(convert, "convert", convert_nothing)
    shutil.copytree(GOLDEN / "Mistral-7B-v0.1", tmp_path / "hf")
    arguments = ["7B", str(tmp_path / "hf"), "", "/mcore", str(tmp_path / "out"), *CONVERSION[5:11], "true"]
    command = planned("mistral-convert", [*arguments, "--dtype", "bf16"])["command"]
    assert convert.main(command[3:]) == 1
    capsys.readouterr()
    assert (jobs[0].format, jobs[0].assets, jobs[0].model_size) == ("hf", tmp_path / "hf", "7B")
    options = preprocess._parser().parse_args(planned("pretraining-dataset", PREPROCESSING)["command"][3:])
    assert (options.input, options.json_keys, options.append_eod) == (["/mnt/corpus.jsonl"], ["text"], True)
    command = planned("sft-dataset", [*SFT_PREPROCESSING, "--show-samples", "2"])["command"]
    options = preprocess_sft._parser().parse_args(command[3:])
    assert (options.seq_length, options.pack, options.family_prompt, options.show_samples) == (128, True, "mistral", 2)


def test_records_go_where_the_prefix_says(planned):
    plan = planned("sft-dataset", [*SFT_PREPROCESSING[:1], "Qwen2Tokenizer", *SFT_PREPROCESSING[2:5]])
    assert plan["output"] == {"text_document": "/mnt/datasets/alpaca_text_document"}
    assert after(plan["command"], "--family-prompt") == "alpaca" and "--pack" not in plan["command"]


def test_fine_tuning_reads_samples_from_pairs(planned, monkeypatch):
    assert (run := flags(planned("mistral", changed(PRETRAINING, SFT="true")))).data.dataset == "MMAP-SFT"
    assert not run.data.sft_packing
    monkeypatch.setenv("MP_SFT_PACKING", "true")
    assert flags(planned("mistral", changed(PRETRAINING, SFT="true"))).data.sft_packing


@pytest.mark.parametrize(
    ("dtype", "lengths", "message"),
    [
        ("uint16", [256], "is of uint16, which cannot hold the label -100"),
        ("int32", [128], "has samples of 2 × 64 numbers; with SEQ_LEN 128 they must be 2 × 128"),
        ("int32", [128, 128, 127], "has samples of different lengths, so it is not for fine-tuning"),
        ("int32", [], "holds no sample"),
    ],
)
def test_a_pair_that_is_not_for_this_fine_tuning_is_refused(refused, tmp_path, dtype, lengths, message):
    with IndexedDatasetBuilder(tmp_path / "data", dtype) as builder:
        builder.add(np.zeros(sum(lengths)), lengths, [1] * len(lengths))
    where = str(tmp_path / "data")
    told = refused("mistral", changed(PRETRAINING, SFT="true", DATASET_PATH=where, VALID_DATASET_PATH=where))
    assert message in told
