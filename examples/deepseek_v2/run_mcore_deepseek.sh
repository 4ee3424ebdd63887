#!/bin/sh
# Pre-train or fine-tune DeepSeek-V2. 26 positionals, then any --flag that overrides a derived one (--log-interval 10).
#
#    1 ENV                 dsw (this machine) | dlc (several nodes)
#    2 MODEL_SIZE          A2.4B | A21B | auto (from the checkpoint's config.json)
#    3 BATCH_SIZE          samples per forward pass and data-parallel rank
#    4 GLOBAL_BATCH_SIZE   samples per optimizer step
#    5 LR                  peak learning rate
#    6 MIN_LR              final learning rate
#    7 SEQ_LEN             tokens per sample
#    8 PAD_LEN             tokens per raw fine-tuning record, padding included
#    9 PR                  bf16 | fp16 | fp8 | fp32
#   10 TP  11 PP  12 CP  13 EP   parallel sizes: tensor, pipeline, context, expert
#   14 SP                  sequence parallelism: true | false
#   15 DO                  distributed optimizer: true | false
#   16 FL                  fastest attention kernel: true | false
#   17 SFT                 fine-tune on instructions: true | false
#   18 AC                  recompute or offload activations: sel | full | offload | false
#   19 OPTIMIZER_OFFLOAD   state to host memory: false | static | auto | a share such as 0.5
#   20 SAVE_INTERVAL       iterations between checkpoints
#   21 DATASET_PATH        .bin/.idx prefix, 'weight prefix weight prefix …', or JSON file
#   22 VALID_DATASET_PATH  the same for validation
#   23 PRETRAIN_CHECKPOINT_PATH  directory to start from, or none (then also --tokenizer-model DIR)
#   24 TRAIN_TOKENS_OR_ITERS     tokens; iterations when SFT=true
#   25 WARMUP_TOKENS_OR_ITERS    the same, for warm-up
#   26 OUTPUT_BASEPATH     directory for checkpoints and logs
#
# MP_DRY_RUN=1 prints the plan and starts nothing. MP_DATASET_TYPE=raw reads JSON records (SFT=true); without it
# fine-tuning reads what run_build_idxmap_sft_dataset.sh writes. MP_SFT_PACKING=true puts several records in a sample.
# NPROC_PER_NODE sets the number of ranks; MP_VP layers per virtual stage, MP_PP0_LAYERS those of the first stage,
# MP_AC_LAYERS those recomputed or offloaded together.
#
#   sh run_mcore_deepseek.sh dsw A2.4B 1 8 1e-5 1e-6 128 128 bf16 2 1 1 4 true true true false false false 100000 \
#     /mnt/deepseek-datasets/mmap_deepseekv2_datasets_text_document \
#     /mnt/deepseek-datasets/mmap_deepseekv2_datasets_text_document \
#     /mnt/deepseek-ckpts/DeepSeek-V2-Lite-to-mcore-tp2-pp1-ep4 10000 100 /mnt/output_mcore_deepseek_pretrain
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch deepseek "$@"
