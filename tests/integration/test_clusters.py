"""The files for clusters in examples/: Slurm's with a real Slurm of two nodes where one is installed, the others'
commands as their schedulers would start them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.datasets import write_dataset
from helpers.events import HANG
from helpers.slurm import MISSING, WHY, Slurm

ROOT = Path(__file__).resolve().parents[2]
SBATCH = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/slurm/*.sbatch"))
READY = {"MIXTRAL_VENV": "active", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_the_files_of_slurm_are_whole():
    """shellcheck is content, and each says where it is submitted from and stops at the first failure."""
    done = subprocess.run(["shellcheck", "-x", *SBATCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(SBATCH) >= 4
    for path in SBATCH:
        text = (ROOT / path).read_text()
        assert "set -euo pipefail" in text and 'cd "$SLURM_SUBMIT_DIR"' in text, path
        assert Path(path).name in (ROOT / "docs/clusters.md").read_text()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if MISSING:
        pytest.skip(WHY)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.mark.parametrize("path", SBATCH)
def test_slurm_would_take_the_job(path, slurm):
    assert "to start at" in slurm.ask("sbatch", "--test-only", path, cwd=ROOT, PARTS="1")


def test_an_array_encodes_a_corpus_as_one_process_does(slurm, tmp_path):
    lines = [json.dumps({"text": f"Document {number}: " + "some words of it, " * 50}) for number in range(300)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    given = READY | {"PARTS": "3", "INPUT": str(tmp_path / "corpus.jsonl"), "OUTPUT": str(tmp_path / "parts/corpus")}
    log = f"--output={tmp_path}/%x-%A_%a.log"
    job = slurm.ask("sbatch", "--parsable", "--array=0-2", "--cpus-per-task=1", log,
                    "examples/slurm/preprocess_array.sbatch", cwd=ROOT, **given)
    slurm.ask("sbatch", f"--dependency=afterok:{job}", log, "examples/slurm/preprocess_merge.sbatch", cwd=ROOT, **given)
    slurm.wait()
    whole = tmp_path / "whole"
    subprocess.run([sys.executable, "tools/preprocess_data.py", "--input", given["INPUT"], "--output-prefix", whole,
                    "--tokenizer-type", "PretrainedFromHF", "--append-eod"], cwd=ROOT, check=True, capture_output=True)
    logs = "".join(one.read_text() for one in tmp_path.glob("*.log"))
    for end in ("bin", "idx"):
        joined = tmp_path / f"parts/corpus_text_document.{end}"
        assert joined.read_bytes() == Path(f"{whole}_text_document.{end}").read_bytes(), logs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchrun", "srun"])
def test_two_nodes_train(kind, slurm, tmp_path):
    """The names of the nodes are made up, so the address of the first has to be given."""
    from helpers.models import random_hf_directory

    from megatron_mixtral.config import preset

    data = write_dataset(tmp_path / "data", vocab_size=32000, documents=2000)
    save = tmp_path / "run"
    given = READY | {"MASTER_ADDR": "127.0.0.1", "DATA_PATH": str(data)}
    sbatch = ["sbatch", "--wait", f"--output={tmp_path}/log"]
    if kind == "torchrun":
        sbatch += ["--cpus-per-task=2", "examples/slurm/pretrain_torchrun.sbatch"]
        given |= {"MODEL": "tiny", "CKPT_SAVE_DIR": str(save), "TRAIN_ITERS": "2", "SEQ_LENGTH": "64",
                  "GLOBAL_BATCH_SIZE": "4", "GPUS_PER_NODE": "2"}
    else:
        hf = random_hf_directory(tmp_path / "hf", preset("tiny"))
        sbatch += ["--cpus-per-task=1", "--ntasks-per-node=2", "examples/slurm/pretrain_srun.sbatch"]
        sbatch += ["--pipeline-model-parallel-size", "2", "--expert-tensor-parallel-size", "1", "--seq-length", "64",
                   "--global-batch-size", "4", "--train-iters", "2", "--lr-warmup-iters", "0", "--split", "100,0,0"]
        sbatch += ["--eval-iters", "0"]
        given |= {"HF_CHECKPOINT": str(hf), "SAVE_DIR": str(save)}
    slurm.ask(*sbatch, cwd=ROOT, **given)
    steps = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [step["iteration"] for step in steps] == [1, 2], (tmp_path / "log").read_text()[-3000:]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"


RECORD = '{"messages": [{"role": "user", "content": "What is %d?"}, {"role": "assistant", "content": "It is %d."}]}\n'


def tuning(tmp_path: Path, last: str = "") -> dict[str, str]:
    """A model, dialogues with `last` behind them, and what names both to the scripts of fine-tuning."""
    from helpers.models import tiny_hf_mixtral
    from helpers.vocabularies import train_sentencepiece

    hf = tiny_hf_mixtral(tmp_path / "hf", vocab_size=1000, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                         max_position_embeddings=256)
    train_sentencepiece(hf / "tokenizer.model")
    (tmp_path / "raw.jsonl").write_text("".join(RECORD % (number, number) for number in range(12)) + last)
    return {"HF_CHECKPOINT": str(hf), "DATA": str(tmp_path / "raw.jsonl"), "SAVE_DIR": str(tmp_path / "run")}


@pytest.mark.slow
def test_two_nodes_tune(slurm, tmp_path):
    """One prepares the data, the other waits for them."""
    given = READY | {"MASTER_ADDR": "127.0.0.1", "MODEL": "tiny", "METHOD": "qlora", "GPUS_PER_NODE": "1",
                     "SEQ_LENGTH": "64", "TRAIN_EPOCHS": "1", "GLOBAL_BATCH_SIZE": "2"}
    slurm.ask("sh", "-c", 'sbatch "$@" || true', "sbatch", "--wait", f"--output={tmp_path}/log", "--cpus-per-task=1",
              "examples/slurm/finetune.sbatch", "--evaluation-questions", "What is 3?", cwd=ROOT, **given,
              **tuning(tmp_path))
    log, save = (tmp_path / "log").read_text(), tmp_path / "run"
    assert (save / "metrics.jsonl").exists(), log[-3000:]
    steps = [json.loads(line)["iteration"] for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert steps and steps == list(range(1, len(steps) + 1)), log[-3000:]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(len(steps))
    assert "data parallel 2" in log and len(list((save / "data" / "reports").iterdir())) == 1


@pytest.mark.slow
def test_tasks_of_srun_end_when_the_first_cannot_prepare_the_data(slurm, tmp_path):
    """Slurm itself is told to end none of them. Each is on a node of its own, and so says why itself."""
    given = tuning(tmp_path, last="no record\n")
    words = ["finetune", "tiny_lora_openai_json_e20", "--hf-checkpoint", given["HF_CHECKPOINT"], "--input",
             given["DATA"], "--save", given["SAVE_DIR"], "--seq-length", "64", "--global-batch-size", "2"]
    task = (f"export TMPDIR={tmp_path}/node$SLURM_PROCID; mkdir $TMPDIR; "
            f'exec "$0" -m megatron_mixtral "$@" 2> {tmp_path}/said.$SLURM_PROCID')
    said = slurm.ask("sh", "-c", 'srun --nodes=2 --ntasks=2 --kill-on-bad-exit=0 "$@" || true', "srun", "sh", "-c",
                     task, sys.executable, *words, cwd=ROOT, **READY)
    ends = [(tmp_path / f"said.{rank}").read_text().splitlines()[-1] for rank in range(2)]
    assert ends[0] == ends[1] and "raw.jsonl" in ends[0] and ends[0].startswith("error: "), (ends, said)


# -- containers and clouds ---------------------------------------------------------------------------------------------


def dry_run(command: str, **variables: str) -> str:
    """What the command of a pod or machine would start."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, text=True, capture_output=True, timeout=HANG,
                          env=kept | READY | variables | {"DRY_RUN": "1", "PRECISION": "bf16"})
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.replace("\\\n", " ").split())


