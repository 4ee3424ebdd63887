#!/bin/sh
# Score Mistral 7B on MMLU from local files: one line for each subject, and their total. Edit the variables below, or set
# them in the environment; a flag on the command line comes last and counts.
#
#   bash examples/mistral/evaluate_mistral_7b_ptd.sh
#   TASK=cmmlu DATA_PATH=./cmmlu/test bash examples/mistral/evaluate_mistral_7b_ptd.sh --limit 10
#
# TASK is mmlu, ceval or cmmlu; DATA_PATH has a dev directory beside it, for the five examples before each question.
# CHECKPOINT may be of any format and layout. MP_DRY_RUN=1 prints the plan and starts nothing.
set -eu
CHECKPOINT="${CHECKPOINT:-./model_weights/Mistral-7B-Instruct-v0.2-tp8-pp1/}"
TOKENIZER_MODEL="${TOKENIZER_MODEL:-./model_from_hf/Mistral-7B-Instruct-v0.2/}"
DATA_PATH="${DATA_PATH:-./mmlu/data/test/}"
TASK="${TASK:-mmlu}"

GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-6000}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"

TP="${TP:-8}"
PP="${PP:-1}"

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch evaluation-script \
    --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --task "$TASK" --task-data-path "$DATA_PATH" \
    --load "$CHECKPOINT" --tokenizer-name-or-path "$TOKENIZER_MODEL" \
    --evaluation-batch-size 1 --bf16 "$@"
