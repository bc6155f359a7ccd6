#!/usr/bin/env bash
# Source this file to get a Python environment in which megatron_mixtral runs:
#
#     source examples/environment.sh
#
# The first time it makes an isolated environment in .venv (about 6 GB on Linux, most of it torch's CUDA libraries);
# afterwards it only looks at a stamp and puts the environment on PATH. Both commands of the README begin with it.
#
#   PYTHON=/path/to/python3.12   the interpreter to build on, instead of searching for one
#   MIXTRAL_VENV=/some/folder    where the environment is, instead of .venv
#   MIXTRAL_VENV=active          make nothing: use the Python that is first on PATH, after a check of what it has

MIXTRAL_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export MIXTRAL_ROOT

env_say() { printf '[environment] %s\n' "$*" >&2; }

env_fail() {
    env_say "$@"
    return 1
}

# Whether $1 is an interpreter that starts and is of a version for which the pinned engine has wheels.
# A command that merely exists proves nothing: pyenv's shims are there for versions that are not enabled.
env_python_runs() {
    "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

# Prints candidates, best first: PATH, then where version managers keep interpreters that are not on PATH.
env_python_candidates() {
    local name dir
    for name in python3.12 python3.13 python3 python; do
        command -v "$name" || true
    done
    for dir in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23]*/bin \
        "${XDG_DATA_HOME:-$HOME/.local/share}"/uv/python/cpython-3.1[23]*/bin \
        "${CONDA_PREFIX:-/nonexistent}/bin" /opt/conda/bin "$HOME"/{mini,ana}conda3/bin \
        "$HOME"/{mini,ana}conda3/envs/*/bin \
        /opt/python*/bin /usr/local/bin /opt/homebrew/bin; do
        for name in python3.12 python3.13 python3; do
            if [[ -x "$dir/$name" ]]; then printf '%s\n' "$dir/$name"; fi
        done
    done
}

# Prints the interpreter to build on, or says what to install.
env_find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        env_python_runs "$PYTHON" ||
            env_fail "PYTHON=$PYTHON does not start, or is not Python 3.12 or 3.13." || return 1
        command -v "$PYTHON"
        return
    fi
    while IFS= read -r candidate; do
        if env_python_runs "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done < <(env_python_candidates)
    # uv can download an interpreter where it may reach its mirror.
    if env_uv_runs uv && uv python install --quiet 3.12 >/dev/null 2>&1 && candidate="$(uv python find 3.12 2>/dev/null)" &&
        env_python_runs "$candidate"; then
        printf '%s\n' "$candidate"
        return
    fi
    env_say "no Python 3.12 or 3.13 was found (the pinned megatron-core has wheels for these two)."
    env_say "Install one and start again, for example with one of"
    env_say "    sudo apt-get install python3.12 python3.12-venv     # Ubuntu 24.04 or newer"
    env_say "    uv python install 3.12"
    env_say "    pyenv install 3.12"
    env_say "    conda create -n mixtral python=3.12"
    env_fail "or, if there is one in an unusual place: PYTHON=/path/to/python3.12 bash ${0##*/}"
}

env_uv_runs() { "$1" --version >/dev/null 2>&1; }

# Prints a uv that runs: from PATH, from its usual places, or fetched with pip beside the environment $2 by Python $1.
# Prints nothing where none can be had; the caller then works with venv and pip.
env_find_uv() {
    local python="$1" boot="$2.bootstrap" candidate
    for candidate in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" "$boot/bin/uv"; do
        if env_uv_runs "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    rm -rf "$boot"
    if "$python" -m venv "$boot" >/dev/null 2>&1 && "$boot/bin/python" -m pip install --quiet uv >/dev/null 2>&1 &&
        env_uv_runs "$boot/bin/uv"; then
        printf '%s\n' "$boot/bin/uv"
    fi
}

