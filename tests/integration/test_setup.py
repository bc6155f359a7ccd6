"""examples/environment.sh without installing anything: a copy of it among stand-ins for uv, pip and interpreters."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REAL = getattr(sys, "_base_executable", sys.executable)
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "env", "flock", "head", "ls", "mkdir", "rm", "sed", "sleep", "touch")

UV = """#!/bin/bash
case "$1" in
    --version) echo "uv 0.0"; exit ;;
    python) exit 1 ;;
esac
echo "$*" >>"$CALLS"
if [[ "$1" == venv ]]; then
    target="${*: -1}"
    mkdir -p "$target/bin" && cp "$BOX/python3.12" "$target/bin/python"
else
    sleep "${SLOWLY:-0}"
    [[ ! -e "$BOX/uv-is-broken" ]]
fi
"""

# An interpreter that keeps account of `-m venv` and `-m pip` instead of doing them.
PYTHON = f"""#!/bin/bash
if [[ "$1 $2" == "-m venv" ]]; then
    echo "venv $3" >>"$CALLS"
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [[ "$1 $2" == "-m pip" ]]; then
    echo "pip ${{*:3}}" >>"$CALLS"
    [[ "$*" != *" uv" ]]
elif [[ "$1 $2" == "-m compileall" ]]; then
    exit 0
else
    exec {REAL} -S -E "$@"
fi
"""


class Box:
    """A tree with the set-up's files, and a PATH with nothing but what is put there."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.bin, self.home = folder / "tree", folder / "bin", folder / "home"
        for path in (self.tree / "examples", self.tree / "megatron_mixtral", self.bin, self.home):
            path.mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "constraints.txt", "examples/environment.sh",
                     "megatron_mixtral/__init__.py"):
            shutil.copy(ROOT / name, self.tree / name)
        sources = "megatron_mixtral/tokenizer/engines/native_bpe"
        shutil.copytree(ROOT / sources, self.tree / sources)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"{tool} is not on PATH"
            (self.bin / tool).symlink_to(found)
        self.calls = folder / "calls"
        self.calls.touch()

    def put(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.home), "CALLS": str(self.calls), "BOX": str(self.bin), **more}

    def source(self, code: str = "", candidates: str = "$BOX/python3.12", **more: str) -> subprocess.CompletedProcess:
        """Source the script as the commands do, with the search limited to `candidates`, then run `code`."""
        script = self.tree / "examples" / "environment.sh"
        limited = self.tree / "examples" / "limited.sh"
        body, last = script.read_text().rstrip("\n").rsplit("\n", 1)
        assert last == "env_use"
        limited.write_text(f"{body}\nenv_python_candidates() {{ printf '%s\\n' {candidates}; }}\nenv_use\n")
        return subprocess.run(["bash", "-c", f"set -euo pipefail; source {limited}; {code}"], text=True,
                              env=self.environment(**more), capture_output=True, timeout=60)

    def installs(self) -> int:
        return sum("-c " in line for line in self.calls.read_text().splitlines())


@pytest.fixture
def box(tmp_path) -> Box:
    made = Box(tmp_path)
    made.put("python3.12", PYTHON)
    return made


def test_uv_makes_the_environment_once(box):
    box.put("uv", UV)
    first = box.source("command -v python; echo $VIRTUAL_ENV")
    assert first.returncode == 0, first.stderr
    venv = box.tree / ".venv"
    assert first.stdout.split() == [str(venv / "bin" / "python"), str(venv)]
    create, install = box.calls.read_text().splitlines()
    assert create.startswith("venv ") and f"--python {box.bin}/python3.12" in create
    assert f"-c {box.tree}/constraints.txt -e {box.tree}[dev]" in install
    began = time.monotonic()
    assert box.source().returncode == 0
    assert time.monotonic() - began < 2
    assert box.installs() == 1


def test_an_interrupted_installation_is_started_again(box):
    box.put("uv", UV)
    broken = box.bin / "uv-is-broken"
    broken.touch()
    first = box.source("echo not reached")
    assert first.returncode != 0 and "not reached" not in first.stdout
    assert not (box.tree / ".venv" / "megatron_mixtral.stamp").exists()
    broken.unlink()
    assert box.source().returncode == 0
    assert [line.split()[0] for line in box.calls.read_text().splitlines()] == ["venv", "pip"] * 2


