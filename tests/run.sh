#!/usr/bin/env bash
# Sets up what the tests need (once) and runs them. Arguments go to pytest:
#
#     bash tests/run.sh                          everything but `slow` and `browser`, and `gpu` where a GPU is visible
#     bash tests/run.sh tests/unit -k layout     a selection
#     SLOW=1 bash tests/run.sh                   with the tests that take minutes
#     bash tests/run.sh tests/browser            the chat page in Debian's Chromium
#
# Where a GPU is visible there are two runs: all other tests with the GPUs hidden, as everywhere, then those marked `gpu`.
# The exit status is pytest's, of the first run that fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/environment.sh
source examples/environment.sh
# shellcheck source=examples/gpus.sh
source examples/gpus.sh

# Each test that needs ranks starts several processes; more threads than that only make them wait for one another.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Two files at a time, since most of the time goes by while processes start; of a selection one, to be followed.
workers=()
if (($# == 0)); then workers=(-n 2 --dist loadfile); fi

if [[ " $* " == *" -m "* ]]; then exec python -m pytest "$@"; fi
kinds=""
if [[ "${SLOW:-0}" != 1 ]]; then kinds+=" and not slow"; fi
if [[ "$*" != *tests/browser* ]]; then kinds+=" and not browser"; fi
if (($(visible_gpus) == 0)); then exec python -m pytest "${workers[@]}" -m "not gpu$kinds" "$@"; fi

status=0
CUDA_VISIBLE_DEVICES="" python -m pytest "${workers[@]}" -m "not gpu$kinds" "$@" || status=$?
on_gpu=0
python -m pytest -m "gpu$kinds" "$@" || on_gpu=$?
# 5: the arguments select no test of the kind, which is an error only if they select none of either.
if ((status == 5 || (status == 0 && on_gpu != 5))); then status="$on_gpu"; fi
exit "$status"
