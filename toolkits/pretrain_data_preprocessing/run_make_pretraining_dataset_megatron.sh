#!/bin/sh
# Turn text into a .bin/.idx dataset for pre-training. 5 positionals.
#
#   1 INPUT_DATA_PATH   a file, a directory (in natural order) or a quoted pattern of .jsonl, .json, .txt, .csv, also .gz
#   2 TOKENIZER         MistralTokenizer | MixtralTokenizer | auto | … (names the output; the tokenizer is that of 5)
#   3 JSON_KEYS         keys to tokenize, separated by spaces or commas
#   4 OUTPUT_DATA_DIR   directory to write: mmap_mistral_datasets_<key>_document.bin and .idx
#   5 LOAD_DIR          the tokenizer's directory
#   6 DATASET_NAME      for GPT2BPETokenizer only, where it names the output
#
# Then options: --skip-bad-lines, --recursive, --workers N, --prepend-bos, --seq-length N, --trust-remote-code.
# MP_DRY_RUN=1 prints the plan and starts nothing.
#
#   sh run_make_pretraining_dataset_megatron.sh /mnt/corpus.jsonl MistralTokenizer text /mnt/mistral-datasets \
#     /mnt/mistral-ckpts/Mistral-7B-v0.1
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch pretraining-dataset "$@"
