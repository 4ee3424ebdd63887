#!/bin/sh
# Ask Mistral 7B: greedy, sampled, by beam search, with log-probabilities, and then a conversation. Edit the variables
# below, or set them in the environment (all but WORLD_SIZE, which is computed); flags on the command line come last.
#
#   bash examples/mistral/generate_mistral_7b_ptd.sh
#   bash examples/mistral/generate_mistral_7b_ptd.sh --task greedy --prompt 'Who wrote Faust?'
#   TP=1 GPUS_PER_NODE=1 bash examples/mistral/generate_mistral_7b_ptd.sh --task chat --inference-prompt-type mixtral
#
# The checkpoint may have any layout. Questions go through the tokenizer's chat template, else the family's.
# MP_DRY_RUN=1 prints the plan and starts nothing.
set -eu
CHECKPOINT="${CHECKPOINT:-./model_weights/Mistral-7B-Instruct-v0.2-tp8-pp1/}"
TOKENIZER_MODEL="${TOKENIZER_MODEL:-./model_from_hf/Mistral-7B-Instruct-v0.2/}"

MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-6000}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"

TP="${TP:-8}"
PP="${PP:-1}"

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch mistral-generate \
    --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --load "$CHECKPOINT" --tokenizer-name-or-path "$TOKENIZER_MODEL" --bf16 \
    --max-length 256 --max-new-tokens 128 --temperature 0.7 --top-k 50 --top-p 0.95 "$@"
