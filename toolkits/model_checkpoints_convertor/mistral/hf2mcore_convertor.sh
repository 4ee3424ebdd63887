#!/bin/sh
# Convert a Mistral checkpoint between Hugging Face and Megatron. 13 positionals, or 12 without WS; 0 means not used.
#
#    1 MODEL_SIZE         7B | auto (from config.json)
#    2 HG_CKPT_PATH       Hugging Face directory with config and tokenizer files
#    3 MEGATRON_PATH      accepted and ignored
#    4 SOURCE_CKPT_PATH   directory to read
#    5 TARGET_CKPT_PATH   directory to write; it appears complete or not at all
#    6 TP  7 PP           tensor- and pipeline-parallel ranks of the Megatron side
#    8 EXTRA_VOCAB_SIZE   0
#    9 NUM_EXPERTS  10 EXPERTS_TOPK  11 EP   0
#   12 mg2hf              true: back to Hugging Face | false: to Megatron
#   13 WS                 accepted for an 8x7B
#
# --overwrite replaces a checkpoint in TARGET_CKPT_PATH. MP_DRY_RUN=1 prints the plan and starts nothing.
#
#   sh hf2mcore_convertor.sh 7B /mnt/mistral-ckpts/Mistral-7B-v0.1 ../../../ /mnt/mistral-ckpts/Mistral-7B-v0.1 \
#     /mnt/mistral-ckpts/Mistral-7B-v0.1-to-mcore-tp4-pp1 4 1 0 0 0 0 false
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch mistral-convert "$@"
