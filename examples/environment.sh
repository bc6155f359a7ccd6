#!/usr/bin/env bash
# Source this file to get a Python environment in which megatron_mixtral runs:
#
#     source examples/environment.sh
#
# The first time it makes an isolated environment in .venv (about 6 GB on Linux, most of it torch's CUDA libraries) with
# the packages of requirements.lock; afterwards it looks at a stamp and puts the environment on PATH.
#
#   PYTHON=/path/to/python3.12   the interpreter to build on, instead of searching for one
#   MIXTRAL_VENV=/some/folder    where the environment is, instead of .venv
#   MIXTRAL_VENV=active          make nothing: use the Python that is first on PATH, after a check of what it has

MIXTRAL_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export MIXTRAL_ROOT

env_say() { printf '[environment] %s\n' "$@" >&2; }

# Whether $1 is an interpreter that starts and is of a version for which the pinned engine has wheels.
# A command that merely exists proves nothing: pyenv's shims are there for versions that are not enabled.
env_python_runs() {
    "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

# Prints candidates, best first: PATH, then where version managers keep interpreters that are not on PATH.
env_python_candidates() {
    local found
    for found in python3.12 python3.13 python3 python; do command -v "$found" || true; done
    for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3.1[23] \
        "${XDG_DATA_HOME:-$HOME/.local/share}"/uv/python/*/bin/python3.1[23] \
        {"$HOME"/{mini,ana}conda3,/opt/conda}/{,envs/*/}bin/python3.1[23] \
        {/opt/python*,/usr/local,/opt/homebrew}/bin/python3.1[23]; do
        if [[ -x "$found" ]]; then printf '%s\n' "$found"; fi
    done
}

# Prints the interpreter to build on, or says what to install.
env_find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        if env_python_runs "$PYTHON"; then command -v "$PYTHON" && return; fi
        env_say "PYTHON=$PYTHON does not start, or is not Python 3.12 or 3.13."
        return 1
    fi
    while IFS= read -r candidate; do
        if env_python_runs "$candidate"; then printf '%s\n' "$candidate" && return; fi
    done < <(env_python_candidates)
    # uv can download an interpreter where it may reach its mirror.
    if uv python install --quiet 3.12 >/dev/null 2>&1; then uv python find 3.12 && return; fi
    env_say "no Python 3.12 or 3.13 was found (the pinned megatron-core has wheels for these two)." \
        "Install one and start again, for example with one of" \
        "    sudo apt-get install python3.12 python3.12-venv     # Ubuntu 24.04 or newer" \
        "    uv python install 3.12" \
        "    conda create -n mixtral python=3.12" \
        "or, if there is one in an unusual place: PYTHON=/path/to/python3.12 bash ${0##*/}"
    return 1
}

# Prints a uv that runs: from PATH, from its usual place, or brought by pip into a small environment beside $2.
env_find_uv() {
    local python="$1" boot="$2.bootstrap" candidate
    for candidate in uv "$HOME/.local/bin/uv" "$boot/bin/uv"; do
        if "$candidate" --version >/dev/null 2>&1; then printf '%s\n' "$candidate" && return; fi
    done
    rm -rf "$boot"
    if "$python" -m venv "$boot" >&2 && "$boot/bin/python" -m pip install --quiet --disable-pip-version-check uv >&2; then
        printf '%s\n' "$boot/bin/uv"
        return
    fi
    env_say "uv installs the packages, and $python could not bring it with venv and pip (see above): install uv, or" \
        "python3.12-venv, or let pip reach a package index."
    return 1
}

# What the installation depends on: the place, because an environment holds absolute paths, then the files, with the
# sources of the extension; of pyproject.toml only what comes before the settings of pytest and ruff.
env_fingerprint() {
    cd "$MIXTRAL_ROOT" && printf '%s\n' "$MIXTRAL_ROOT" && {
        sed '/^\[tool\.pytest/,$d' pyproject.toml
        find megatron_mixtral -name '*.cpp' -o -name '*.h' | LC_ALL=C sort | xargs cat setup.py requirements.lock
    } | cksum
}