# What the installation depends on: the place, because an environment holds absolute paths, then the files, with the
# sources of the extension; of pyproject.toml only what comes before the settings of the tools.
env_fingerprint() {
    cd "$MIXTRAL_ROOT" || return 1
    printf '%s\n' "$MIXTRAL_ROOT"
    sed '/^\[tool/,$d' pyproject.toml | cat - setup.py constraints.txt megatron_mixtral/tokenizer/engines/native_bpe/* | cksum
}

# Whether the environment $1 was completed for this tree, starts, and is built on PYTHON where that is given.
env_is_complete() {
    local prefix='import sys; print(sys.base_prefix)' built_on
    [[ -f "$1/megatron_mixtral.stamp" && "$(head -n 1 "$1/megatron_mixtral.stamp")" == "$MIXTRAL_ROOT" ]] &&
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
    local venv="$1" python uv began=$SECONDS
    if [[ -e "$venv" && ! -e "$venv/megatron_mixtral.owner" ]]; then
        env_fail "$venv exists and was not made by this script: remove it, or set MIXTRAL_VENV to another folder" \
            "(or to 'active' to use the environment that is active)." || return 1
    fi
    python="$(env_find_python)" || return 1
    uv="$(env_find_uv "$python" "$venv")"
    if env_is_complete "$venv"; then
        env_say "bringing $venv up to date"
        rm "$venv/megatron_mixtral.stamp"
    else
        env_say "making $venv with $("$python" --version) ($python) and ${uv:-venv + pip}; this happens once"
        rm -rf "$venv"
        mkdir -p "$venv"
        touch "$venv/megatron_mixtral.owner"
        env_make_venv "$venv" "$python" "$uv" || return 1
    fi
    env_install "$venv" "$uv" || return 1
    "$venv/bin/python" -c 'from megatron_mixtral.tokenizer.engines.native import load_module; load_module()' \
        >/dev/null 2>&1 ||
        env_say "no C++ compiler, or one without Python's headers: preprocessing takes a slower engine than its own"
    # Four ranks that start at once would each compile the same files otherwise.
    env_say "compiling bytecode"
    "$venv/bin/python" -m compileall -q -j 0 "$venv"/lib/python3*/site-packages/{torch,transformers,megatron} \
        >/dev/null 2>&1 || true
    env_fingerprint >"$venv/megatron_mixtral.stamp"
    env_say "ready after $((SECONDS - began)) s"
}

env_make_venv() {
    local venv="$1" python="$2" uv="$3"
    if [[ -n "$uv" ]]; then
        "$uv" venv --quiet --allow-existing --python "$python" "$venv"
    else
        "$python" -m venv "$venv" ||
            env_fail "$python cannot make environments: install its venv module (python3.12-venv) or uv."
    fi
}

env_install() {
    local venv="$1" uv="$2" pip
    if [[ -n "$uv" ]]; then
        pip=("$uv" pip install --python "$venv/bin/python")
    else
        pip=("$venv/bin/python" -m pip install --disable-pip-version-check)
    fi
    "${pip[@]}" -c "$MIXTRAL_ROOT/constraints.txt" -e "${MIXTRAL_ROOT}[dev]"
}

# Builds under a lock: of two starts at the same moment, the second waits and then finds the stamp.
env_build_once() {
    local venv="$1"
    mkdir -p "$(dirname "$venv")"
    (
        if command -v flock >/dev/null; then
            flock --nonblock 9 || {
                env_say "waiting for another start that is making $venv"
                flock 9
            }
        fi
        env_is_ready "$venv" || env_build "$venv"
    ) 9>"$venv.lock"
}

env_check_active() {
    local python
    python="$(command -v python)" && env_python_runs "$python" ||
        env_fail "MIXTRAL_VENV=active, but the 'python' on PATH is not Python 3.12 or 3.13 that starts." || return 1
    (cd "$MIXTRAL_ROOT" && python -c '
import importlib.util, sys
needed = ["torch", "megatron.core", "transformers", "safetensors", "sentencepiece", "megatron_mixtral"]
def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
missing = [name for name in needed if not found(name)]
if missing:
    sys.exit("[environment] MIXTRAL_VENV=active, but " + sys.executable + " lacks " + ", ".join(missing)
             + ": pip install -c constraints.txt -e .[dev]")')
}

env_use() {
    local venv="${MIXTRAL_VENV:-$MIXTRAL_ROOT/.venv}"
    if [[ "$venv" == active ]]; then
        env_check_active
        return
    fi
    case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
    env_is_ready "$venv" || env_build_once "$venv" || return 1
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    unset PYTHONHOME
    hash -r
}

env_use
