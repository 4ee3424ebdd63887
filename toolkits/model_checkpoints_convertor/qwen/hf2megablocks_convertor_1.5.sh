#!/bin/sh
# Convert a Qwen1.5 checkpoint to MegaBlocks, its MLP copied to experts, and back. 12 positionals, or 10 without
# MODEL_SIZE (then from config.json) and EXPERTS_TOPK (then 1).
#
#    1 MODEL_SIZE         0.5B | 1.8B | 4B | 7B | 14B | 32B | 72B | auto (from config.json)
#    2 HG_CKPT_PATH       Hugging Face directory with config and tokenizer files
#    3 MEGATRON_PATH      accepted and ignored
#    4 SOURCE_CKPT_PATH   directory to read
#    5 TARGET_CKPT_PATH   directory to write; it appears complete or not at all
#    6 TP  7 PP           tensor- and pipeline-parallel ranks of the Megatron side
#    8 EXTRA_VOCAB_SIZE   vocab_size of config.json less the tokenizer's: checked, never added | 0: not used
#    9 NUM_EXPERTS        experts, each a copy of the dense MLP
#   10 EXPERTS_TOPK       experts each token is sent to
#   11 EP                 expert-parallel ranks
#   12 mg2hf              true: back to Hugging Face | false: to MegaBlocks
#
# What stands in TARGET_CKPT_PATH is kept, unless it is a checkpoint and --overwrite is passed; tensors keep their type,
# unless --dtype fp32|fp16|bf16 is. MP_DRY_RUN=1 prints the plan and starts nothing.
#
#   sh hf2megablocks_convertor_1.5.sh /mnt/qwen-ckpts/Qwen1.5-0.5B ../../.. /mnt/qwen-ckpts/Qwen1.5-0.5B \
#     /mnt/qwen-ckpts/Qwen1.5-0.5B_megablocks_tp1_pp1_ep8_exp8 2 1 293 8 4 false
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch qwen-megablocks "$@"
