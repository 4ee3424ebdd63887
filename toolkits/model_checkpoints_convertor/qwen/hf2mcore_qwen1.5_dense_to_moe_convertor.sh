#!/bin/sh
# Turn a dense Qwen1.5 into a fine-grained mixture of experts for Megatron-Core. 9 positionals.
#
# Expert i is part i mod NUM_SPLITS of the dense MLP, gate and up each widened to MOE_FFN. Router and shared expert
# (4 × MOE_FFN wide) are new, from N(0, 0.02). Each token is sent to NUM_SPLITS experts.
#
#   1 MODEL_SIZE         0.5B | 1.8B | 4B | 7B | 14B | 32B | 72B | auto (from config.json)
#   2 SOURCE_CKPT_PATH   directory to read
#   3 TARGET_CKPT_PATH   directory to write; it appears complete or not at all
#   4 TP  5 PP  6 EP     tensor-, pipeline- and expert-parallel ranks
#   7 NUM_EXPERTS        experts
#   8 NUM_SPLITS         parts that the dense MLP is split into
#   9 MOE_FFN            width of one expert, at least that of one part
#
# What stands in TARGET_CKPT_PATH is kept, unless it is a checkpoint and --overwrite is passed; tensors keep their type,
# unless --dtype fp32|fp16|bf16 is. MP_DRY_RUN=1 prints the plan and starts nothing.
# MP_PP0_LAYERS=N gives the first of several pipeline stages N layers.
#
#   sh hf2mcore_qwen1.5_dense_to_moe_convertor.sh 1.8B /mnt/qwen-ckpts/Qwen1.5-1.8B \
#     /mnt/qwen-ckpts/Qwen1.5-1.8B-to-mcore-tp1-pp1-ep4-exp64 1 1 4 64 4 1408
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch qwen-dense-to-moe "$@"
