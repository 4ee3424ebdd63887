#!/bin/sh
# Fine-tune Qwen1.5 as a dropless mixture of experts. 26 positionals.
#
#    1 ENV                       dsw (this machine) | dlc (several nodes)
#    2 MEGATRON_PATCH_PATH       anything: accepted and ignored
#    3 MODEL_SIZE                0.5B | 1.8B | 4B | 7B | 14B | 32B | 72B | A2.7B | auto (from config.json); 13B is 14B
#    4 BATCH_SIZE                samples per forward pass and data-parallel rank
#    5 GLOBAL_BATCH_SIZE         samples per optimizer step
#    6 LR                        peak learning rate
#    7 MIN_LR                    final learning rate
#    8 SEQ_LEN                   tokens per sample
#    9 PAD_LEN                   tokens per raw fine-tuning record, padding included
#   10 EXTRA_VOCAB_SIZE          the config's vocab_size less the tokenizer's | 0: not used
#   11 PR                        bf16 | fp16 | fp8 | fp32
#   12 TP                        tensor-parallel ranks
#   13 PP                        pipeline stages
#   14 AC                        recompute or offload activations: sel | full | offload | false
#   15 DO                        distributed optimizer: true | false
#   16 FL                        fastest attention kernel: true | false
#   17 SP                        sequence parallelism: true | false
#   18 TE                        accepted: true | false; layers are PyTorch's either way
#   19 MOE                       true | false: a mixture of experts, made of the dense model's MLP where it is none
#   20 SAVE_INTERVAL             iterations between checkpoints
#   21 TRAIN_DATASET_PATH        JSON file of records
#   22 VALID_DATASET_PATH        the same for validation
#   23 PRETRAIN_CHECKPOINT_PATH  directory to start from, or none (then also --tokenizer-model DIR)
#   24 TRAIN_ITERS               iterations
#   25 WARMUP_ITERS              iterations of warm-up
#   26 OUTPUT_BASEPATH           directory for checkpoints and logs
#
# With MOE true a dense PRETRAIN_CHECKPOINT_PATH becomes 8 experts while it is loaded, each a copy of its MLP, and a
# router sends each token to 1 of them (--moe-router-topk). EP is what the data-parallel ranks and the experts can
# share.
# Records are JSON; MP_DATASET_TYPE=idxmap reads what run_build_idxmap_sft_dataset.sh writes. MP_SFT_PACKING=true
# puts several records in a sample.
# MP_DRY_RUN=1 prints the plan and starts nothing. NPROC_PER_NODE sets the number of ranks; MP_VP layers per virtual
# stage, MP_PP0_LAYERS those of the first stage, MP_AC_LAYERS those recomputed or offloaded together. Any --flag
# after the positionals overrides a derived setting (--log-interval 10).
#
#   sh run_finetune_megablocks_qwen_withGA.sh dsw ../.. 0.5B 1 8 1e-5 1e-6 2048 2048 293 bf16 1 1 sel false true \
#     true false true 1000 /mnt/qwen-datasets/alpaca_zh-qwen-train.json /mnt/qwen-datasets/alpaca_zh-qwen-valid.json \
#     /mnt/qwen-ckpts/Qwen1.5-0.5B 10000 100 /mnt/output_qwen
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch qwen-megablocks-finetune "$@"
