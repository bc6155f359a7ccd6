"""A machine with GPUs, made of an `nvidia-smi` that says so: which tests run there, and which precision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
# Notes how it was called and which GPUs it saw, and ends as the test says.
PYTEST = f"""#!/bin/sh
case "$*" in
    *"-m pytest"*) echo "${{CUDA_VISIBLE_DEVICES-all}}|$*" >>"$CALLS" ;;
    *) exec {sys.executable} "$@" ;;
esac
case "$*" in *"not gpu"*) exit "${{CPU_STATUS:-0}}" ;; *) exit "${{GPU_STATUS:-0}}" ;; esac
"""


def bash(command: str, folder: Path, gpus: int = 2, **more: str) -> subprocess.CompletedProcess:
    for name, text in {"nvidia-smi": "#!/bin/sh\n" + "".join(f"echo GPU {n}: one\n" for n in range(gpus)),
                       "python": PYTEST}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "PYTHONPATH")}
    environment = kept | {"PATH": f"{folder}:{os.environ['PATH']}", "MIXTRAL_VENV": "active", **more}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("said", "count"), [(None, 2), ("", 0), ("-1", 0), ("NoDevFiles", 0), ("1", 1), ("0,1", 2),
                                             ("0, -1, 1", 1), ("GPU-a,GPU-b", 2), ("0,1,2,3", 2)])
def test_scripts_count_the_gpus_that_cuda_would_see(said: str | None, count: int, tmp_path: Path) -> None:
    hidden = {} if said is None else {"CUDA_VISIBLE_DEVICES": said}
    assert bash("source examples/gpus.sh; visible_gpus", tmp_path, **hidden).stdout == f"{count}\n"
    script = "examples/mixtral/pretrain_mixtral_8x7b_ptd.sh"
    done = bash(f"MODEL=tiny DRY_RUN=1 DATA_PATH=d bash {script}", tmp_path, **hidden)
    assert ("--bf16" in done.stdout) is (count > 0), done.stderr


@pytest.mark.parametrize(("on_cpu", "on_gpu", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (2, 1, 2), (5, 0, 0),
                                                          (0, 5, 0), (5, 5, 5)])
def test_on_a_gpu_there_are_two_runs_of_the_tests(on_cpu: int, on_gpu: int, status: int, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    ends = {"CPU_STATUS": str(on_cpu), "GPU_STATUS": str(on_gpu)}
    done = bash("bash tests/run.sh -k layout", tmp_path, CALLS=str(calls), **ends)
    assert done.returncode == status, done.stderr
    assert calls.read_text().splitlines() == ["|-m pytest -m not gpu and not slow and not browser -k layout",
                                              "all|-m pytest -m gpu and not slow and not browser -k layout"]


def test_elsewhere_and_with_marks_of_ones_own_there_is_one_run(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    assert bash("bash tests/run.sh", tmp_path, gpus=0, CALLS=str(calls)).returncode == 0
    assert bash("SLOW=1 bash tests/run.sh tests/browser", tmp_path, CALLS=str(calls),
                CUDA_VISIBLE_DEVICES="").returncode == 0
    assert bash("bash tests/run.sh -m slow -s", tmp_path, CALLS=str(calls)).returncode == 0
    assert calls.read_text().splitlines() == [
        "all|-m pytest -n 2 --dist loadfile -m not gpu and not slow and not browser",
        "|-m pytest -m not gpu tests/browser", "all|-m pytest -m slow -s"]


def bad_fork(rank: int) -> bool:
    import torch

    return torch.cuda._is_in_bad_fork()


def test_a_rank_may_still_ask_for_a_gpu() -> None:
    """What the fork server asked CUDA, no rank of it could ask again."""
    assert run_ranks(1, bad_fork) == [False]
    code = ("import os, helpers.preload, torch\nif pid := os.fork():\n    raise SystemExit(os.waitpid(pid, 0)[1])\n"
            "os._exit(torch.cuda._is_in_bad_fork())")
    environment = os.environ | {"RANKS_ON": "cuda", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
