#!/usr/bin/env bash
# Talks to Mixtral 8x7B in the terminal, on the 8 devices of a node: tp8-pp1, whatever layout the checkpoint has.
#
#     CHECKPOINT=./model_weights/Mixtral-8x7B-v0.1-tp1-pp8-ep1/ TOKENIZER_MODEL=./model_from_hf/Mixtral-8x7B/ \
#         bash examples/mixtral/chat_mixtral_8x7b_ptd.sh --prompt-template mixtral
#
# CHECKPOINT is a Hugging Face folder, converted weights, or what a run saves; TOKENIZER_MODEL may be empty where the
# tokenizer lies beside them. TP, PP and EP are the layout to compute in. Flags after the script's name go to the program
# (tools/chat_mixtral.py --help). DRY_RUN=1 prints the command; MODEL=tiny tries it on 2 CPU processes.
set -euo pipefail
MODEL="${MODEL:-mixtral-8x7b}"
# shellcheck source=examples/mixtral/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

#       name                real                                                tiny
setting CHECKPOINT          ./model_weights/Mixtral-8x7B-v0.1-tp1-pp8-ep1/      ./ckpt/tiny-ptd/
setting TOKENIZER_MODEL     ./model_from_hf/Mixtral-8x7B/
setting TP                  8                                                   2
setting PP                  1                                                   1

launch_inference chat_mixtral.py "$@"
