#!/usr/bin/env bash
# The common part of the scripts here, which source it: they state a recipe as a table, this turns it into a command.
#
#     setting NAME REAL TINY    a default: REAL for the real model, TINY where MODEL=tiny; the environment overrides both
#     launch "$@"               training: builds the command, checks its inputs, and starts it; "$@" goes to the program
#     launch_inference PROGRAM FLAG... "$@"     the same for a program of tools/ that uses a model that is trained
#     launch_tuning "$@"         fine-tuning by the recipe RECIPE; variables that are set become flags, which win over it
#
# Environment, beside the names that a script sets itself:
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT GPUS_PER_NODE   the cluster; start the same script on every node
#   MODEL=tiny           14 M parameters on a few devices, or on as many CPU processes where no GPU is visible
#   PRECISION=bf16|fp32  default: bf16 on GPUs, fp32 on the CPU (bf16 is slow there)
#   DATA_ARGS            further flags of the program; those after the script's name come behind them
#   DRY_RUN=1            print the command, ready to paste, and start nothing

launch_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

launch_fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

setting() {
    local value="$2"
    if [[ "$MODEL" == tiny && $# -ge 3 ]]; then value="$3"; fi
    if [[ -z "${!1+set}" ]]; then printf -v "$1" '%s' "$value"; fi
}

# Two names of one setting, the recipe's own and that of launch.sh. Either may be set, not both to different values.
also() {
    if [[ -n "${!2+set}" ]]; then
        if [[ "${!1-${!2}}" != "${!2}" ]]; then launch_fail "$1=${!1} and $2=${!2} are one setting here: set $1 alone"; fi
        printf -v "$1" '%s' "${!2}"
    fi
}

# What every recipe shares. A recipe's own `setting` of the same name comes first and wins.
launch_defaults() {
    #       name                    real        tiny
    setting NNODES                  1
    setting NODE_RANK               0
    setting VPP                     1
    setting EP                      1
    setting CP                      1
    setting MICRO_BATCH_SIZE        1
    setting SEQ_LENGTH              4096        256
    setting MIN_LR                  0
    setting LR_WARMUP_ITERS         0
    setting CLIP_GRAD               1.0
    setting SPLIT                   '990,10,0'  '100,0,0'
    setting SAVE_INTERVAL           500
    setting LOG_INTERVAL            10
    setting EVAL_INTERVAL           500
    setting EVAL_ITERS              10          0
    setting LOAD_DIR                ''
    setting HF_CHECKPOINT           ''
    setting TOKENIZER_TYPE          HuggingFaceTokenizer
    setting DATA_CACHE_PATH         "$SAVE_DIR/data_cache"
    setting TENSORBOARD_DIR         "$SAVE_DIR/tensorboard"
    # Experts of a tiny model are not worth cutting; without expert parallelism the engine wants ETP = TP (empty).
    if ((EP > 1)); then setting ETP '' 1; else setting ETP ''; fi
    if nvidia-smi -L >/dev/null 2>&1; then setting PRECISION bf16; else setting PRECISION fp32; fi
}

# Fills the array `layout`.
launch_layout() {
    layout=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
        --expert-model-parallel-size "$EP")
    if [[ -n "$ETP" ]]; then layout+=(--expert-tensor-parallel-size "$ETP"); fi
    if ((VPP > 1)); then layout+=(--num-virtual-stages-per-pipeline-rank "$VPP"); fi
    if ((CP > 1)); then layout+=(--context-parallel-size "$CP"); fi
    if ((TP > 1)); then layout+=(--sequence-parallel); fi
    layout+=(--use-distributed-optimizer)
    # There is nothing to hide behind in a tiny model or on a CPU.
    if [[ "$MODEL" != tiny ]]; then layout+=(--overlap-grad-reduce); fi
    if ((LR_WARMUP_ITERS >= TRAIN_ITERS)); then
        launch_fail "LR_WARMUP_ITERS=$LR_WARMUP_ITERS must be less than TRAIN_ITERS=$TRAIN_ITERS; set both"
    fi
    case "$PRECISION" in
        bf16) layout+=(--bf16) ;;
        fp32) ;;
        *) launch_fail "PRECISION=$PRECISION: expected bf16 or fp32" ;;
    esac
}