def test_a_pod_of_kubernetes_starts_the_ranks_of_its_node():
    job = yaml.safe_load((ROOT / "examples/kubernetes/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob") and job["metadata"]["name"]
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the operator looks for this name
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        given = {one["name"]: one["value"] for one in container["env"]}
        assert int(given["GPUS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert int(given["NNODES"]) == sum(one["replicas"] for one in replicas.values())
        assert container["command"] == ["bash", "-c"]
        operators = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "first", "MASTER_PORT": "23456"}
        shown = dry_run(container["args"][0], **operators, **given)
        assert "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr first --master-port 23456" in shown
        assert f"--data-path {given['DATA_PATH']}" in shown


def test_a_machine_of_skypilot_starts_the_ranks_of_its_node():
    task = yaml.safe_load((ROOT / "examples/skypilot/pretrain.yaml").read_text())
    known = {"name", "num_nodes", "resources", "workdir", "file_mounts", "envs", "setup", "run"}
    assert set(task) <= known and task["num_nodes"] == 2
    addresses = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
                 "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}  # fmt: skip
    shown = dry_run(task["run"], **addresses, **task["envs"])
    assert "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 6000" in shown
    dry_run(task["setup"])


def test_the_commands_and_files_of_the_dockerfile():
    """No image is built here. Each instruction is one of Docker's, each file is there, each command parses as shell."""
    text = re.sub(r"^#.*\n", "", (ROOT / "examples/docker/Dockerfile").read_text(), flags=re.MULTILINE)
    found = []
    for line in filter(None, text.replace("\\\n", " ").split("\n")):
        instruction, _, rest = line.partition(" ")
        found.append(instruction)
        if instruction == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        if instruction in ("RUN", "CMD"):
            command = json.loads(rest)[2] if rest.startswith('["bash"') else rest
            if not command.startswith("["):
                subprocess.run(["bash", "-n", "-c", command], check=True)
    assert found == ["ARG", "FROM", "RUN", "WORKDIR", "COPY", "RUN", "ENV", "CMD"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", ".venv.bootstrap"} <= set(ignored)  # an environment of another machine does not work there
