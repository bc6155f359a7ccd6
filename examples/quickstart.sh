#!/usr/bin/env bash
# The whole of this library on one machine, on real text, in a few minutes: set-up, corpus, tokenization, conversion
# from Hugging Face, 3D-parallel pretraining, a stop and a resumption, export, a check with transformers, generation, and
# fine-tuning with QLoRA.
#
#     bash examples/quickstart.sh            # start, or go on where an earlier start was stopped
#     CLEAN=1 bash examples/quickstart.sh    # start afresh (or --clean)
#
# It runs on GPUs where some are visible and on CPU processes otherwise. Everything it makes is in work_quickstart/
# (or QUICKSTART_DIR). Each step prints the command that one would type for it; its output is in work_quickstart/logs.
#
#   STEPS STOP_AT     optimizer steps in all, and after which the run is stopped once     (45, 30)
#   MEGABYTES         size of the corpus                                                  (8)
#   SEQ_LENGTH GLOBAL_BATCH_SIZE MICRO_BATCH_SIZE LR                                      (256, 16, 4, 3e-3)
#   TUNE_EPOCHS KNOWN epochs of the fine-tuning, answers of 60 that are right after it    (4, 60)
#   RANKS TP PP EP    processes and layout             (4 ranks: tp2-pp2-ep2, or what the visible GPUs allow)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work="${QUICKSTART_DIR:-work_quickstart}"
if [[ "${1:-}" == --clean ]]; then CLEAN=1; fi
: "${STEPS:=45}" "${STOP_AT:=30}" "${MEGABYTES:=8}" "${SEQ_LENGTH:=256}" "${GLOBAL_BATCH_SIZE:=16}"
: "${MICRO_BATCH_SIZE:=4}" "${LR:=3e-3}" "${BELOW:=7.0}" "${WORKERS:=2}" "${TUNE_EPOCHS:=4}" "${KNOWN:=60}"
split=95,5,0
blend=(0.6 "$work/data/library_text_document" 0.4 "$work/data/tests_and_docs_text_document")

# -- how a step is run -------------------------------------------------------------------------------------

bold="" dim="" plain=""
if [[ -t 1 ]]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; fi
names=()
failed=0
redo=0
number=0

# Runs function `step_NAME` unless it is done. A step leaves rows `check|result|ok` in $rows; its stamp, written last,
# holds what it depends on, its seconds and those rows. Once a step is done again, all later ones are too.
step() {
    local name="$1" title="$2" depends="$3" began stamp="$work/stamps/$1"
    number=$((number + 1))
    names+=("$name")
    printf '\n%s%d. %s%s\n' "$bold" "$number" "$title" "$plain"
    if ((!redo)) && [[ -f "$stamp" && "$(head -n 1 "$stamp")" == "$depends" ]]; then
        printf '   done before, in %s s\n' "$(sed -n 2p "$stamp")"
        return
    fi
    redo=1
    rm -f "$stamp"
    rows="$work/stamps/.$name.rows" log="$work/logs/$name.log"
    : >"$rows"
    : >"$log"
    began=$SECONDS
    if ! "step_$name"; then
        if ! grep -q '|FAILED$' "$rows"; then echo "it ran|see $log|FAILED" >>"$rows"; fi
        failed=1
    fi
    if grep -q '|FAILED$' "$rows"; then failed=1; fi
    { echo "$depends"; echo $((SECONDS - began)); cat "$rows"; } >"$stamp.new"
    sed 's/^\([^|]*\)|\(.*\)|\([^|]*\)$/   -> \1: \2 (\3)/' "$rows"
    if ((failed)); then
        mv "$stamp.new" "$work/stamps/.$name.failed"
        tail -n 25 "$log"
        printf '\nStep %s failed; its output is in %s.\n' "$name" "$log"
        table
        exit 1
    fi
    mv "$stamp.new" "$stamp"
}

