#!/bin/sh
# Pre-train Qwen1.5. 24 positionals.
#
#    1 ENV                       dsw (this machine) | dlc (several nodes)
#    2 MEGATRON_PATCH_PATH       anything: accepted and ignored
#    3 MODEL_SIZE                0.5B | 1.8B | 4B | 7B | 14B | 32B | 72B | auto (from config.json); 13B is 14B
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
#   19 SAVE_INTERVAL             iterations between checkpoints
#   20 DATASET_PATH              .bin/.idx prefix, or 'weight prefix weight prefix …'
#   21 PRETRAIN_CHECKPOINT_PATH  directory to start from, or none (then also --tokenizer-model DIR)
#   22 TRAIN_TOKENS              tokens to train on
#   23 WARMUP_TOKENS             tokens of warm-up
#   24 OUTPUT_BASEPATH           directory for checkpoints and logs
#
# Validation takes its share of DATASET_PATH (--split 98,2,0).
# MP_DRY_RUN=1 prints the plan and starts nothing. NPROC_PER_NODE sets the number of ranks; MP_VP layers per virtual
# stage, MP_PP0_LAYERS those of the first stage, MP_AC_LAYERS those recomputed or offloaded together. Any --flag
# after the positionals overrides a derived setting (--log-interval 10).
#
#   sh run_pretrain_megatron_qwen.sh dsw ../.. 0.5B 1 8 1e-5 1e-6 2048 2048 293 bf16 1 1 sel true true true false \
#     100000 /mnt/qwen-datasets/wudao_qwenbpe_text_document /mnt/qwen-ckpts/Qwen1.5-0.5B 10000000000 100000000 \
#     /mnt/output_qwen
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch qwen-pretrain "$@"
