"""A Slurm of two nodes on this machine, from the distribution's packages: no cluster, but the real sbatch and srun."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

from helpers.events import HANG, until
from helpers.ports import free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
WHY = f"Slurm is not installed ({', '.join(MISSING)} not found): apt-get install slurm-wlm"
NODES = ("n0", "n1")


class Slurm:
    """Daemons that run until `close()`. Eight GPUs a node are declared (any eight device files); nothing uses them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._daemons = folder, []
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        self._configure()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"),
                            "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        self._start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for node in NODES:
            self._start("slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf"))
        until(lambda: self.ask("sinfo", "--noheader", "--format=%t %D") == "idle 2", "for Slurm")

    def _configure(self) -> None:
        ports = [free_port() for _ in range(1 + len(NODES))]
        host = socket.gethostname()
        devices = "NodeName=n[0-1] Name=gpu File=/dev/tty[0-7]\n"
        lines = [
            "ClusterName=trial", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={ports[0]}",
            f"SlurmUser={os.getuid()}", f"SlurmdUser={os.getuid()}", "AuthType=auth/none", "CredType=cred/none",
            f"StateSaveLocation={self._folder}/state", f"SlurmdSpoolDir={self._folder}/spool.%n",
            f"SlurmctldPidFile={self._folder}/ctld.pid", f"SlurmdPidFile={self._folder}/%n.pid",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none",
            "SelectType=select/cons_tres", "SlurmdParameters=config_overrides", "GresTypes=gpu", "ReturnToService=2",
            *(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=128 RealMemory=4000 Gres=gpu:8"
              for node, port in zip(NODES, ports[1:], strict=True)),
            "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        ]  # fmt: skip
        (self._folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (self._folder / "gres.conf").write_text(devices)

    def _start(self, *command: str) -> None:
        with (self._folder / f"{command[0]}.{len(self._daemons)}.log").open("w") as log:
            self._daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment))

    def ask(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """What a command prints, both streams; an error where it fails."""
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd,
                              env=self.environment | variables, timeout=HANG)
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout.strip()

    def wait(self) -> None:
        """Until no job is left in the queue."""
        until(lambda: not self.ask("squeue", "--noheader"), "for Slurm")

    def close(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(HANG)
