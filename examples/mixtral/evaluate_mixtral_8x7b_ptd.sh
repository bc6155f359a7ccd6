#!/usr/bin/env bash
# Evaluates Mixtral 8x7B on MMLU on the 8 devices of a node: tp8-pp1, whatever layout the checkpoint has.
#
#     TOKENIZER_PATH=./model_from_hf/Mixtral-8x7B/ CHECKPOINT=./model_weights/Mixtral-8x7B-v0.1-tp1-pp8-ep1 \
#         DATA_PATH=./mmlu/test/ TASK=mmlu bash examples/mixtral/evaluate_mixtral_8x7b_ptd.sh
#
# CHECKPOINT is a Hugging Face folder, converted weights, or what a run saves. DATA_PATH is MMLU's folder or its test/,
# beside which dev/ is found; TASK may name tasks of lm-eval, then DATA_PATH is empty. OUTPUT is for results and finished
# tasks: started again, a killed evaluation goes on. TP, PP and EP are the layout to compute in. Flags after the script's
# name go to the program (tools/evaluate_mixtral.py --help). DRY_RUN=1 prints the command; MODEL=tiny tries it on 2 CPU
# processes. examples/slurm/evaluate.sbatch is the same as a job of Slurm's.
set -euo pipefail
MODEL="${MODEL:-mixtral-8x7b}"
# shellcheck source=examples/mixtral/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

#       name                real                                                tiny
setting TOKENIZER_PATH      ./model_from_hf/Mixtral-8x7B/
setting CHECKPOINT          ./model_weights/Mixtral-8x7B-v0.1-tp1-pp8-ep1       ./ckpt/tiny-ptd/
setting DATA_PATH           ./mmlu/test/
setting TASK                mmlu
setting OUTPUT              ./evaluation/Mixtral-8x7B                           ./evaluation/tiny
setting TP                  8                                                   2
setting PP                  1                                                   1

# The name that launch_inference reads.
TOKENIZER_MODEL="$TOKENIZER_PATH"
data=()
if [[ -n "$DATA_PATH" ]]; then data=(--data-path "$DATA_PATH"); fi
launch_inference evaluate_mixtral.py --tasks "$TASK" "${data[@]}" --output "$OUTPUT" --resume "$@"
