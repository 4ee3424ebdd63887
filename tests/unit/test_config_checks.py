"""Cross-field rules: each one broken alone, and all of them told together."""

import dataclasses
import shlex

import pytest

from megatron_patch.config.checks import check, check_model, problems, sample_length
from megatron_patch.config.flags import from_flags, known_flags, to_flags, unknown_flag
from megatron_patch.config.run import RunConfig

BASE = shlex.split(
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2 "
    "--kv-channels 16 --vocab-size 100 --max-position-embeddings 64 --train-data-path d --valid-data-path d "
    "--seq-length 32 --max-padding-length 48 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 9 "
    "--save s --save-interval 5 --load c --family mistral --train-iters 9 --micro-batch-size 2 --global-batch-size 8"
)
STRETCHED = "--original-max-position-embeddings 16 --rope-type"
LATENT = "--kv-lora-rank 8 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8"
EXPERTS = "--num-moe-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32"
EP4 = "--expert-model-parallel-size 4"
TP2, SHARED = "--tensor-model-parallel-size 2", "--moe-shared-expert-intermediate-size"
GROUPS = f"{EXPERTS} --moe-router-num-groups 4 --moe-router-group-topk 2"


def run(*flags: str) -> RunConfig:
    return from_flags([*BASE, *flags])


def test_a_run_that_fits_has_no_problem():
    assert problems(run("--tensor-model-parallel-size", "2", "--sequence-parallel"), world=4) == []
    check(run(), world=1)
    check(run(*shlex.split(f"{GROUPS} {LATENT} {STRETCHED} yarn --kv-channels 15")), world=4)
    whole = f"{EXPERTS} {TP2} --expert-tensor-parallel-size 1 {EP4} --moe-ffn-hidden-size 33"
    check(run(*shlex.split(whole)), world=4)


@pytest.mark.parametrize(
    ("flags", "world", "told"),
    [
        ("--num-query-groups 3", 1, "num_attention_heads 4 is not a multiple of num_query_groups 3"),
        ("--tensor-model-parallel-size 4", 4, "num_query_groups 2 is not a multiple of tensor_model_parallel_size 4"),
        ("--tensor-model-parallel-size 2 --ffn-hidden-size 97", 2, "ffn_hidden_size 97 is not a multiple of"),
        ("--kv-channels 15", 1, "kv_channels 15 must be even"),
        ("--tensor-model-parallel-size 2 --sequence-parallel --seq-length 33", 2, "33 tokens of a sample"),
        ("--context-parallel-size 2 --seq-length 30", 2, "not a multiple of 2 × context_parallel_size 2 = 4"),
        (
            "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel --seq-length 36",
            4,
            "not a multiple of 2 × context_parallel_size 2 × tensor_model_parallel_size 2 (sequence_parallel) = 8",
        ),
        ("--seq-length 65", 1, "65 tokens per sample are more than max_position_embeddings 64"),
        ("--dataset JSON-SFT --max-padding-length 65", 1, "65 tokens per sample are more than"),
        ("--tensor-model-parallel-size 2", 3, "= 2 does not divide 3 ranks"),
        ("--global-batch-size 6", 4, "global_batch_size 6 is not a multiple of micro_batch_size 2 × 4 data-parallel"),
        ("--train-iters 0", 1, "train_iters 0 must be at least 1; one iteration takes global_batch_size 8 × 32 = 256"),
        ("--lr-warmup-iters 9", 1, "lr_warmup_iters 9 must be less than lr_decay_iters 9"),
        ("--lr 1e-5", 1, "lr 1e-05 must be at least min_lr 0.0001"),
        ('--map-keys {"prompt":"q"}', 1, "map_keys is of raw records"),
        ("--dataset JSON-SFT --is-instruction-dataset", 1, "is_instruction_dataset is of .bin/.idx files"),
        ("--is-instruction-dataset --reset-position-ids", 1, "reset_position_ids is of pre-training documents"),
        ("--dataset MMAP-SFT --eod-mask-loss", 1, "eod_mask_loss is of pre-training documents"),
        ("--sft-packing", 1, "sft_packing is for fine-tuning data"),
        ("--seed 4294967296", 1, "seed 4294967296 must be 0 to 4294967295"),
        ("--distributed-timeout-minutes 1e30", 1, "distributed_timeout_minutes 1e+30 must be 0.01 to 10080"),
        ("--distributed-timeout-minutes 1e-9", 1, "distributed_timeout_minutes 1e-09 must be 0.01 to 10080"),
        ("--max-nonfinite-steps 0", 1, "max_nonfinite_steps 0 must be at least 1"),
        ("--save=", 1, "save '' is empty"),
        ("--log-file=", 1, "log_file '' is empty"),
        ("--lr nan", 1, "lr nan must be 0 or more"),
        ("--micro-batch-size 0", 1, "micro_batch_size 0 must be at least 1"),
        ("--eval-iters -1", 1, "eval_iters -1 must be 0 or more"),
        ("--window-size 0", 1, "window_size 0 must be at least 1"),
        ("--adam-beta2 1", 1, "adam_beta2 1.0 must be 0 or more and less than 1"),
        ("--adam-eps 0", 1, "adam_eps 0.0 must be more than 0"),
        ("--rope-type llama3", 1, "rope_type llama3 needs original_max_position_embeddings"),
        (f"{STRETCHED} llama3 --low-freq-factor 4", 1, "low_freq_factor 4.0 must be less than high_freq_factor 4.0"),
        (f"{STRETCHED} yarn --beta-slow 32", 1, "beta_slow 32.0 must be less than beta_fast 32.0"),
        (f"{STRETCHED} yarn --rotary-scaling-factor 0", 1, "rotary_scaling_factor 0.0 must be more than 0"),
        (f"{LATENT} --qk-pos-emb-head-dim 7", 1, "qk_pos_emb_head_dim 7 must be even"),
        (f"{LATENT} --v-head-dim 0", 1, "v_head_dim 0 must be at least 1"),
        ("--expert-model-parallel-size 2", 2, "expert_model_parallel_size 2 shares out experts, and the"),
        ("--expert-tensor-parallel-size 2", 2, "expert_tensor_parallel_size 2 must be 1 or tensor_model"),
        ("--expert-tensor-parallel-size 0", 2, "expert_tensor_parallel_size 0 must be at least 1"),
        (
            f"{EXPERTS} {EP4} --num-moe-experts 6",
            4,
            "num_moe_experts 6 is not a multiple of expert_model_parallel_size",
        ),
        (f"{EXPERTS} {TP2} --moe-ffn-hidden-size 33", 2, "moe_ffn_hidden_size 33 is not a multiple of the 2 ranks"),
        (f"{EXPERTS} {TP2} {SHARED} 33", 2, "moe_shared_expert_intermediate_size 33 is not a multiple of tensor"),
        (f"{EXPERTS} --moe-aux-loss-coeff -1", 1, "moe_aux_loss_coeff -1.0 must be 0 or more"),
        (f"{EXPERTS} --moe-router-topk 0", 1, "moe_router_topk 0 must be at least 1"),
        (f"{EXPERTS} --moe-router-topk 9", 1, "moe_router_topk 9 is more than the 8 experts"),
        (f"{GROUPS} --moe-router-topk 5", 1, "moe_router_topk 5 is more than the 4 experts"),
        (f"{GROUPS} --moe-router-num-groups 3", 1, "moe_router_group_topk 2 of moe_router_num_groups 3 with num_moe"),
        (f"{GROUPS} --moe-router-group-topk 5", 1, "moe_router_group_topk 5 of moe_router_num_groups 4 with num_moe"),
        (f"{EXPERTS} --moe-first-dense-layers 2", 1, "moe_first_dense_layers 2 must be less than num_layers 2"),
        (f"{EXPERTS} --moe-shared-expert-gate", 1, "moe_shared_expert_gate needs moe_shared_expert_intermediate_size"),
    ],
)
def test_a_broken_rule_is_told_with_both_values(flags, world, told):
    found = problems(run(*flags.split()), world)
    assert len(found) == 1
    assert told in found[0]