row() { printf '%s|%s|%s\n' "$1" "$2" "${3:-ok}" >>"$rows"; }

explain() { printf '   %s\n' "$@"; }

# Prints a command as one would type it, runs it, keeps its output, and shows the lines that match $show.
show=.
typed() {
    local -a words=("$@")
    if [[ "$1" == env ]]; then words=("${@:2}"); fi # typed at a prompt, assignments need no env
    launch_print "${words[@]}" | sed "1s/^/   $dim\$ /; 2,\$s/^/     $dim/; s/\$/$plain/"
    "$@" 2>&1 | tee -a "$log" | { grep --line-buffered -E "$show" || true; } |
        sed -u -E 's/^(.{112}).*/\1 .../; s/^/     /'
    return "${PIPESTATUS[0]}"
}

table() {
    local name stamp check result passed seconds
    printf '\n%s%-10s %7s  %-30s %s%s\n' "$bold" step seconds check result "$plain"
    for name in "${names[@]}"; do
        stamp="$work/stamps/$name"
        if [[ ! -f "$stamp" ]]; then stamp="$work/stamps/.$name.failed"; fi
        if [[ ! -f "$stamp" ]]; then continue; fi
        seconds="$(sed -n 2p "$stamp")"
        while IFS='|' read -r check result passed; do
            printf '%-10s %7s  %-30s %s\n' "$name" "$seconds" "$check" "$result${passed/#ok/}"
            name="" seconds=""
        done < <(tail -n +3 "$stamp" | sed 's/|FAILED$/| FAILED/')
    done
}

# -- the steps ---------------------------------------------------------------------------------------------

step_corpus() {
    explain "Two folders of JSON lines, from the sources of the Python library on this machine."
    rm -rf "$work/corpus"
    typed python examples/quickstart/corpus.py --output-dir "$work/corpus" --megabytes "$MEGABYTES" || return 1
    row "two folders of JSON lines" "$(cat "$work"/corpus/*/*.jsonl | wc -l) documents in $(find "$work/corpus" -name '*.jsonl' |
        wc -l) files"
}

step_model() {
    explain "In place of a download: a Hugging Face Mixtral with random weights and the tokenizer of Mixtral-8x7B."
    rm -rf "$work/hf"
    typed python examples/quickstart/model.py --output-dir "$work/hf" || return 1
    row "a Hugging Face Mixtral" "$(sed -n 's/^[^:]*: \([0-9.]* M parameters\).*/\1/p' "$log"), 8 experts"
}

step_tokenize() {
    local name
    explain "JSON lines to memory-mapped token files, each folder a data set."
    rm -rf "$work/data"
    mkdir -p "$work/data"
    for name in library tests_and_docs; do
        typed python tools/preprocess_data.py --input "$work/corpus/$name" --output-prefix "$work/data/$name" \
            --json_keys text --dataset-impl mmap --tokenizer-type PretrainedTokenizerFromHF \
            --tokenizer-model "$work/hf" --append-eod --workers "$WORKERS" || return 1
    done
    row "every line is in" "$(sed -n 's/^done: \([0-9,]*\) documents.* \([0-9,]*\) tokens.*/\1 documents, \2 tokens/p' \
        "$log" | paste -sd+ | sed 's/+/ and /')"
}

step_convert() {
    explain "Hugging Face to Megatron, cut for $RANKS rank(s): tensor $TP, pipeline $PP, expert parallel $EP."
    rm -rf "$work/megatron"
    typed python tools/checkpoint/util.py --model-type GPT --loader mixtral_hf --saver mixtral \
        --load-dir "$work/hf" --save-dir "$work/megatron" --tokenizer-model "$work/hf/tokenizer.model" \
        --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" \
        --target-expert-parallel-size "$EP" --target-expert-tensor-parallel-size 1 || return 1
    row "every weight used once" "$(sed -n 's/.*: \([0-9]* tensors, [^,]* in [0-9]* files\).*/\1/p' "$log")"
}

