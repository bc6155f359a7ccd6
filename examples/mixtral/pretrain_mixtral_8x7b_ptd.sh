#!/usr/bin/env bash
# Pretrains Mixtral 8x7B on 16 devices of two nodes with pipeline and expert parallelism: tp1-pp8-ep2.
#
#     # on each of the two nodes, with its own NODE_RANK
#     NODE_RANK=0 MASTER_ADDR=node0 DATA_PATH=./dataset/Mixtral-8x7B/alpaca_text_document \
#         bash examples/mixtral/pretrain_mixtral_8x7b_ptd.sh
#
# DATA_PATH may be a weighted blend ('0.6 A 0.4 "B with spaces"'). CKPT_LOAD_DIR is a converted checkpoint (empty: random
# weights). The run saves in CKPT_SAVE_DIR and goes on from there when started again. DRY_RUN=1 prints the command;
# MODEL=tiny tries it on 4 CPU processes; launch.sh lists the other variables. Flags after the script's name, and those in
# DATA_ARGS, go to the training program: --is-instruction-dataset tunes on instructions, by default those of
# DATA_PATH=./dataset/Mixtral-8x7B/alpaca.
set -euo pipefail
MODEL="${MODEL:-mixtral-8x7b}"
# shellcheck source=examples/mixtral/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

also CKPT_LOAD_DIR LOAD_DIR
also CKPT_SAVE_DIR SAVE_DIR
if [[ "$* ${DATA_ARGS:-}" == *--is-instruction-dataset* ]]; then setting DATA_PATH ./dataset/Mixtral-8x7B/alpaca; fi
#       name                real                                            tiny
setting DATA_PATH           ./dataset/Mixtral-8x7B/alpaca_text_document
setting TOKENIZER_MODEL     ./model_from_hf/Mixtral-8x7B/
setting CKPT_SAVE_DIR       ./ckpt/Mixtral-8x7B/                            ./ckpt/tiny-ptd/
setting CKPT_LOAD_DIR       ''
setting NNODES              2                                               1
setting GPUS_PER_NODE       8                                               4
setting TP                  1                                               1
setting PP                  8                                               2
setting EP                  2                                               2
setting GLOBAL_BATCH_SIZE   128                                             8
setting TRAIN_ITERS         1000                                            20
setting LR                  1.25e-6                                         1e-3
setting MIN_LR              1.25e-7                                         1e-4
setting LR_WARMUP_ITERS     10                                              0
setting WEIGHT_DECAY        0.1
setting AUX_LOSS_COEFF      1e-2

LOAD_DIR="$CKPT_LOAD_DIR"
SAVE_DIR="${CKPT_SAVE_DIR%/}"
launch "$@"
