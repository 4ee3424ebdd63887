#!/bin/sh
# Train a Mixtral of four experts on samples of 4096 tokens. Edit the variables below, or set them in the environment; a
# flag on the command line comes last and counts.
#
#   CHECKPOINT_PATH=./Mixtral-4x7B-tp4-pp2 BLENDED_DATA="0.6 ./common_crawl_text_document 0.4 ./github_text_document" \
#     bash examples/mixtral/mixtral_4x7b_example.sh
#
# CHECKPOINT_PATH is a converted directory, which holds a tokenizer too; it is not written to. BLENDED_DATA is one
# prefix, or weights and prefixes. There is no dropout. MP_DRY_RUN=1 prints the plan and starts nothing.
set -eu
CHECKPOINT_PATH="${CHECKPOINT_PATH:-./Mixtral-4x7B-tp4-pp2}"
BLENDED_DATA="${BLENDED_DATA:-0.6 ./common_crawl_text_document 0.4 ./github_text_document}"
SAVE_PATH="${SAVE_PATH:-./ckpt/mixtral_4x7b}"

GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-6000}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"

TP="${TP:-4}"
PP="${PP:-2}"

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch mixtral-script \
    --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --expert-model-parallel-size 1 \
    --sequence-parallel --use-distributed-optimizer --use-flash-attn --bf16 \
    --seq-length 4096 --micro-batch-size 1 --global-batch-size 512 \
    --train-iters 250000 --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-iters 512 \
    --weight-decay 0.01 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 \
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001 \
    --data-path "$BLENDED_DATA" --split 1000,0,0 --dataloader-type cyclic \
    --load "$CHECKPOINT_PATH" --save "$SAVE_PATH" --save-interval 1024 --eval-interval 100000 --eval-iters 0 \
    --log-interval 1 --log-file logs/mixtral_4x7b_example.jsonl "$@"
