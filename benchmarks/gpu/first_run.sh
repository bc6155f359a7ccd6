#!/usr/bin/env bash
# The first ten minutes on a GPU: what the machine is, what torch does there, whether the tests pass, whether a run saves
# and resumes, and how fast a step is. Nothing is installed or downloaded; the Python with torch is the one on PATH.
#
#     source examples/environment.sh && bash benchmarks/gpu/first_run.sh [FOLDER]
#
# FOLDER (gpu_first_run) gets a text and, of most parts, a JSON file each, and summary.json; FOLDER.tar.gz is all of them,
# to be sent. Each part has a limit of its own, in seconds, and one that fails leaves the others: LIMIT_ENVIRONMENT
# LIMIT_PROBE LIMIT_TESTS LIMIT_RUN LIMIT_STEP.
# PARTS="probe step" runs these alone. The exit status is the number of parts that failed.
# shellcheck disable=SC2329 # the parts are called by their names
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out="${1:-gpu_first_run}"
out="${out%/}"
here=benchmarks/gpu
: "${PARTS:=environment probe tests run step}" "${STEPS:=40}" "${CANDIDATES:=ours stock transformers autocast te}"
: "${LIMIT_ENVIRONMENT:=120}" "${LIMIT_PROBE:=240}" "${LIMIT_TESTS:=300}" "${LIMIT_RUN:=300}" "${LIMIT_STEP:=600}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

part_environment() { python "$here/environment.py" --json "$out/environment.json"; }

part_probe() { python "$here/probe.py" --json "$out/probe.json"; }

part_tests() { python -m pytest -m gpu tests/gpu --junit-xml "$out/tests.xml"; }

# Half of the steps with an asynchronous save, then the other half from the checkpoint.
part_run() {
    local flags=(--model tiny --mock-data --bf16 --seq-length 256 --micro-batch-size 4 --global-batch-size 8 --lr 3e-3
        --eval-iters 0 --log-interval 1 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --async-save --save "$out/checkpoints" --load "$out/checkpoints" --save-interval $((STEPS / 4)))
    rm -rf "$out/checkpoints"
    python tools/pretrain_mixtral.py "${flags[@]}" --train-iters "$STEPS" --exit-interval $((STEPS / 2)) &&
        python tools/pretrain_mixtral.py "${flags[@]}" --train-iters "$STEPS" &&
        python "$here/check_run.py" "$out/checkpoints/metrics.jsonl" --steps "$STEPS" --json "$out/run.json"
    local status=$?
    rm -rf "$out/checkpoints"/iter_*
    return "$status"
}

# shellcheck disable=SC2086 # several words
part_step() { python benchmarks/train_step.py --only $CANDIDATES --json "$out/step.json"; }

failed=0
rows=()
mkdir -p "$out"
export -f part_environment part_probe part_tests part_run part_step
export out here STEPS CANDIDATES
for name in $PARTS; do
    limit="LIMIT_${name^^}"
    began=$SECONDS status=0
    printf '\n== %s (at most %s s), %s\n' "$name" "${!limit}" "$out/$name.txt"
    timeout --kill-after=20 "${!limit}" bash -c "part_$name" >"$out/$name.txt" 2>&1 || status=$?
    if ((status != 0)); then failed=$((failed + 1)); fi
    rows+=("{\"part\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - began))}")
    tail -n 25 "$out/$name.txt"
    printf '== %s: %s after %s s\n' "$name" "$([[ $status == 0 ]] && echo passed || echo "FAILED with $status")" \
        $((SECONDS - began))
done
(IFS=,; printf '{"parts": [%s]}\n' "${rows[*]}") >"$out/summary.json"
tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
printf '\n%s part(s) failed. To send: %s.tar.gz (%s)\n' "$failed" "$out" "$(du -h "$out.tar.gz" | cut -f 1)"
exit "$failed"
