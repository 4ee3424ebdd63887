#!/bin/sh
# Convert a dense Qwen1.5 checkpoint between Hugging Face and Megatron-Core. 7 positionals, or 6 without HG_CKPT_PATH.
#
#   1 MODEL_SIZE         0.5B | 1.8B | 4B | 7B | 14B | 32B | 72B | auto (from config.json)
#   2 SOURCE_CKPT_PATH   directory to read
#   3 TARGET_CKPT_PATH   directory to write; it appears complete or not at all
#   4 TP  5 PP           tensor- and pipeline-parallel ranks of the Megatron side
#   6 mg2hf              true: back to Hugging Face | false: to Megatron
#   7 HG_CKPT_PATH       Hugging Face directory with config and tokenizer files; default: the source's
#
# What stands in TARGET_CKPT_PATH is kept, unless it is a checkpoint and --overwrite is passed; tensors keep their type,
# unless --dtype fp32|fp16|bf16 is. MP_DRY_RUN=1 prints the plan and starts nothing.
# MP_PP0_LAYERS=N gives the first of several pipeline stages N layers.
#
#   sh hf2mcore_qwen1.5_dense_convertor.sh 0.5B /mnt/qwen-ckpts/Qwen1.5-0.5B \
#     /mnt/qwen-ckpts/Qwen1.5-0.5B-to-mcore-tp2-pp2 2 2 false /mnt/qwen-ckpts/Qwen1.5-0.5B
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch qwen-dense "$@"
