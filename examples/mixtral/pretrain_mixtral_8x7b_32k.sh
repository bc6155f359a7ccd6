#!/usr/bin/env bash
# Pretrains Mixtral 8x7B on sequences of 32,768 tokens on 32 devices of four nodes: tp2-pp4-ep8-cp4.
#
#     # on each of the four nodes, with its own NODE_RANK
#     NODE_RANK=0 MASTER_ADDR=node0 DATA_PATH=./dataset/books_text_document \
#         bash examples/mixtral/pretrain_mixtral_8x7b_32k.sh
#
# A sequence is cut over the 8 devices of a node (TP x CP), which also hold one expert of every layer each. The variables
# are those of mixtral_4x7b_example.sh. DRY_RUN=1 prints the command; MODEL=tiny tries it on 4 CPU processes.
# docs/parallelism.md#long-sequences says what else fits.
set -euo pipefail
MODEL="${MODEL:-mixtral-8x7b}"
# shellcheck source=examples/mixtral/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

#       name                real                            tiny
setting DATA_PATH           ./dataset/books_text_document
setting TOKENIZER_MODEL     ./model_from_hf/Mixtral-8x7B
setting LOAD_DIR            ./ckpt/Mixtral-8x7B-tp2-pp4-ep8 ''
setting SAVE_DIR            ./ckpt/Mixtral-8x7B-32k         ./ckpt/tiny-32k
setting NNODES              4                               1
setting GPUS_PER_NODE       8                               4
setting TP                  2                               1
setting PP                  4                               2
setting EP                  8                               2
setting ETP                 1
setting CP                  4                               2
setting SEQ_LENGTH          32768                           256
setting GLOBAL_BATCH_SIZE   32                              8
setting TRAIN_ITERS         1000                            20
setting LR                  1e-5                            1e-3
setting MIN_LR              1e-6                            1e-4
setting LR_WARMUP_ITERS     10                              0
setting WEIGHT_DECAY        0.1
setting AUX_LOSS_COEFF      1e-3

launch --recompute-granularity selective --recompute-modules moe_act layernorm "$@"