def test_an_architecture_alone_has_ranges_and_rules():
    check_model(run().model)
    for change, told in (({"rotary_base": 0.0}, "rotary_base 0.0 must be more"), ({"kv_channels": 15}, "must be even")):
        with pytest.raises(ValueError, match=told):
            check_model(dataclasses.replace(run().model, **change))


def test_no_checkpoint_needs_a_tokenizer():
    assert "--tokenizer-model" in problems(dataclasses.replace(run(), checkpoint=no_start(run())), 1)[0]
    told = problems(dataclasses.replace(run("--tokenizer-model", "t"), checkpoint=no_start(run())), 1)
    assert told == []


def no_start(whole: RunConfig):
    return dataclasses.replace(whole.checkpoint, load=None)


def test_all_broken_rules_are_told_together():
    broken = run("--tensor-model-parallel-size", "4", "--train-iters", "0", "--lr", "1e-5")
    with pytest.raises(ValueError, match="num_query_groups") as error:
        check(broken, world=6)
    assert len(str(error.value).splitlines()) == 4


def test_a_raw_sample_is_as_long_as_its_padding():
    assert sample_length(run()) == 32
    assert sample_length(run("--dataset", "JSON-SFT")) == 48


def test_flags_and_run_are_each_others_inverse():
    whole = run(
        "--no-use-flash-attn", "--train-data-path", "0.3", "a b", "0.7", "c", "--lr", "0.1", "--adam-eps", "3e-9"
    )
    assert from_flags(to_flags(whole)) == whole
    assert whole.data.train_data_path == ("0.3", "a b", "0.7", "c")


def test_an_unknown_flag_is_refused_with_the_nearest(capsys):
    assert (
        unknown_flag("--global-batchsize", known_flags())
        == "unknown option '--global-batchsize'; did you mean --global-batch-size?"
    )
    with pytest.raises(SystemExit) as exit_status:
        run("--seq-len", "3")
    assert exit_status.value.code == 2
    assert "did you mean --seq-length?" in capsys.readouterr().err
    assert len(known_flags()) == len(set(known_flags()))
