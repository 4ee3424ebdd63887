#!/bin/sh
# Pre-train Mistral 7B on samples of 32768 tokens with a window of 4096. Edit the variables below, or set them in the
# environment; a flag on the command line comes last and counts. WORLD_SIZE is GPUS_PER_NODE × NNODES, whatever is set.
#
#   bash examples/mistral/pretrain_mistral_7b_ptd.sh
#   DATA_PATH=./finetune_dataset/Mistral-7B/alpaca bash examples/mistral/pretrain_mistral_7b_ptd.sh \
#     --load ./model_weights/Mistral-7B-Instruct-v0.2-tp8-pp1/ --finetune --is-instruction-dataset
#
# The architecture is that of --load, else that of TOKENIZER_MODEL's config.json, else --model-size 7B-v0.2.
# MP_DRY_RUN=1 prints the plan and starts nothing.
set -eu
DATA_PATH="${DATA_PATH:-./dataset/Mistral-7B/alpaca_text_document}"
TOKENIZER_MODEL="${TOKENIZER_MODEL:-./model_from_hf/Mistral-7B-Instruct-v0.2/}"
CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/Mistral-7B-Instruct-v0.2-tp8-pp1/}"

GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-6000}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"

TP="${TP:-8}"
PP="${PP:-1}"

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch mistral-script \
    --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --sequence-parallel --use-distributed-optimizer --use-flash-attn --bf16 \
    --seq-length 32768 --sliding-window 4096 --micro-batch-size 1 --global-batch-size 32 \
    --train-iters 1000 --lr 1.25e-6 --min-lr 1.25e-7 --lr-decay-style cosine --lr-warmup-fraction 0.01 \
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.01 \
    --data-path "$DATA_PATH" --split 100,0,0 --tokenizer-name-or-path "$TOKENIZER_MODEL" \
    --save "$CKPT_SAVE_DIR" --save-interval 1000 --eval-interval 1000 --eval-iters 0 \
    --log-interval 1 --log-file logs/pretrain_mistral_7b_ptd.jsonl "$@"
