"""Who starts the ranks: what a process makes of torchrun's, Slurm's or no variables."""

import re
import tempfile
from pathlib import Path

import pytest

from megatron_mixtral import __main__ as commands
from megatron_mixtral.errors import ConfigError, MixtralError, RankLostError
from megatron_mixtral.runtime import launch
from megatron_mixtral.training.arguments import resolve

TASK = {"SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[007-008]", "SLURM_TASKS_PER_NODE": "4,3"}


def test_started_plainly_it_is_the_only_rank() -> None:
    found = launch.decide({"HOME": "x"}, needed=1)
    assert (found.world, found.starts) == (1, False)
    assert {name: found.variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(("needed", "nproc", "world"), [(4, None, 4), (1, 4, 4), (2, 8, 8)])
def test_started_plainly_it_starts_the_ranks_that_the_layout_needs(needed: int, nproc: int | None, world: int) -> None:
    found = launch.decide({"OMP_NUM_THREADS": "3", "PYTHONPATH": "mine"}, needed, nproc)
    assert (found.world, found.starts) == (world, True)
    assert found.variables["OMP_NUM_THREADS"] == "3" and found.variables["PYTHONPATH"].endswith(":mine")
    command = launch.torchrun(world, ["--nproc", "8", "--model", "tiny"])
    assert command[-5:] == ["-m", "megatron_mixtral", "pretrain", "--model", "tiny"]
    assert command[command.index("--nproc-per-node") + 1] == str(world)


def test_torchrun_s_variables_stay() -> None:
    variables = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    found = launch.decide({**variables, **TASK}, needed=4, nproc=4)  # torchrun within a step of Slurm's
    assert (found.world, found.starts, dict(found.variables)) == (8, False, {})


def test_a_task_of_slurm_is_a_rank() -> None:
    found = launch.decide(TASK, needed=1)
    assert (found.world, found.starts) == (7, False)
    assert found.variables == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
                               "MASTER_ADDR": "gpu007", "MASTER_PORT": str(10000 + 16 * 4242 % 20000)}
    ports = {launch.decide({**TASK, "SLURM_STEP_ID": step}, 1).variables["MASTER_PORT"] for step in ("0", "1", "2")}
    assert len(ports) == 3, "two steps of a job may run side by side"
    own = launch.decide({**TASK, "MASTER_ADDR": "login", "MASTER_PORT": "6000"}, 1).variables
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("login", "6000")
    part = {**TASK, "SLURM_STEP_NODELIST": "gpu008", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}
    found = launch.decide(part, 1)
    assert found.world == 6 and found.variables["MASTER_ADDR"] == "gpu008"
    assert found.variables["LOCAL_WORLD_SIZE"] == "2"
    bound = {**TASK, "SLURM_GPUS_PER_TASK": "h100:1", "CUDA_VISIBLE_DEVICES": "0"}
    assert launch.decide(bound, 1).variables["LOCAL_RANK"] == "0"
    assert launch.decide({**bound, "CUDA_VISIBLE_DEVICES": "0,1,2"}, 1).variables["LOCAL_RANK"] == "1"


