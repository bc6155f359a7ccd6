#!/usr/bin/env bash
# Fine-tunes Mixtral 8x7B with QLoRA on one device of 80 GB: adapters beside attention and every expert, the model itself in 4 bits.
#
#     DATA=./dataset/messages.json bash examples/mixtral/tune_mixtral_8x7b_qlora.sh
#
# All numbers are those of RECIPE (`megatron-mixtral recipes list`, or a file of your own). HF_CHECKPOINT, DATA (raw JSON or
# JSON lines), SAVE_DIR, SEQ_LENGTH, TRAIN_EPOCHS, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE, LR, LORA_RANK, TP, PP and EP win over
# it where they are set, and so do flags after the script's name. Started again, it goes on from its last checkpoint.
# DRY_RUN=1 prints the command; MODEL=tiny tries it on one CPU process (with HF_CHECKPOINT and DATA).
set -euo pipefail
MODEL="${MODEL:-mixtral-8x7b}"
# shellcheck source=examples/mixtral/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

#       name                real                                    tiny
setting RECIPE              mixtral_8x7b_qlora_openai_json_e3       tiny_qlora_openai_json_e20
setting NNODES              1                                       1
setting GPUS_PER_NODE       1                                       1
launch_tuning "$@"
