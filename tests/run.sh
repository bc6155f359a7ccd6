#!/usr/bin/env bash
# Sets up what the tests need (once) and runs them. Arguments go to pytest:
#
#     bash tests/run.sh                          everything but `slow` and `browser`, and `gpu` where a GPU is visible
#     bash tests/run.sh tests/unit -k layout     a selection
#     SLOW=1 bash tests/run.sh                   with the tests that take minutes
#     bash tests/run.sh tests/browser            the chat page in Debian's Chromium
#
# The exit status is pytest's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/environment.sh
source examples/environment.sh

# Each test that needs ranks starts several processes; more threads than that only make them wait for one another.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

marks=()
if [[ " $* " != *" -m "* ]]; then
    selection=""
    if ! nvidia-smi -L >/dev/null 2>&1; then selection="not gpu"; fi
    if [[ "${SLOW:-0}" != 1 ]]; then selection="${selection:+$selection and }not slow"; fi
    if [[ "$*" != *tests/browser* ]]; then selection="${selection:+$selection and }not browser"; fi
    if [[ -n "$selection" ]]; then marks=(-m "$selection"); fi
fi
exec python -m pytest "${marks[@]}" "$@"