# Fills the array `start`: where the weights come from. A run that has saved goes on from its own checkpoint; otherwise
# LOAD_DIR (a converted checkpoint), HF_CHECKPOINT (a Hugging Face folder), or random weights of the preset MODEL.
launch_start() {
    start=(--load "$SAVE_DIR")
    if [[ -n "$given_load" && ! -e "$SAVE_DIR/latest_checkpointed_iteration.txt" ]]; then
        start=(--load "$given_load")
    fi
    if [[ -n "$LOAD_DIR" ]]; then
        start+=(--pretrained-checkpoint "$LOAD_DIR")
    elif [[ -n "$HF_CHECKPOINT" ]]; then
        start+=(--hf-checkpoint "$HF_CHECKPOINT")
    else
        start+=(--model "$MODEL")
    fi
}

# Fills the array `torchrun`. Alone on one node it lets torchrun choose a free port.
launch_cluster() {
    torchrun=(torchrun --nproc-per-node "$GPUS_PER_NODE")
    if [[ "$NNODES" == 1 && -z "${MASTER_PORT:-}" ]]; then
        torchrun+=(--standalone)
    else
        torchrun+=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
            --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-6000}")
    fi
    # torchrun would take SIGHUP from nohup.
    if [[ "$(trap -p SIGHUP)" == "trap -- '' "* ]]; then torchrun+=(--signals-to-handle "SIGTERM,SIGINT,SIGQUIT"); fi
    if ((NNODES > 1)) && [[ -z "${MASTER_ADDR:-}" ]]; then
        launch_fail "NNODES=$NNODES needs MASTER_ADDR, the address of the node with NODE_RANK=0"
    fi
}

# Fills the array `words` with those of $1 (the variable $2), as a shell would read them: quotes hold spaces together.
launch_words() {
    words=()
    if [[ -n "${1//[[:space:]]/}" ]]; then
        xargs printf '' <<<"$1" 2>/dev/null || launch_fail "$2=$1: a quotation mark is not closed"
        mapfile -t words < <(xargs printf '%s\n' <<<"$1")
    fi
}