# Whether the environment $1 was completed for this tree, starts, and is built on PYTHON where that is given.
env_is_complete() {
    local prefix='import sys; print(sys.base_prefix)' built_on
    [[ "$(head -n 1 "$1/megatron_mixtral.stamp" 2>/dev/null)" == "$MIXTRAL_ROOT" ]] &&
        built_on="$("$1/bin/python" -c "$prefix" 2>/dev/null)" &&
        [[ -z "${PYTHON:-}" || "$built_on" == "$("$PYTHON" -c "$prefix" 2>/dev/null)" ]]
}

# Whether it is, besides, up to date.
env_is_ready() {
    env_is_complete "$1" && [[ "$(cat "$1/megatron_mixtral.stamp")" == "$(env_fingerprint)" ]]
}

# Makes the environment $1, from nothing unless a complete one only needs other packages.
# The stamp comes last, so that an interrupted installation is started again.
env_build() {
    local venv="$1" python uv why began=$SECONDS
    if [[ -e "$venv" && ! -e "$venv/megatron_mixtral.owner" ]]; then
        env_say "$venv exists and was not made by this script: remove it, or set MIXTRAL_VENV to another folder" \
            "(or to 'active' to use the environment that is active)."
        return 1
    fi
    python="$(env_find_python)" && uv="$(env_find_uv "$python" "$venv")" || return 1
    if env_is_complete "$venv"; then
        env_say "bringing $venv up to date"
        rm "$venv/megatron_mixtral.stamp"
    else
        env_say "making $venv with $("$python" --version) ($python) and $uv; this happens once"
        rm -rf "$venv" && mkdir -p "$venv" && touch "$venv/megatron_mixtral.owner" &&
            "$uv" venv --quiet --allow-existing --python "$python" "$venv" || return 1
    fi
    # Bytecode now: four ranks that start at once would each compile the same files otherwise. Our own package is built
    # with the lock's setuptools, and again even if uv remembers a build: the extension's file may have gone since.
    "$uv" pip sync --python "$venv/bin/python" --compile-bytecode "$MIXTRAL_ROOT/requirements.lock" &&
        "$uv" pip install --python "$venv/bin/python" --no-deps --no-build-isolation \
            --reinstall-package megatron-mixtral --editable "$MIXTRAL_ROOT" || return 1
    if ! why="$("$venv/bin/python" -c 'from megatron_mixtral.tokenizer.engines import native
native.load_module()' 2>&1)"; then
        if command -v "${CXX:-c++}" || command -v "${CXX:-g++}"; then why="cannot be used (${why##*$'\n'})"; else
            why="is not built: no C++ compiler was found"; fi >/dev/null
        env_say "the C++ extension $why; everything works without it, and preprocessing is slower"
    fi
    env_fingerprint >"$venv/megatron_mixtral.stamp"
    env_say "ready after $((SECONDS - began)) s"
}

# Finds the environment, or makes it under a lock: of two starts at the same moment, the second waits for the first.
env_use() {
    local venv="${MIXTRAL_VENV:-$MIXTRAL_ROOT/.venv}"
    if [[ "$venv" == active ]]; then
        env_check_active
        return
    fi
    case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
    env_is_ready "$venv" || (
        mkdir -p "$(dirname "$venv")" && exec 9>"$venv.lock" || exit 1
        if command -v flock >/dev/null && ! flock --nonblock 9; then
            env_say "waiting for another start that is making $venv"
            flock 9
        fi
        env_is_ready "$venv" || env_build "$venv"
    ) || return 1
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    unset PYTHONHOME
    hash -r
}

env_check_active() {
    if ! env_python_runs python; then
        env_say "MIXTRAL_VENV=active, but the 'python' on PATH is not Python 3.12 or 3.13 that starts."
        return 1
    fi
    (cd "$MIXTRAL_ROOT" && python -c '
import importlib.util, sys
needed = ["torch", "megatron", "msgspec", "sentencepiece", "tokenizers", "transformers", "megatron_mixtral"]
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("[environment] MIXTRAL_VENV=active, but " + sys.executable + " lacks " + ", ".join(missing)
             + ": pip install -e .[dev]")')
}

env_use
