"""The shell scripts: they parse, shellcheck is content, a dry run prints what matters, and the tiny forms run."""

import json
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_mixtral.data.instruction import InstructionOptions, preprocess_instructions
from megatron_mixtral.tokenizer import mixtral_tokenizer_path

ROOT = Path(__file__).resolve().parents[2]
FOUR = "examples/mixtral_4x7b_example.sh"
PTD = "examples/mixtral/pretrain_mixtral_8x7b_ptd.sh"
EVALUATE = "examples/mixtral/evaluate_mixtral_8x7b_ptd.sh"
SBATCH = "examples/slurm/evaluate.sbatch"
TP_PP = "examples/mixtral/pretrain_mixtral_8x7b_tp4_pp4.sh"
LONG = "examples/mixtral/pretrain_mixtral_8x7b_32k.sh"
SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in ("examples", "tests", "benchmarks")
                 for path in (ROOT / folder).rglob("*.sh")) + [SBATCH, ".ci/run"]  # fmt: skip


def run(script: str, *arguments: str, cwd: Path = ROOT, timeout: int = 600,
        **environment: str) -> subprocess.CompletedProcess:
    """Start a script with only these variables besides what a shell has; none of another run may leak in."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "VIRTUAL_ENV", "TMPDIR") if name in os.environ}
    return subprocess.run(["bash", str(ROOT / script), *arguments], cwd=cwd, env=kept | environment, text=True,
                          capture_output=True, timeout=timeout)


def dry_run(script: str, *arguments: str, **environment: str) -> tuple[list[str], dict[str, list[str]]]:
    """(the words before the program, the program's flags with their values)."""
    done = run(script, *arguments, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", " "))  # as a shell would read it when pasted
    place = next(index for index, word in enumerate(words) if word.endswith("tools/pretrain_mixtral.py"))
    flags: dict[str, list[str]] = {}
    for word in words[place + 1:]:
        if word.startswith("--"):
            assert word not in flags, f"{word} is given twice"
            flags[word] = values = []
        else:
            values.append(word)
    return words[:place], flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sourced = ("environment.sh", "gpus.sh", "launch.sh")
    assert "set -euo pipefail" in (ROOT / script).read_text() or script.endswith(sourced)


def test_shellcheck():
    assert shutil.which("shellcheck"), "shellcheck is part of the [dev] extra"
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


RECIPES = [
    (FOUR, {"BLENDED_DATA": "0.6 a_text_document 0.4 b_text_document", "CHECKPOINT_PATH": "start"}, {
        "--nproc-per-node": "8", "--tensor-model-parallel-size": "4", "--pipeline-model-parallel-size": "2",
        "--expert-model-parallel-size": "1", "--seq-length": "4096", "--micro-batch-size": "1",
        "--global-batch-size": "512", "--lr": "1e-5", "--min-lr": "1e-6", "--lr-decay-style": "cosine",
        "--lr-warmup-iters": "512", "--weight-decay": "0.01", "--adam-beta1": "0.9", "--adam-beta2": "0.95",
        "--clip-grad": "1.0", "--moe-aux-loss-coeff": "1e-3", "--bf16": "", "--sequence-parallel": "",
        "--use-distributed-optimizer": "", "--overlap-grad-reduce": "", "--overlap-param-gather": "",
        "--pretrained-checkpoint": "start",
        "--data-path": "0.6 a_text_document 0.4 b_text_document"}),
    (PTD, {"DATA_PATH": "d", "CKPT_SAVE_DIR": "saved/", "MASTER_ADDR": "node0", "NODE_RANK": "1"}, {
        "--nproc-per-node": "8", "--nnodes": "2", "--node-rank": "1", "--master-addr": "node0", "--master-port": "6000",
        "--tensor-model-parallel-size": "1", "--pipeline-model-parallel-size": "8", "--expert-model-parallel-size": "2",
        "--global-batch-size": "128", "--lr": "1.25e-6", "--min-lr": "1.25e-7", "--weight-decay": "0.1",
        "--moe-aux-loss-coeff": "1e-2", "--model": "mixtral-8x7b", "--save": "saved", "--load": "saved",
        "--sequence-parallel": None, "--data-path": "d"}),
    (TP_PP, {"CHECKPOINT_PATH": "", "MASTER_ADDR": "n", "MASTER_PORT": "7000", "GPUS_PER_NODE": "4", "NNODES": "4"}, {
        "--nproc-per-node": "4", "--nnodes": "4", "--master-port": "7000", "--tensor-model-parallel-size": "4",
        "--pipeline-model-parallel-size": "4", "--expert-model-parallel-size": "1", "--sequence-parallel": "",
        "--model": "mixtral-8x7b", "--pretrained-checkpoint": None, "--seq-length": "4096"}),
    (LONG, {"MASTER_ADDR": "n"}, {
        "--nnodes": "4", "--tensor-model-parallel-size": "2", "--pipeline-model-parallel-size": "4",
        "--expert-model-parallel-size": "8", "--expert-tensor-parallel-size": "1", "--context-parallel-size": "4",
        "--seq-length": "32768", "--recompute-modules": "moe_act layernorm"}),
]  # fmt: skip


@pytest.mark.parametrize(("script", "environment", "expected"), RECIPES, ids=["4x7b", "ptd", "tp4_pp4", "32k"])
def test_dry_run_prints_the_recipe(script, environment, expected):
    launcher, flags = dry_run(script, "--seed", "5 6", PRECISION="bf16", **environment)
    given = {word: [value] for word, value in zip(launcher, launcher[1:], strict=False) if word.startswith("--")}
    words = given | flags
    found = {name: " ".join(words[name]) if name in words else None for name in expected}
    if "--standalone" not in launcher:
        assert "--master-addr" in launcher
    assert found == expected
    assert flags["--seed"] == ["5 6"]  # passed through, as one word
    # The architecture comes from the checkpoint or from --model.
    assert not {"--num-layers", "--hidden-size", "--num-experts", "--rotary-base"} & set(flags)


@pytest.mark.parametrize("program", ["generate", "chat", "serve"])
def test_dry_run_of_inference(program) -> None:
    """The variables of the published recipe, each under its name; another layout than the checkpoint's."""
    script = f"examples/mixtral/{program}_mixtral_8x7b_ptd.sh"
    done = run(script, "--prompts", "a b", DRY_RUN="1", PRECISION="bf16", NNODES="2", NODE_RANK="1", MASTER_ADDR="n0",
               MASTER_PORT="6001", GPUS_PER_NODE="4", TP="4", PP="2", CHECKPOINT="c", TOKENIZER_MODEL="t")
    words = shlex.split(done.stdout.replace("\\\n", " "))
    assert words[1:] == [
        "torchrun", "--nproc-per-node", "4", "--nnodes", "2", "--node-rank", "1", "--master-addr", "n0",
        "--master-port", "6001", f"tools/{program}_mixtral.py", "--load", "c", "--tokenizer-model", "t",
        "--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "1",
        "--bf16", "--prompts", "a b"]
    plain = shlex.split(run(script, DRY_RUN="1", PRECISION="fp32").stdout.replace("\\\n", " "))
    assert "--standalone" in plain and plain[plain.index("--tensor-model-parallel-size") + 1] == "8"
    assert plain[plain.index("--load") + 1] == "./model_weights/Mixtral-8x7B-v0.1-tp1-pp8-ep1/"
    tiny = shlex.split(run(script, DRY_RUN="1", MODEL="tiny").stdout.replace("\\\n", " "))
    assert tiny[tiny.index("--nproc-per-node") + 1] == tiny[tiny.index("--tensor-model-parallel-size") + 1] == "2"
    missing = run(script, CHECKPOINT="absent")
    assert missing.returncode == 1 and "absent does not exist" in missing.stderr


def test_dry_run_of_evaluation() -> None:
    """The variables of the published recipe; as a job, whose script Slurm runs from another place."""
    given = {"TOKENIZER_PATH": "./hf/", "CHECKPOINT": "./model", "DATA_PATH": "./mmlu/test/", "TASK": "mmlu"}
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "1", "MIXTRAL_VENV": "active"}
    for script, more in ((EVALUATE, {}), (SBATCH, job)):
        done = run(script, "--limit", "5", DRY_RUN="1", PRECISION="bf16", OUTPUT="out", **given, **more)
        assert done.returncode == 0, done.stderr
        words = shlex.split(done.stdout.replace("\\\n", " "))
        assert words[words.index("tools/evaluate_mixtral.py") + 1:] == [
            "--load", "./model", "--tokenizer-model", "./hf/", "--tensor-model-parallel-size", "8",
            "--pipeline-model-parallel-size", "1", "--expert-model-parallel-size", "1", "--bf16", "--tasks", "mmlu",
            "--data-path", "./mmlu/test/", "--output", "out", "--resume", "--limit", "5"]


@pytest.mark.parametrize(("method", "devices"), [("lora", "8"), ("qlora", "1"), ("full", "8")])
def test_dry_run_of_fine_tuning(method, devices) -> None:
    """A recipe, and what the variables change in it, each under its flag; a recipe of the name is there."""
    from megatron_mixtral.training import recipes_command

    script = f"examples/mixtral/tune_mixtral_8x7b_{method}.sh"
    done = run(script, "--seed", "5", DRY_RUN="1", MASTER_ADDR="n0", DATA="a.json 'b c.json'", HF_CHECKPOINT="the base",
               SAVE_DIR="out", TRAIN_EPOCHS="2", LR="1e-4", EP="4", DATA_ARGS="--bf16")
    words = shlex.split(done.stdout.replace("\\\n", " "))
    place = words.index("tools/finetune_mixtral.py")
    assert words[place + 2:] == [
        "--hf-checkpoint", "the base", "--input", "a.json", "b c.json", "--save", "out", "--train-epochs", "2", "--lr",
        "1e-4", "--expert-model-parallel-size", "4", "--bf16", "--seed", "5"]
    assert words[words.index("--nproc-per-node") + 1] == devices and ("--nnodes" in words) == (method == "full")
    tiny = shlex.split(run(script, DRY_RUN="1", MODEL="tiny").stdout.replace("\\\n", " "))
    assert "--standalone" in tiny and tiny[tiny.index("--nproc-per-node") + 1] == "1"
    for name in (words[place + 1], tiny[-1]):
        assert f"_{method}_" in name and recipes_command(["list", "-p", name]) == 0
    missing = run(script, MODEL="tiny", HF_CHECKPOINT="absent")
    assert missing.returncode == 1 and "absent does not exist" in missing.stderr


def test_flags_of_a_dry_run_are_accepted_for_a_world_that_fits():
    """The training program resolves every recipe: model, layout and world size fit each other."""
    from megatron_mixtral.training import arguments

    for script, world in ((FOUR, 8), (PTD, 16), (TP_PP, 16)):
        for model in ("", "tiny"):
            name = "CKPT_LOAD_DIR" if script == PTD else "CHECKPOINT_PATH"
            given = {name: "", "MASTER_ADDR": "n"} | ({"MODEL": model} if model else {})
            _, flags = dry_run(script, **given)
            argv = [word for flag, values in flags.items() for word in (flag, *values)]
            resolved = arguments.resolve(argv, {"WORLD_SIZE": "4" if model else str(world)})
            assert resolved.layout.min_world == (4 if model else world)


def test_the_cpu_form_is_small_and_fp32():
    for script in (FOUR, PTD, TP_PP):
        launcher, flags = dry_run(script, MODEL="tiny", PRECISION="fp32")
        assert launcher[launcher.index("--nproc-per-node") + 1] == "4"
        assert "--bf16" not in flags and "--overlap-grad-reduce" not in flags
        assert flags["--seq-length"] == ["256"]
        assert flags.get("--expert-tensor-parallel-size") == (["1"] if script == PTD else None)  # the one with EP > 1


def test_data_args_and_flags_after_the_name_reach_the_program():
    _, flags = dry_run(PTD, "--log-progress", MODEL="tiny", DATA_ARGS="\n  --is-instruction-dataset\n  --seed '5 6' \n")
    assert flags["--is-instruction-dataset"] == [] and flags["--seed"] == ["5 6"] and flags["--log-progress"] == []
    assert flags["--data-path"] == ["./dataset/Mixtral-8x7B/alpaca"]  # as seed 001 has it
    for data in (["--mock-data"], ["--train-data-path", "a"], ["--data-path", "0.5", "a", "0.5", "b"]):
        _, flags = dry_run(PTD, *data, MODEL="tiny")
        assert flags[data[0]] == data[1:] and (data[0] == "--data-path" or "--data-path" not in flags)


def test_names_with_spaces_in_a_blend(tmp_path):
    for name in ("common crawl_text_document", "git hub mirror_packed_input_ids_document"):
        (tmp_path / f"{name}.idx").touch()
    crawl, hub = f"{tmp_path}/common crawl_text_document", f"{tmp_path}/git hub mirror"
    for blend, words, more in (
            (f"0.6 {crawl} 0.4 b", ["0.6", crawl, "0.4", "b"], []),
            (crawl, [crawl], []),
            ("0.6 'not there yet' 0.4 \"b\"", ["0.6", "not there yet", "0.4", "b"], []),
            (f"b {hub} 'c d'", ["b", hub, "c d"], ["--is-instruction-dataset"])):
        assert dry_run(TP_PP, *more, BLENDED_DATA=blend, MODEL="tiny")[1]["--data-path"] == words
    assert "BLENDED_DATA" not in run(TP_PP, DRY_RUN="1", BLENDED_DATA="'a", MODEL="tiny").stdout
    assert "a quotation mark is not closed" in run(TP_PP, DRY_RUN="1", BLENDED_DATA="'a", MODEL="tiny").stderr


def test_a_restart_goes_on_also_with_load_or_save_after_the_name(tmp_path):
    save = tmp_path / "run"
    for flags in (["--load", "start"], ["--load=start"]):
        given = {"MODEL": "tiny", "CKPT_SAVE_DIR": str(save)}
        assert dry_run(PTD, *flags, **given)[1]["--load"] == ["start"]
        save.mkdir()
        (save / "latest_checkpointed_iteration.txt").write_text("2")
        assert dry_run(PTD, *flags, **given)[1]["--load"] == [str(save)]
        shutil.rmtree(save)
    _, flags = dry_run(PTD, "--save", "elsewhere/", MODEL="tiny")
    assert flags["--save"] == flags["--load"] == ["elsewhere"]
    assert flags["--tensorboard-dir"] == ["elsewhere/tensorboard"]


def test_no_variable_is_ignored_in_silence():
    """The two names of a setting are one; the variables of other launchers are refused or named."""
    _, flags = dry_run(FOUR, DATA_PATH="a_text_document", LOAD_DIR="start", MODEL="tiny")
    assert flags["--data-path"] == ["a_text_document"] and flags["--pretrained-checkpoint"] == ["start"]
    assert dry_run(PTD, SAVE_DIR="kept", MODEL="tiny")[1]["--save"] == ["kept"]
    both = run(PTD, DRY_RUN="1", SAVE_DIR="a", CKPT_SAVE_DIR="b", MODEL="tiny")
    assert both.returncode == 1 and "CKPT_SAVE_DIR=b and SAVE_DIR=a are one setting" in both.stderr
    for name in ("DISTRIBUTED_ARGS", "GPT_ARGS", "MOE_ARGS", "OUTPUT_ARGS"):
        done = run(PTD, DRY_RUN="1", MODEL="tiny", **{name: "--bf16"})
        assert done.returncode == 1 and f"{name} is not read" in done.stderr
    other = run(PTD, DRY_RUN="1", MODEL="tiny", WORLD_SIZE="16")
    assert other.returncode == 0 and "WORLD_SIZE=16 is not read; NNODES x GPUS_PER_NODE = 1 x 4 devices" in other.stderr
    assert "is not read" not in run(PTD, DRY_RUN="1", MODEL="tiny", WORLD_SIZE="4").stderr


def test_nohup_keeps_a_lost_terminal_from_the_run():
    for how in (signal.SIG_DFL, signal.SIG_IGN):
        done = subprocess.run(["bash", PTD], cwd=ROOT, env={**os.environ, "DRY_RUN": "1", "MODEL": "tiny"}, text=True,
                              capture_output=True, preexec_fn=lambda how=how: signal.signal(signal.SIGHUP, how))
        assert ("--signals-to-handle SIGTERM,SIGINT,SIGQUIT" in done.stdout) == (how is signal.SIG_IGN), done


def test_missing_inputs_are_refused_before_anything_starts(tmp_path):
    done = run(PTD, DATA_PATH="alpaca", MODEL="tiny", DATA_ARGS="--is-instruction-dataset", cwd=tmp_path)
    assert done.returncode == 1 and "alpaca_packed_input_ids_document.idx does not exist" in done.stderr
    done = run(FOUR, BLENDED_DATA="0.5 nowhere 0.5 x", CHECKPOINT_PATH="", cwd=tmp_path)
    assert done.returncode == 1 and "nowhere.idx does not exist" in done.stderr
    (tmp_path / "d.idx").touch()
    done = run(FOUR, BLENDED_DATA="d", CHECKPOINT_PATH="absent", cwd=tmp_path)
    assert done.returncode == 1 and "absent does not exist" in done.stderr
    done = run(PTD, DATA_PATH="d", cwd=tmp_path)
    assert done.returncode == 1 and "needs MASTER_ADDR" in done.stderr
    done = run(FOUR, BLENDED_DATA="d", PRECISION="fp8", cwd=tmp_path)
    assert done.returncode == 1 and "expected bf16 or fp32" in done.stderr
    done = run(FOUR, BLENDED_DATA="d", TRAIN_ITERS="100", cwd=tmp_path)
    assert done.returncode == 1 and "LR_WARMUP_ITERS=512 must be less than TRAIN_ITERS=100" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.idx"]


@pytest.mark.parametrize("program", ["generate", "chat", "serve", "evaluate"])
def test_a_misspelt_flag_is_told_once_before_anything_starts(program, tmp_path):
    script = f"examples/mixtral/{program}_mixtral_8x7b_ptd.sh"
    there = dict.fromkeys(("CHECKPOINT", "TOKENIZER_MODEL", "TOKENIZER_PATH", "DATA_PATH"), str(tmp_path))
    done = run(script, "--tokenizer-modle", "x", cwd=tmp_path, **there)
    assert done.returncode == 2 and "there is no --tokenizer-modle; is it --tokenizer-model" in done.stderr
    assert done.stderr.count("error") == 1 and "torchrun" not in done.stderr and "Root Cause" not in done.stderr


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """A prefix with a few thousand random tokens in documents, written by the engine's own builder."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "random_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        ids = torch.randint(3, 32000, (300,), generator=generator)
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory) -> str:
    """The prefix of a few dialogues, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("alpaca gpt4")
    records = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(2, 9)]
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    preprocess_instructions(InstructionOptions(
        inputs=(str(folder / "in.jsonl"),), output_prefix=str(folder / "alpaca"), handler="auto",
        tokenizer_path=str(mixtral_tokenizer_path()), tokenizer_type="Llama2Tokenizer"))
    return str(folder / "alpaca")


@pytest.mark.parametrize(("script", "flags"), [
    (PTD, ["--is-instruction-dataset"]),
    (TP_PP, []),
    pytest.param(LONG, [], marks=pytest.mark.slow),
], ids=["ptd", "tp4_pp4", "32k"])  # fmt: skip
def test_tiny_form_trains(script, flags, dataset, instructions, tmp_path):
    """From random weights; the 4x7b script's form is run by the quickstart and by the README's test."""
    data = {"DATA_PATH" if script == LONG else "BLENDED_DATA": f"0.7 {dataset} 0.3 {dataset}"}
    data = {"DATA_PATH": instructions} if flags else data
    done = run(script, *flags, MODEL="tiny", TRAIN_ITERS="2", GLOBAL_BATCH_SIZE="2", SEQ_LENGTH="64", cwd=tmp_path,
               SAVE_DIR=str(tmp_path / "run"), **data)
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["iteration"] for step in figures] == [1, 2]
    assert all(5 < step["lm_loss"] < 11 and step["grad_norm"] > 0 for step in figures)
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "2"