# Fills the array `extra` with the flags of DATA_ARGS and those after the script's name ("$@"), without those that say
# where the run saves and starts: a --load behind `--load SAVE_DIR` would win, and each restart would begin anew.
launch_extra() {
    local -a words
    local flag
    launch_words "${DATA_ARGS:-}" DATA_ARGS
    set -- ${words[@]+"${words[@]}"} "$@"
    extra=() given_load='' data_named=0 ending=''
    while (($#)); do
        flag="${1%%=*}"
        case "$flag" in
            --save | --load)
                if [[ "$1" == *=* ]]; then set -- "$flag" "${1#*=}" "${@:2}"; fi
                if (($# < 2)); then launch_fail "$flag needs a directory"; fi
                if [[ "$flag" == --save ]]; then SAVE_DIR="${2%/}"; else given_load="$2"; fi
                shift 2
                continue
                ;;
            --data-path | --train-data-path | --valid-data-path | --test-data-path | --data-args-path | \
                --per-split-data-args-path | --mock-data) data_named=1 ;;
            --is-instruction-dataset) ending=_packed_input_ids_document ;;
        esac
        extra+=("$1")
        shift
    done
}

# Fills the array `blend` with the words of DATA_PATH. A name with spaces is one word if it is quoted, or exists.
launch_blend() {
    local -a words
    local number='^[0-9.]+([eE][-+]?[0-9]+)?$' name joined next
    launch_words "$DATA_PATH" DATA_PATH
    blend=()
    while ((${#words[@]})); do
        name="${words[0]}" next=1
        if [[ ! "$name" =~ $number && ! -f "$name$ending.idx" ]]; then
            for ((joined = 1; joined < ${#words[@]}; joined++)); do
                if [[ -f "${words[*]:0:joined+1}$ending.idx" ]]; then
                    name="${words[*]:0:joined+1}" next=$((joined + 1))
                fi
            done
        fi
        blend+=("$name")
        words=("${words[@]:next}")
    done
}

# The inputs, before any process starts: a missing file is found here in a second.
launch_check_inputs() {
    local word
    for word in ${blend[@]+"${blend[@]}"}; do
        if [[ ! "$word" =~ ^[0-9.]+([eE][-+]?[0-9]+)?$ && ! -f "$word$ending.idx" ]]; then
            launch_fail "data set $word: $word$ending.idx does not exist. Give the prefix that" \
                "tools/preprocess_data.py wrote, such as data/github_text_document (of instruction data, its" \
                "--output-prefix), or a blend: '0.6 A_text_document 0.4 \"B with spaces_text_document\"'"
        fi
    done
    for word in "$LOAD_DIR" "$HF_CHECKPOINT" "$given_load"; do
        if [[ -n "$word" && ! -e "$word" ]]; then launch_fail "$word does not exist"; fi
    done
    if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x "$launch_root/.venv/bin/torchrun" ]]; then
        PATH="$launch_root/.venv/bin:$PATH"
    fi
    # Found is not enough: a version manager's shim may be there for an interpreter that is not.
    word='import importlib.util as u; assert u.find_spec("torch") and u.find_spec("megatron")'
    if ! python -c "$word" >/dev/null 2>&1 || ! command -v torchrun >/dev/null; then
        launch_fail "no Python with torch and megatron-core on PATH; run 'source examples/environment.sh' first"
    fi
}

# Prints the words as one shell command that can be pasted, an assignment or a flag with its values on a line.
launch_print() {
    local word line="" previous=""
    for word in "$@"; do
        if [[ -n "$previous" && ("$word" == --* || "$previous" =~ ^[A-Z_0-9]+= ||
            ("$word" == *.py && "$previous" != python)) ]]; then
            printf '%s \\\n' "$line"
            line="    "
        fi
        previous="$word"
        if [[ "$word" =~ ^[A-Z_0-9]+= ]]; then
            printf -v word '%s=%s' "${word%%=*}" "$(launch_quote "${word#*=}")"
        else
            word="$(launch_quote "$word")"
        fi
        if [[ "$line" =~ [^[:space:]] ]]; then line+=" "; fi
        line+="$word"
    done
    printf '%s\n' "$line"
}

launch_quote() {
    if [[ "$1" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
        printf '%s' "$1"
    else
        printf "'%s'" "${1//\'/\'\\\'\'}"
    fi
}

# The variables of a fine-tuning and their flags; one that is empty leaves it to the recipe.
tuning=(HF_CHECKPOINT:--hf-checkpoint DATA:--input SAVE_DIR:--save SEQ_LENGTH:--seq-length TRAIN_EPOCHS:--train-epochs
    MICRO_BATCH_SIZE:--micro-batch-size GLOBAL_BATCH_SIZE:--global-batch-size LR:--lr LORA_RANK:--lora-rank
    TP:--tensor-model-parallel-size PP:--pipeline-model-parallel-size EP:--expert-model-parallel-size)

launch_tuning() {
    local -a torchrun command words
    local program="$launch_root/tools/finetune_mixtral.py" pair name
    setting NNODES 1
    setting NODE_RANK 0
    launch_cluster
    command=("$RECIPE")
    for pair in "${tuning[@]}"; do
        name="${pair%%:*}"
        if [[ -n "${!name:-}" ]]; then
            words=("${!name}")
            if [[ "$name" == DATA ]]; then launch_words "$DATA" DATA; fi
            command+=("${pair#*:}" "${words[@]}")
        fi
    done
    launch_words "${DATA_ARGS:-}" DATA_ARGS
    command+=(${words[@]+"${words[@]}"} "$@")
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        launch_print OMP_NUM_THREADS="$OMP_NUM_THREADS" CUDA_DEVICE_MAX_CONNECTIONS="$CUDA_DEVICE_MAX_CONNECTIONS" \
            "${torchrun[@]}" "${program#"$PWD"/}" "${command[@]}"
        return
    fi
    local -a blend=()
    local LOAD_DIR="" given_load=""
    launch_check_inputs
    WORLD_SIZE=$((NNODES * GPUS_PER_NODE)) python "$program" "${command[@]}" --dry-run >/dev/null || exit 1
    exec "${torchrun[@]}" "${program#"$PWD"/}" "${command[@]}"
}

launch_inference() {
    #       name                    real        tiny
    setting NNODES                  1
    setting NODE_RANK               0
    setting GPUS_PER_NODE           8           2
    setting EP                      1
    if ((EP > 1)); then setting ETP 1; else setting ETP ''; fi
    if nvidia-smi -L >/dev/null 2>&1; then setting PRECISION bf16; else setting PRECISION fp32; fi
    local -a torchrun command blend=()
    local program="$launch_root/tools/$1" LOAD_DIR="$CHECKPOINT" HF_CHECKPOINT="$TOKENIZER_MODEL" given_load=""
    shift
    launch_cluster
    command=("${torchrun[@]}" "${program#"$PWD"/}" --load "$CHECKPOINT")
    if [[ -n "$TOKENIZER_MODEL" ]]; then command+=(--tokenizer-model "$TOKENIZER_MODEL"); fi
    command+=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --expert-model-parallel-size "$EP")
    if [[ -n "$ETP" ]]; then command+=(--expert-tensor-parallel-size "$ETP"); fi
    command+=("--$PRECISION" "$@")
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        launch_print OMP_NUM_THREADS="$OMP_NUM_THREADS" "${command[@]}"
        return
    fi
    launch_check_inputs
    # A misspelt flag is told once, by one process, not by every rank above torchrun's report of them.
    MIXTRAL_FLAGS_ONLY=1 python "$program" "${command[@]:${#torchrun[@]}+1}" || exit
    exec "${command[@]}"
}

launch() {
    local -a layout start torchrun blend=() extra flags command
    local program="$launch_root/tools/pretrain_mixtral.py" given_load data_named ending word
    for word in DISTRIBUTED_ARGS GPT_ARGS MOE_ARGS OUTPUT_ARGS; do
        if [[ -n "${!word:-}" ]]; then
            launch_fail "$word is not read: give flags of the program after the script's name or in DATA_ARGS, and" \
                "the cluster by NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE"
        fi
    done
    launch_extra "$@"
    launch_defaults
    if [[ -n "${WORLD_SIZE:-}" && "$WORLD_SIZE" != $((NNODES * GPUS_PER_NODE)) ]]; then
        printf '%s: WORLD_SIZE=%s is not read; NNODES x GPUS_PER_NODE = %s devices are\n' "${0##*/}" "$WORLD_SIZE" \
            "$NNODES x $GPUS_PER_NODE" >&2
    fi
    launch_layout
    launch_start
    launch_cluster
    if ((!data_named)); then
        launch_blend
        extra=(--data-path "${blend[@]}" ${extra[@]+"${extra[@]}"})
    fi
    flags=("${start[@]}" "${layout[@]}"
        --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --seq-length "$SEQ_LENGTH"
        --train-iters "$TRAIN_ITERS" --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine
        --lr-warmup-iters "$LR_WARMUP_ITERS" --weight-decay "$WEIGHT_DECAY" --adam-beta1 0.9 --adam-beta2 0.95
        --clip-grad "$CLIP_GRAD" --moe-aux-loss-coeff "$AUX_LOSS_COEFF"
        --split "$SPLIT" --data-cache-path "$DATA_CACHE_PATH"
        --tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER_MODEL"
        --save "$SAVE_DIR" --save-interval "$SAVE_INTERVAL" --log-interval "$LOG_INTERVAL"
        --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" --tensorboard-dir "$TENSORBOARD_DIR"
        ${extra[@]+"${extra[@]}"})
    command=("${torchrun[@]}" "${program#"$PWD"/}" "${flags[@]}")
    # torchrun would set the first itself, with a warning; the second orders communication before computation on GPUs.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        launch_print OMP_NUM_THREADS="$OMP_NUM_THREADS" CUDA_DEVICE_MAX_CONNECTIONS="$CUDA_DEVICE_MAX_CONNECTIONS" \
            "${command[@]}"
        return
    fi
    launch_check_inputs
    # What cannot be is refused here, in a blink, not by every process after torchrun has started them.
    WORLD_SIZE=$((NNODES * GPUS_PER_NODE)) python "$program" --dry-run "${flags[@]}" || exit 1
    mkdir -p "$SAVE_DIR"
    exec "${command[@]}"
}
