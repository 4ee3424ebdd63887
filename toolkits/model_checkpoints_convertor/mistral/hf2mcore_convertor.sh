#!/bin/sh
# Convert a Mistral or Mixtral checkpoint between Hugging Face and Megatron-Core. 13 positionals, or 12 without WS.
#
#    1 MODEL_SIZE         7B | 7B-v0.2 | 7B-v0.3 | 8x7B | 8x22B | 4x7B | auto (from config.json)
#    2 HG_CKPT_PATH       Hugging Face directory with config and tokenizer files
#    3 MEGATRON_PATH      accepted and ignored
#    4 SOURCE_CKPT_PATH   directory to read
#    5 TARGET_CKPT_PATH   directory to write; it appears complete or not at all
#    6 TP  7 PP           tensor- and pipeline-parallel ranks of the Megatron side
#    8 EXTRA_VOCAB_SIZE   vocab_size of config.json less the tokenizer's: checked, never added | 0: not used
#    9 NUM_EXPERTS        experts of a Mixtral; a 7B becomes a Mixtral with so many copies of its MLP | 0: not used
#   10 EXPERTS_TOPK       experts each token is sent to | 0: not used
#   11 EP                 expert-parallel ranks of the Megatron side | 0: not used
#   12 mg2hf              true: back to Hugging Face | false: to Megatron
#   13 WS                 world size of a model with experts, TP × PP × EP | 0: not used
#
# What stands in TARGET_CKPT_PATH is kept, unless it is a checkpoint and --overwrite is passed; tensors keep their type,
# unless --dtype fp32|fp16|bf16 is. MP_DRY_RUN=1 prints the plan and starts nothing.
# MP_PP0_LAYERS=N gives the first of several pipeline stages N layers.
#
#   sh hf2mcore_convertor.sh 7B /mnt/mistral-ckpts/Mistral-7B-v0.1 ../../../ /mnt/mistral-ckpts/Mistral-7B-v0.1 \
#     /mnt/mistral-ckpts/Mistral-7B-v0.1-to-mcore-tp4-pp1 4 1 0 0 0 0 false
#   sh hf2mcore_convertor.sh 8x7B /mnt/mistral-ckpts/Mixtral-8x7B-v0.1 ../../../ /mnt/mistral-ckpts/Mixtral-8x7B-v0.1 \
#     /mnt/mistral-ckpts/Mixtral-8x7B-v0.1-to-mcore-tp4-pp1-ep4-exp8-ws16 4 1 0 8 2 4 false 16
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch mistral-convert "$@"
