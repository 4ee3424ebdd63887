#!/bin/sh
# Fine-tune LLaMA for whole epochs. 22 positionals.
#
#    1 ENV                       dsw (this machine) | dlc (several nodes)
#    2 MEGATRON_PATCH_PATH       anything: accepted and ignored
#    3 MODEL_SIZE                7B | 13B | 70B | llama1-7B | llama1-13B | 30B | 65B | llama3-8B | llama3-70B |
#                               llama3.1-8B | llama3.1-70B | auto (from config.json)
#    4 BATCH_SIZE                samples per forward pass and data-parallel rank
#    5 LR                        peak learning rate
#    6 MIN_LR                    final learning rate
#    7 SEQ_LEN                   tokens per sample
#    8 PAD_LEN                   tokens per raw fine-tuning record, padding included
#    9 EXTRA_VOCAB_SIZE          the config's vocab_size less the tokenizer's | 0: not used
#   10 PR                        bf16 | fp16 | fp8 | fp32
#   11 TP                        tensor-parallel ranks
#   12 PP                        pipeline stages
#   13 AC                        recompute or offload activations: sel | full | offload | false
#   14 DO                        distributed optimizer: true | false
#   15 FL                        fastest attention kernel: true | false
#   16 SP                        sequence parallelism: true | false
#   17 TE                        accepted: true | false; layers are PyTorch's either way
#   18 TRAIN_DATASET_PATH        JSON file of records
#   19 VALID_DATASET_PATH        the same for validation
#   20 PRETRAIN_CHECKPOINT_PATH  directory to start from, or none (then also --tokenizer-model DIR)
#   21 EPOCH                     passes over the records; a checkpoint ends each
#   22 OUTPUT_BASEPATH           directory for checkpoints and logs
#
# The global batch is one micro-batch on every data-parallel rank; --global-batch-size accumulates more. An epoch is
# its records, too long ones included, divided by that, rounded up.
# Records are JSON; MP_DATASET_TYPE=idxmap reads what run_build_idxmap_sft_dataset.sh writes. MP_SFT_PACKING=true
# puts several records in a sample.
# MP_DRY_RUN=1 prints the plan and starts nothing. NPROC_PER_NODE sets the number of ranks; MP_VP layers per virtual
# stage, MP_PP0_LAYERS those of the first stage, MP_AC_LAYERS those recomputed or offloaded together. Any --flag
# after the positionals overrides a derived setting (--log-interval 10).
#
#   sh run_finetune_megatron_llama.sh dsw ../.. 7B 4 1e-5 1e-6 2048 2048 0 bf16 1 1 sel true true true false \
#     /mnt/llama2-datasets/alpaca_zh-llama-train.json /mnt/llama2-datasets/alpaca_zh-llama-valid.json \
#     /mnt/llama2-ckpts/Llama-2-7b-hf 2 /mnt/output_llama
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch llama-finetune "$@"