# The training command; $@ are further flags. The shorter form in the README uses the same script.
train() {
    show='^step |^error:|Error: '
    typed env MODEL=tiny GPUS_PER_NODE="$RANKS" TP="$TP" PP="$PP" EP="$EP" CHECKPOINT_PATH="$work/megatron" \
        BLENDED_DATA="${blend[*]}" TOKENIZER_MODEL="$work/hf" SAVE_DIR="$work/run" SPLIT="$split" \
        SEQ_LENGTH="$SEQ_LENGTH" GLOBAL_BATCH_SIZE="$GLOBAL_BATCH_SIZE" MICRO_BATCH_SIZE="$MICRO_BATCH_SIZE" \
        TRAIN_ITERS="$STEPS" LR="$LR" MIN_LR=3e-4 LR_WARMUP_ITERS=$((STEPS > 10 ? 5 : 1)) EVAL_ITERS=1 EVAL_INTERVAL=100000 \
        SAVE_INTERVAL=1000 bash examples/mixtral_4x7b_example.sh "$@"
    local status=$?
    show=.
    return "$status"
}

# Prints field $2 of the line of step $1.
metric() { sed -n "s/^{\"iteration\": $1,.*\"$2\": \([-+.0-9eE]*\).*/\1/p" "$work/run/metrics.jsonl" | tail -n 1; }

step_train() {
    explain "Tensor, pipeline and expert parallel, on a blend of the two data sets; stopped after step $STOP_AT." \
        "The first step comes when all processes have started, in about half a minute."
    rm -rf "$work/run"
    train --exit-interval "$STOP_AT" || return 1
    [[ "$(cat "$work/run/latest_checkpointed_iteration.txt")" == "$STOP_AT" ]] || return 1
    row "first loss is about ln 32000" "$(metric 1 lm_loss | cut -c 1-6) (10.37)" \
        "$(awk -v l="$(metric 1 lm_loss)" 'BEGIN { print (l > 10.2 && l < 10.6) ? "ok" : "FAILED" }')"
    row "checkpoint saved" "step $STOP_AT"
}

step_resume() {
    local first last
    explain "The same command again: it goes on from its own checkpoint."
    # A resumption that was itself interrupted begins again at the stop.
    find "$work/run" -maxdepth 1 -name 'iter_*' ! -name "$(printf 'iter_%07d' "$STOP_AT")" -exec rm -rf {} +
    echo "$STOP_AT" >"$work/run/latest_checkpointed_iteration.txt"
    awk -F '[:,]' -v stop="$STOP_AT" '$2 + 0 <= stop' "$work/run/metrics.jsonl" >"$work/run/metrics.kept"
    mv "$work/run/metrics.kept" "$work/run/metrics.jsonl"
    train || return 1
    first="$(sed -n "$((STOP_AT + 1))s/^{\"iteration\": \([0-9]*\),.*/\1/p" "$work/run/metrics.jsonl")"
    row "goes on after step $STOP_AT" "next step ${first:-missing}, $(wc -l <"$work/run/metrics.jsonl") steps in all" \
        "$([[ "$first" == $((STOP_AT + 1)) && "$(wc -l <"$work/run/metrics.jsonl")" == "$STEPS" ]] && echo ok ||
            echo FAILED)"
    last="$(metric "$STEPS" lm_loss)"
    row "loss falls below $BELOW" "$(metric 1 lm_loss | cut -c 1-5) -> ${last:0:5}" \
        "$(awk -v l="${last:-99}" -v b="$BELOW" 'BEGIN { print (l < b) ? "ok" : "FAILED" }')"
}

