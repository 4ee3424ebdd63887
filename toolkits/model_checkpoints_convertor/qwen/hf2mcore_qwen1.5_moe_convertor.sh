#!/bin/sh
# Convert Qwen1.5-MoE between Hugging Face and Megatron-Core. 8 positionals, or 7 without HG_CKPT_PATH.
#
#   1 MODEL_SIZE         A2.7B | auto (from config.json)
#   2 SOURCE_CKPT_PATH   directory to read
#   3 TARGET_CKPT_PATH   directory to write; it appears complete or not at all
#   4 TP  5 PP  6 EP     tensor-, pipeline- and expert-parallel ranks of the Megatron side
#   7 mg2hf              true: back to Hugging Face | false: to Megatron
#   8 HG_CKPT_PATH       Hugging Face directory with config and tokenizer files; default: the source's
#
# What stands in TARGET_CKPT_PATH is kept, unless it is a checkpoint and --overwrite is passed; tensors keep their type,
# unless --dtype fp32|fp16|bf16 is. MP_DRY_RUN=1 prints the plan and starts nothing.
# MP_PP0_LAYERS=N gives the first of several pipeline stages N layers.
#
#   sh hf2mcore_qwen1.5_moe_convertor.sh A2.7B /mnt/qwen-ckpts/Qwen1.5-MoE-A2.7B \
#     /mnt/qwen-ckpts/Qwen1.5-MoE-A2.7B-to-mcore-tp1-pp1-ep4 1 1 4 false /mnt/qwen-ckpts/Qwen1.5-MoE-A2.7B
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch qwen-moe "$@"
