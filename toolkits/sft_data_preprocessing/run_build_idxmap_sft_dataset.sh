#!/bin/sh
# Turn fine-tuning records into a .bin/.idx dataset. 6 positionals.
#
#   1 INPUT_DATA_PATH   JSON or JSON lines: Alpaca keys, ShareGPT conversations or OpenAI messages
#   2 TOKENIZER         MistralTokenizer | MixtralTokenizer | auto | … (the template where the tokenizer of 5 has none)
#   3 SEQ_LEN           tokens per sample: SEQ_LEN of the training
#   4 OUTPUT_PREFIX     receives <prefix>_text_document.bin, .idx and .json
#   5 LOAD_DIR          the tokenizer's directory
#   6 PACKING           true: several records per sample (default false)
#
# --prompt-type NAME names the template, --show-samples N prints records with what is learned highlighted.
# MP_DRY_RUN=1 prints the plan and starts nothing.
#
#   sh run_build_idxmap_sft_dataset.sh /mnt/alpaca_zh.json MistralTokenizer 128 /mnt/mistral-datasets/alpaca_zh \
#     /mnt/mistral-ckpts/Mistral-7B-v0.1 true
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch sft-dataset "$@"
