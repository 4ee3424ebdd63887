#!/bin/sh
# Pre-train LLaMA, dense or as a mixture of experts. 25 positionals.
#
#    1 ENV                       dsw (this machine) | dlc (several nodes)
#    2 MEGATRON_PATCH_PATH       anything: accepted and ignored
#    3 MODEL_SIZE                7B | 13B | 70B | llama1-7B | llama1-13B | 30B | 65B | llama3-8B | llama3-70B |
#                               llama3.1-8B | llama3.1-70B | auto (from config.json)
#    4 BATCH_SIZE                samples per forward pass and data-parallel rank
#    5 GLOBAL_BATCH_SIZE         samples per optimizer step
#    6 LR                        peak learning rate
#    7 MIN_LR                    final learning rate
#    8 SEQ_LEN                   tokens per sample
#    9 PAD_LEN                   the most tokens a sample of the model may have
#   10 EXTRA_VOCAB_SIZE          the config's vocab_size less the tokenizer's | 0: not used
#   11 PR                        bf16 | fp16 | fp8 | fp32
#   12 TP                        tensor-parallel ranks
#   13 PP                        pipeline stages
#   14 AC                        recompute or offload activations: sel | full | offload | false
#   15 DO                        distributed optimizer: true | false
#   16 FL                        fastest attention kernel: true | false
#   17 SP                        sequence parallelism: true | false
#   18 TE                        accepted: true | false; layers are PyTorch's either way
#   19 MOE                       true | false: a mixture of experts, made of the dense model's MLP where it is none
#   20 SAVE_INTERVAL             iterations between checkpoints
#   21 DATASET_PATH              .bin/.idx prefix, or 'weight prefix weight prefix …'
#   22 PRETRAIN_CHECKPOINT_PATH  directory to start from, or none (then also --tokenizer-model DIR)
#   23 TRAIN_TOKENS              tokens to train on
#   24 WARMUP_TOKENS             tokens of warm-up
#   25 OUTPUT_BASEPATH           directory for checkpoints and logs
#
# With MOE true a dense PRETRAIN_CHECKPOINT_PATH becomes 8 experts while it is loaded, each a copy of its MLP, and a
# router sends each token to 2 of them (--moe-router-topk).
# Validation takes its share of DATASET_PATH (--split 99,1,0).
# MP_DRY_RUN=1 prints the plan and starts nothing. NPROC_PER_NODE sets the number of ranks; MP_VP layers per virtual
# stage, MP_PP0_LAYERS those of the first stage, MP_AC_LAYERS those recomputed or offloaded together. Any --flag
# after the positionals overrides a derived setting (--log-interval 10).
#
#   sh run_pretrain_mcore_llama.sh dsw ../.. 7B 1 8 1e-5 1e-6 2048 2048 0 bf16 1 1 sel true true true false false \
#     100000 /mnt/llama2-datasets/wudao_llamabpe_text_document /mnt/llama2-ckpts/Llama-2-7b-hf 10000000000 100000000 \
#     /mnt/output_llama
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"; export PYTHONPATH
exec python3 -m megatron_patch.launch llama-mcore-pretrain "$@"
