#!/bin/sh
# Convert a LLaMA checkpoint between Hugging Face and Megatron-LM's own format. 8 positionals.
#
#   1 MEGATRON_PATH      accepted and ignored
#   2 SOURCE_CKPT_PATH   directory to read; of a Megatron checkpoint also its release or iter_NNNNNNN
#   3 TARGET_CKPT_PATH   directory to write; it appears complete or not at all
#   4 TP  5 PP           tensor- and pipeline-parallel ranks of the Megatron side
#   6 MN                 llama-7b … llama-65b | llama2-7b … llama2-70b | auto (from config.json), which is also what
#                        codellama…, yi…, deepseek-llm… and vicuna… mean
#   7 EXTRA_VOCAB_SIZE   vocab_size of config.json less the tokenizer's: checked, never added | 0: not used
#   8 mg2hf              true: back to Hugging Face, with the config.json that stands beside the checkpoint | false
#
# What stands in TARGET_CKPT_PATH is kept, unless it is a checkpoint and --overwrite is passed; tensors keep their type,
# unless --dtype fp32|fp16|bf16 is. MP_DRY_RUN=1 prints the plan and starts nothing.
#
#   sh hf2megatron_convertor.sh ../../../ /mnt/llama2-ckpts/Llama-2-7b-hf \
#     /mnt/llama2-ckpts/Llama-2-7b-hf-to-megatron-tp2-pp1 2 1 llama2-7b 0 false
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch llama-megatron "$@"
