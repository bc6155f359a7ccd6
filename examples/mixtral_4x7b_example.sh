#!/usr/bin/env bash
# Continues the pretraining of a Mixtral 4x7B at a 4k window on one node of 8 devices: tp4-pp2.
#
#     CHECKPOINT_PATH=./ckpt/Mixtral-4x7B-tp4-pp2 \
#     BLENDED_DATA='0.6 ./dataset/common_crawl_text_document 0.4 ./dataset/github_text_document' \
#     TOKENIZER_MODEL=./model_from_hf/Mixtral-4x7B \
#         bash examples/mixtral_4x7b_example.sh
#
# CHECKPOINT_PATH is what tools/checkpoint/util.py wrote (empty: random weights). The run saves in SAVE_DIR and goes on
# from there when started again. DRY_RUN=1 prints the command; MODEL=tiny tries it on 4 CPU processes; mixtral/launch.sh
# lists the other variables.
set -euo pipefail
MODEL="${MODEL:-mixtral-4x7b}"
# shellcheck source=examples/mixtral/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/mixtral/launch.sh"

also CHECKPOINT_PATH LOAD_DIR
also BLENDED_DATA DATA_PATH
#       name                real                            tiny
setting CHECKPOINT_PATH     ./ckpt/Mixtral-4x7B-tp4-pp2     ''
setting BLENDED_DATA        ./dataset/common_crawl_text_document
setting TOKENIZER_MODEL     ./model_from_hf/Mixtral-4x7B
setting SAVE_DIR            ./ckpt/Mixtral-4x7B-trained     ./ckpt/tiny-trained
setting GPUS_PER_NODE       8                               4
setting TP                  4                               2
setting PP                  2                               2
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