def test_changed_pins_or_sources_update_the_environment_and_a_moved_tree_makes_a_new_one(box):
    box.put("uv", UV)
    assert box.source().returncode == 0
    constraints = box.tree / "constraints.txt"
    constraints.write_text(constraints.read_text().replace("numpy==", "numpy==9."))
    assert "up to date" in box.source().stderr
    assert [line.split()[0] for line in box.calls.read_text().splitlines()] == ["venv", "pip", "pip"]
    pyproject = box.tree / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("line-length = 120", "line-length = 121"))
    assert box.source().stderr == ""  # settings of tools install nothing
    with open(box.tree / "megatron_mixtral/tokenizer/engines/native_bpe/encoder.cpp", "a") as source:
        source.write("// changed\n")
    assert "up to date" in box.source().stderr  # the extension is built again
    box.tree = box.tree.rename(box.tree.with_name("moved"))
    assert "this happens once" in box.source().stderr


def test_two_starts_at_once_install_once(box):
    box.put("uv", UV)
    box.source("true", SLOWLY="0", MIXTRAL_VENV=str(box.tree / "other"))  # writes the limited script
    script = f"set -euo pipefail; source {box.tree}/examples/limited.sh"
    starts = [subprocess.Popen(["bash", "-c", script], env=box.environment(SLOWLY="2"), text=True,
                               stderr=subprocess.PIPE) for _ in range(2)]
    said = [start.communicate(timeout=60)[1] for start in starts]
    assert [start.returncode for start in starts] == [0, 0], said
    assert box.installs() == 2  # one for `other`, one for both starts
    assert sum("waiting for another start" in text for text in said) == 1


def test_without_uv_venv_and_pip_do_it(box):
    done = box.source("command -v python")
    assert done.returncode == 0, done.stderr
    assert "venv + pip" in done.stderr
    boot, wanted, venv, install = box.calls.read_text().splitlines()
    assert boot.endswith(".venv.bootstrap") and wanted.endswith("uv")  # it tried to fetch uv
    assert venv == f"venv {box.tree}/.venv" and install.startswith("pip install") and "-e " in install


def test_a_command_that_does_not_start_is_passed_over(box):
    box.put("uv", UV)
    box.put("shim", "#!/bin/bash\necho 'version not installed' >&2; exit 127\n")
    box.put("old", f"#!/bin/bash\nexec {REAL} -c 'raise SystemExit(1)'\n")  # an older Python answers so
    done = box.source(candidates="$BOX/shim $BOX/old $BOX/absent $BOX/python3.12")
    assert done.returncode == 0, done.stderr
    assert f"--python {box.bin}/python3.12" in box.calls.read_text()


def test_the_search_looks_beyond_the_path(box):
    pyenv = box.home / ".pyenv" / "versions" / "3.12.9" / "bin"
    pyenv.mkdir(parents=True)
    (box.bin / "python3.12").rename(pyenv / "python3.12")
    box.put("python3", "#!/bin/bash\nexit 127\n")
    script = (box.tree / "examples" / "environment.sh").read_text().rstrip("\n").removesuffix("env_use")
    found = subprocess.run(["bash", "-c", f"{script}\nenv_python_candidates"], env=box.environment(), text=True,
                           capture_output=True, timeout=60).stdout.split()  # fmt: skip
    assert found[0] == str(box.bin / "python3")
    assert str(pyenv / "python3.12") in found


def test_no_interpreter_says_what_to_install(box):
    done = box.source("echo not reached", candidates="$BOX/absent")
    assert done.returncode != 0 and "not reached" not in done.stdout
    for part in ("no Python 3.12 or 3.13 was found", "apt-get install python3.12", "uv python install 3.12", "PYTHON="):
        assert part in done.stderr
    assert not (box.tree / ".venv").exists()


def test_the_named_interpreter_has_to_work(box):
    done = box.source(PYTHON=str(box.bin / "absent"))
    assert done.returncode != 0 and "does not start, or is not Python 3.12 or 3.13" in done.stderr


def test_a_folder_of_somebody_else_is_left_alone(box):
    (box.tree / ".venv").mkdir()
    (box.tree / ".venv" / "theirs").touch()
    done = box.source()
    assert done.returncode != 0 and "was not made by this script" in done.stderr
    assert (box.tree / ".venv" / "theirs").exists()


def test_the_active_environment_is_checked(box):
    done = box.source(MIXTRAL_VENV="active")
    assert done.returncode != 0 and "'python' on PATH is not" in done.stderr
    (box.bin / "python").symlink_to(box.bin / "python3.12")
    done = box.source(MIXTRAL_VENV="active")
    assert done.returncode != 0 and "lacks torch, megatron.core" in done.stderr and "pip install" in done.stderr
    real = subprocess.run(["bash", "-c", "set -euo pipefail; source examples/environment.sh; command -v python"],
                          cwd=ROOT, env={**os.environ, "MIXTRAL_VENV": "active"}, text=True, capture_output=True)
    assert real.returncode == 0, real.stderr