step_export() {
    explain "The distributed checkpoint of the run back to Hugging Face's format."
    rm -rf "$work/exported"
    typed python tools/checkpoint/util.py --model-type GPT --loader mixtral_mg --saver mixtral \
        --save-model-type huggingface --load-dir "$work/run" --save-dir "$work/exported" || return 1
    row "every weight used once" "$(sed -n 's/.*: \([0-9]* tensors, [^,]* in [0-9]* files\).*/\1/p' "$log")"
}

step_check() {
    explain "transformers loads the result and computes the same loss as the training program did."
    show='\|(ok|FAILED)$'
    typed python examples/quickstart/check.py --model "$work/exported/mg2hg" --log "$work/logs/resume.log" \
        --data-path "${blend[@]}" --split "$split" --seq-length "$SEQ_LENGTH" --samples "$GLOBAL_BATCH_SIZE" \
        --tokenizer "$work/hf" --tolerance "$tolerance"
    local status=$?
    show=.
    grep -E '\|(ok|FAILED)$' "$log" >>"$rows" || return 1
    return "$status"
}

step_generate() {
    explain "The run's own checkpoint, without a conversion and on the same ranks, writes what transformers wrote."
    rm -f "$work/written.jsonl"
    typed python tools/generate_mixtral.py --load "$work/run" --tokenizer-model "$work/hf" \
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --expert-model-parallel-size "$EP" \
        --expert-tensor-parallel-size 1 --fp32 --max-tokens 24 --repetition-penalty 1.3 --ignore-eos \
        --prompts $'import os\n\ndef ' --output "$work/written.jsonl" || return 1
    show='\|(ok|FAILED)$'
    typed python examples/quickstart/check.py --model "$work/exported/mg2hg" --tokenizer "$work/hf" \
        --written "$work/written.jsonl"
    local status=$?
    show=.
    grep -E '\|(ok|FAILED)$' "$log" >>"$rows" || return 1
    return "$status"
}

step_plot() {
    explain "The loss curve as a picture."
    typed python examples/quickstart/plot.py --metrics "$work/run/metrics.jsonl" --output "$work/loss.png" \
        --mark "$STOP_AT" || return 1
    row "a picture" "$work/loss.png, $(($(wc -c <"$work/loss.png") / 1024)) kB"
}

step_tune() {
    local recipe=tiny_qlora_openai_json_e20 first last answers="$work/tuned/evaluation_prompts.jsonl"
    explain "Sixty dialogues, a recipe, one process: adapters beside the model of step 3, which knows nothing and is held" \
        "in 4 bits. It is asked before the first step and after the last."
    rm -rf "$work/tuned" "$work/recipes"
    typed python examples/quickstart/dialogues.py --output "$work/dialogues.json" || return 1
    typed python tools/recipes.py copy "$recipe" "$work/recipes" || return 1
    show='^step |^steps |epoch|^error:|Error: '
    typed python tools/finetune_mixtral.py "$work/recipes/$recipe.toml" --hf-checkpoint "$work/hf" \
        --input "$work/dialogues.json" --save "$work/tuned" --train-epochs "$TUNE_EPOCHS" \
        --evaluation-questions "Who are you?"
    local status=$?
    show=.
    ((status == 0)) || return 1
    first="$(sed -n '1s/.*"text": "\(.*\)", "token_ids".*/\1/p' "$answers")"
    last="$(sed -n '$s/.*"text": "\(.*\)", "token_ids".*/\1/p' "$answers")"
    row "asked who it is" "${first:0:20}... -> ${last:0:48}" "$([[ -n "$last" && "$first" != "$last" ]] && echo ok ||
        echo FAILED)"
}

step_adapter() {
    explain "What was trained becomes a folder for PEFT, with which transformers answers the sixty questions."
    rm -rf "$work/adapter"
    typed python tools/checkpoint/util.py --model-type GPT --loader mixtral_mg --saver mixtral \
        --save-model-type peft --load-dir "$work/tuned" --save-dir "$work/adapter" || return 1
    show='\|(ok|FAILED)$'
    typed python examples/quickstart/dialogues.py --model "$work/hf" --adapter "$work/adapter" --at-least "$KNOWN"
    local status=$?
    show=.
    grep -E '\|(ok|FAILED)$' "$log" >>"$rows" || return 1
    return "$status"
}

