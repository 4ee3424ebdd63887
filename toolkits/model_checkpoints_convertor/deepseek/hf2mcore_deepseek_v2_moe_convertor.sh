#!/bin/sh
# Convert a DeepSeek-V2 checkpoint between Hugging Face and Megatron-Core. 10 positionals; 9 without HG_CKPT_PATH, or
# without USE_TE as later releases have it.
#
#    1 MODEL_SIZE         A2.4B | A21B | auto (from config.json)
#    2 SOURCE_CKPT_PATH   directory to read
#    3 TARGET_CKPT_PATH   directory to write; it appears complete or not at all
#    4 TP  5 PP           tensor- and pipeline-parallel ranks of the Megatron side
#    6 EP                 expert-parallel ranks of the Megatron side | 0: not used
#    7 PR                 fp32 | fp16 | bf16: type of what is written
#    8 USE_TE             true: parameter names of Transformer Engine | false: Megatron-Core's own
#    9 mg2hf              true: back to Hugging Face | false: to Megatron
#   10 HG_CKPT_PATH       Hugging Face directory with config and tokenizer files; default: the source's
#
# What stands in TARGET_CKPT_PATH is kept, unless it is a checkpoint and --overwrite is passed. MP_DRY_RUN=1 prints the
# plan and starts nothing.
# MP_PP0_LAYERS=N gives the first of several pipeline stages N layers.
#
#   bash hf2mcore_deepseek_v2_moe_convertor.sh A2.4B /mnt/deepseek-ckpts/DeepSeek-V2-Lite \
#     /mnt/deepseek-ckpts/DeepSeek-V2-Lite-to-mcore-tp2-pp1-ep4 2 1 4 fp32 true false
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch deepseek-convert "$@"
