#!/usr/bin/env bash
# Pretrains Mixtral 8x7B at a 4k window on 16 devices of two nodes with tensor and pipeline parallelism: tp4-pp4.
#
#     # on each of the two nodes, with its own NODE_RANK
#     NODE_RANK=0 MASTER_ADDR=node0 CHECKPOINT_PATH=./ckpt/Mixtral-8x7B-tp4-pp4 \
#     BLENDED_DATA='0.6 ./dataset/common_crawl_text_document 0.4 ./dataset/github_text_document' \
#         bash examples/mixtral/pretrain_mixtral_8x7b_tp4_pp4.sh
#
# The variables are those of mixtral_4x7b_example.sh. Tensor parallelism stays inside a node (4 of 8 devices), only
# pipeline traffic crosses nodes. DRY_RUN=1 prints the command; MODEL=tiny tries it on 4 CPU processes.
set -euo pipefail
MODEL="${MODEL:-mixtral-8x7b}"
# shellcheck source=examples/mixtral/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

also CHECKPOINT_PATH LOAD_DIR
also BLENDED_DATA DATA_PATH
#       name                real                            tiny
setting CHECKPOINT_PATH     ./ckpt/Mixtral-8x7B-tp4-pp4     ''
setting BLENDED_DATA        ./dataset/common_crawl_text_document
setting TOKENIZER_MODEL     ./model_from_hf/Mixtral-8x7B
setting SAVE_DIR            ./ckpt/Mixtral-8x7B-trained     ./ckpt/tiny-tp-pp
setting NNODES              2                               1
setting GPUS_PER_NODE       8                               4
setting TP                  4                               2
setting PP                  4                               2
setting GLOBAL_BATCH_SIZE   512                             8
setting TRAIN_ITERS         10000                           20
setting LR                  1e-5                            1e-3
setting MIN_LR              1e-6                            1e-4
setting LR_WARMUP_ITERS     512                             0
setting WEIGHT_DECAY        0.01
setting AUX_LOSS_COEFF      1e-3

LOAD_DIR="$CHECKPOINT_PATH"
DATA_PATH="$BLENDED_DATA"
launch "$@"
