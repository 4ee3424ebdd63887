#!/bin/sh
# Convert a LLaMA checkpoint between Hugging Face and Megatron-Core. 13 positionals; 0 means not used.
#
#    1 MODEL_SIZE          7B | 13B | 70B (LLaMA 2), llama1-7B | llama1-13B | 30B | 65B, llama3-8B | llama3-70B,
#                          llama3.1-8B | llama3.1-70B | auto (from config.json)
#    2 HG_CKPT_PATH        Hugging Face directory with config and tokenizer files
#    3 MEGATRON_PATH       accepted and ignored
#    4 SOURCE_CKPT_PATH    directory to read
#    5 TARGET_CKPT_PATH    directory to write; it appears complete or not at all
#    6 TP  7 PP            tensor- and pipeline-parallel ranks of the Megatron side
#    8 EXTRA_VOCAB_SIZE    vocab_size of config.json less the tokenizer's: checked, never added
#    9 NUM_EXPERTS         experts, made of the dense MLP
#   10 EXPERTS_TOPK        experts each token is sent to
#   11 EP                  expert-parallel ranks of the Megatron side
#   12 NUM_EXPERT_SPLITS   parts the dense MLP is split into for experts
#   13 mg2hf               true: back to Hugging Face | false: to Megatron
#
# What stands in TARGET_CKPT_PATH is kept, unless it is a checkpoint and --overwrite is passed; tensors keep their type,
# unless --dtype fp32|fp16|bf16 is. MP_DRY_RUN=1 prints the plan and starts nothing.
# MP_PP0_LAYERS=N gives the first of several pipeline stages N layers.
#
#   sh hf2mcore_convertor.sh 7B /mnt/llama2-ckpts/Llama-2-7b-hf ../../../ /mnt/llama2-ckpts/Llama-2-7b-hf \
#     /mnt/llama2-ckpts/Llama-2-7b-hf-to-mcore-tp2-pp2 2 2 0 0 0 0 0 false
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch llama-convert "$@"