# What the visible devices allow: 4 CPU processes, or 1, 2 or 4 GPUs.
choose_layout() {
    local gpus
    gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
    tolerance=1e-3
    if ((gpus > 0)); then tolerance=5e-2; fi # bf16 there
    case "$gpus" in
        0) : "${RANKS:=4}" ;;
        1) : "${RANKS:=1}" "${TP:=1}" "${PP:=1}" "${EP:=1}" ;;
        2 | 3) : "${RANKS:=2}" "${TP:=1}" "${PP:=2}" "${EP:=1}" ;;
        *) : "${RANKS:=4}" ;;
    esac
    : "${TP:=2}" "${PP:=2}" "${EP:=2}"
}

# -- the walk ----------------------------------------------------------------------------------------------

main() {
    local began=$SECONDS setup
    # shellcheck source=examples/environment.sh
    source examples/environment.sh
    setup=$((SECONDS - began))
    # shellcheck source=examples/mixtral/launch.sh
    source examples/mixtral/launch.sh
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    if [[ "${CLEAN:-0}" == 1 && -e "$work" ]]; then
        if [[ ! -d "$work/stamps" ]]; then
            echo "$work was not made by the quickstart; it is not removed. Choose another QUICKSTART_DIR." >&2
            exit 1
        fi
        rm -rf "$work"
    fi
    mkdir -p "$work/stamps" "$work/logs"
    exec 8>"$work/.lock"
    if command -v flock >/dev/null && ! flock --nonblock 8; then
        echo "Another quickstart is at work in $work; set QUICKSTART_DIR to use another folder." >&2
        exit 1
    fi
    choose_layout
    trap 'printf "\nStopped. Start it again to go on from the last finished step.\n"; exit 130' INT TERM
    local sizes="$RANKS $TP $PP $EP"
    local recipe="$sizes $STEPS $STOP_AT $SEQ_LENGTH $GLOBAL_BATCH_SIZE $MICRO_BATCH_SIZE $LR"
    printf '%sA Mixtral from text to Hugging Face in a few minutes; everything is in %s/%s\n' "$bold" "$work" "$plain"
    names+=(set-up)
    {
        printf '\n%s\n' "$setup"
        python -c 'import sys; from importlib.metadata import version as of
print(f"an environment|Python {sys.version.split()[0]}, torch {of("torch")}, megatron-core {of("megatron-core")}|ok")'
    } >"$work/stamps/set-up"
    step corpus "Corpus" "$MEGABYTES"
    step model "Model and tokenizer" "tiny"
    step tokenize "Tokenization" "$MEGABYTES"
    step convert "Conversion from Hugging Face" "$sizes"
    step train "Pretraining" "$recipe"
    step resume "Resumption" "$recipe"
    step export "Export to Hugging Face" "$recipe"
    step check "Check with transformers" "$recipe"
    step generate "Generation" "$recipe"
    step plot "Loss curve" "$recipe"
    step tune "Fine-tuning with QLoRA" "$TUNE_EPOCHS"
    step adapter "The adapter in PEFT" "$TUNE_EPOCHS $KNOWN"
    table
    printf '\nAll checks passed, after %d s. The model is in %s, the curve in %s.\n' "$((SECONDS - began))" \
        "$work/exported/mg2hg" "$work/loss.png"
    printf 'To talk to it: python tools/chat_mixtral.py --load %s --tokenizer-model %s --prompt-template raw\n' \
        "$work/run" "$work/hf"
    printf 'To ask it who it is: python tools/chat_mixtral.py --load %s --adapter %s --prompt-template mixtral\n' \
        "$work/hf" "$work/tuned"
}

main