@pytest.mark.parametrize("alone", [
    {"SLURM_STEP_ID": None, "ENVIRONMENT": "BATCH", "SLURM_PROCID": "0"},  # the script of sbatch
    {"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"},  # the same where Slurm numbers it
    {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},  # the shell of salloc
    {"SLURM_PROCID": None},  # salloc on the login node
    {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
])
def test_a_shell_of_slurm_is_a_plain_start(alone: dict[str, str | None]) -> None:
    environ = {name: value for name, value in (TASK | alone).items() if value is not None}
    assert launch.decide(environ, needed=4).starts


@pytest.mark.parametrize(("nodes", "first"), [
    ("localhost", "localhost"), ("a,b", "a"), ("gpu[007-009,12],login", "gpu007"), ("gpu[3,5-7]", "gpu3"),
    ("rack[1-2]node[01-04]-ib", "rack1node01-ib"), ("gpu-7.cluster,gpu-8.cluster", "gpu-7.cluster"),
])
def test_first_host(nodes: str, first: str) -> None:
    assert launch.first_host(nodes) == first


def test_of_the_ranks_of_a_node_one_says_what_all_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def of_torchrun(rank: int, node: str = "a", attempt: int = 0) -> dict[str, str]:
        folder = tmp_path / node / f"attempt_{attempt}" / str(rank)
        folder.mkdir(parents=True, exist_ok=True)
        return {"RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(folder / "error.json")}

    def of_slurm(task: int, step: str = "0") -> dict[str, str]:
        return {**TASK, "SLURM_PROCID": str(task), "SLURM_STEP_ID": step}

    assert [launch.speaks(of_torchrun(rank), "x is missing") for rank in (1, 0, 2)] == [True, False, False]
    assert launch.speaks(of_torchrun(2), "y is missing"), "another cause"
    assert launch.speaks(of_torchrun(3, node="b"), "x is missing"), "another node"
    assert launch.speaks(of_torchrun(0, attempt=1), "x is missing"), "a restart"
    assert [launch.speaks(of_slurm(task), "x is missing") for task in (1, 0, 2)] == [True, False, False]
    assert launch.speaks(of_slurm(0, step="1"), "x is missing"), "another step"
    for unknown in ({}, {"RANK": "1"}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}):
        assert [launch.speaks(unknown, "x is missing") for _ in range(2)] == [True, True], "rather twice than never"


TP2_PP2 = ["--model", "tiny", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


@pytest.mark.parametrize(("argv", "environ", "sentence"), [
    ([], TASK, "world size 7 is not a multiple of tp x pp x cp = 4 (layout tp2-pp2-ep1): it must be a multiple of 4; "
               "change srun's --ntasks"),
    (["--nproc", "6"], {}, "world size 6 is not a multiple of tp x pp x cp = 4 (layout tp2-pp2-ep1): it must be a "
                           "multiple of 4; change --nproc,"),
    (["--nproc", "0"], {}, "--nproc 0: a run has at least one rank"),
    ([], {"RANK": "0", "WORLD_SIZE": "2"}, "change torchrun's --nproc-per-node x --nnodes"),
    (["--nproc", "4"], {"RANK": "0", "WORLD_SIZE": "8"}, "--nproc 4, but torchrun has started 8"),
    (["--nproc", "4"], TASK, "--nproc 4, but srun has started 7"),
    ([], {"RANK": "0"}, "WORLD_SIZE is not set, expected a number"),
    ([], {**TASK, "SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x', expected a number"),
    ([], {**TASK, "SLURM_PROCID": "7"}, "SLURM_PROCID is 7 in a step of 7 tasks"),
])
def test_what_does_not_fit_is_refused(argv: list[str], environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        resolve([*TP2_PP2, *argv], environ)


def test_a_number_of_devices_alone_is_enough_to_plan_but_not_to_train() -> None:
    run = resolve(TP2_PP2, {**TASK, "WORLD_SIZE": "8"})
    assert run.layout.world == 8
    with pytest.raises(ConfigError, match="WORLD_SIZE is set and RANK is not"):
        run.ranks.to_train()


@pytest.mark.parametrize("rank", ["7", "-1", "x"])
def test_a_task_that_is_no_rank_is_refused(rank: str) -> None:
    with pytest.raises(ConfigError, match=f"SLURM_PROCID is .*{rank}"):
        resolve(TP2_PP2, {**TASK, "SLURM_PROCID": rank})


def test_a_rank_that_fails_alone_is_named_and_says_what_was_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        error = ConfigError("x is missing")
        error.add_note("log: y")
        raise error

    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match=r"^rank 3 on .*: x is missing\nlog: y$") as found:
        launch.as_rank(fails)
    assert found.value.__notes__ == ["log: y"]
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"^x is missing\nlog: y$"):
        launch.as_rank(fails)
    assert launch.as_rank(lambda: None) == 0


def test_a_rank_leaves_to_another_what_that_has_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two that miss the same, one is silent; so is one that only lost another rank, which has said why it ended."""
    def raises(error: MixtralError) -> int:
        def work() -> None:
            raise error
        return launch.as_rank(work)

    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        if rank == "1":
            with pytest.raises(ConfigError, match="^rank 1 on"):
                raises(ConfigError("x is missing"))
        else:
            assert raises(ConfigError("x is missing") if rank == "0" else RankLostError("another has ended")) == 1


@pytest.mark.parametrize("command", ["generate --prompts x", "chat", "serve --port 0", "evaluate --output {}"])
def test_every_command_of_several_ranks_speaks_on_each(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture) -> None:
    """A node that lacks a file may be any: its rank is not 0, and says so."""
    for variable, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, value)
    name, *flags = command.format(tmp_path / "out").split()
    assert commands.run(name, [*flags, "--load", str(tmp_path / "absent")]) == 1
    assert "error: rank 1 on" in (said := capsys.readouterr().err) and "absent" in said
