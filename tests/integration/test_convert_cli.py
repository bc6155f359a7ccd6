"""The conversion commands as users type them, and what they say when something is wrong."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from helpers.events import at_most_cpu_seconds
from helpers.models import assert_same_weights, random_hf_directory, tiny_hf_mixtral

from megatron_mixtral import __main__ as commands
from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.disk import human_size
from megatron_mixtral.weights.conversion import own_memory

ROOT = Path(__file__).resolve().parents[2]
MODEL = MixtralConfig(vocab_size=32000, hidden_size=16, intermediate_size=24, num_hidden_layers=8,
                      num_attention_heads=8, num_key_value_heads=8, head_dim=2, num_local_experts=8)


util, to_hf = partial(commands.run, "convert"), partial(commands.run, "convert-to-hf")


def type_in(folder: Path, command: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a command in a folder that has the clone's `tools`, as a shell would."""
    if not (folder / "tools").exists():
        (folder / "tools").symlink_to(ROOT / "tools")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False)


def succeed(folder: Path, command: str, **variables: str) -> str:
    done = type_in(folder, command, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def here(folder: Path, command: str) -> None:
    """Run the same command in this process, which has imported torch already."""
    words = shlex.split(command.replace("\\\n", " "))
    with contextlib.chdir(folder):
        assert {"util": util, "convert_megatron_to_hf_mixtral": to_hf}[Path(words[1]).stem](words[2:]) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Mixtral with 8 layers, 8 experts, 8 query groups and the real tokenizer."""
    hf = random_hf_directory(tmp_path_factory.mktemp("model") / "Mixtral-8x7B", MODEL, torch.bfloat16)
    shutil.copyfile(str(files("mistral_common") / "data" / "tokenizer.model.v1"), hf / "tokenizer.model")
    (hf / "generation_config.json").write_text('{"eos_token_id": 2}')
    return hf


def test_import_reshard_and_export_as_documented_for_tp1_pp8_ep2(model, tmp_path):
    hf = Path(shutil.copytree(model, tmp_path / "model_from_hf" / "Mixtral-8x7B"))
    succeed(tmp_path, """python tools/checkpoint/util.py \\
        --model-type GPT \\
        --loader mixtral_hf \\
        --saver mixtral \\
        --load-dir ./model_from_hf/Mixtral-8x7B/ \\
        --save-dir ./model_weights/Mixtral-8x7B-v0.1-tp1-pp8-ep2/ \\
        --tokenizer-model ./model_from_hf/Mixtral-8x7B/tokenizer.model \\
        --target-tensor-parallel-size 1 \\
        --target-pipeline-parallel-size 8 \\
        --target-expert-parallel-size 2 """)
    weights = tmp_path / "model_weights" / "Mixtral-8x7B-v0.1-tp1-pp8-ep2"
    assert len(list(weights.glob("release/mp_rank_00_00?_00?/model_optim_rng.pt"))) == 16
    assert (weights / "tokenizer.model").read_bytes() == (hf / "tokenizer.model").read_bytes()
    here(tmp_path, """python tools/checkpoint/util.py \\
        --model-type GPT \\
        --loader mixtral_mg \\
        --saver mixtral \\
        --load-dir ./model_weights/Mixtral-8x7B-v0.1-tp1-pp8-ep2/ \\
        --save-dir ./model_weights/Mixtral-8x7B-v0.1-tp1-pp8-ep1/ \\
        --target-tensor-parallel-size 1 \\
        --target-pipeline-parallel-size 8 \\
        --target-expert-parallel-size 1 """)
    export = """python tools/checkpoint/util.py \\
        --model-type GPT \\
        --loader mixtral_mg \\
        --saver mixtral \\
        --save-model-type huggingface \\
        --load-dir ./model_weights/Mixtral-8x7B-v0.1-tp1-pp8-ep1/ \\
        --save-dir ./model_from_hf/Mixtral-8x7B/ """
    here(tmp_path, export)
    here(tmp_path, export)  # a second export replaces the first
    assert_same_weights(hf, hf / "mg2hg")
    for name in ("tokenizer.model", "generation_config.json"):
        assert (hf / "mg2hg" / name).read_bytes() == (hf / name).read_bytes()
    assert json.loads((hf / "mg2hg" / "config.json").read_text()) == json.loads((hf / "config.json").read_text())


def test_import_and_export_as_documented_for_tp4_pp2(model, tmp_path):
    hf = Path(shutil.copytree(model, tmp_path / "hf"))
    before = {path.name: path.read_bytes() for path in hf.iterdir()}
    variables = {"MIXTRAL_HUGGINGFACE_PATH": str(hf), "MIXTRAL_MEGATRON_PATH": str(tmp_path / "mg"),
                 "TP": "4", "PP": "2"}
    succeed(tmp_path, """PYTHONPATH=$(pwd) python tools/checkpoint/util.py --model-type GPT \\
--loader mixtral_hf \\
--saver mixtral \\
--load-dir $MIXTRAL_HUGGINGFACE_PATH \\
--save-dir $MIXTRAL_MEGATRON_PATH \\
--tokenizer-model $MIXTRAL_HUGGINGFACE_PATH/tokenizer.model \\
--target-tensor-parallel-size $TP \\
--target-pipeline-parallel-size $PP""", **variables)
    said = succeed(tmp_path, """PYTHONPATH=. python tools/checkpoint/convert_megatron_to_hf_mixtral.py \\
	--megatron-checkpoint-path $MIXTRAL_MEGATRON_PATH \\
	--huggingface-config-path $MIXTRAL_HUGGINGFACE_PATH \\
	--huggingface-checkpoint-path $MIXTRAL_HUGGINGFACE_PATH \\
	--tensor-parallel-size $TP --pipeline-parallel-size $PP""", **variables)
    assert "is not empty and is left as it is" in said
    assert_same_weights(hf, hf / "mg2hg")
    assert {path.name: path.read_bytes() for path in hf.iterdir() if path.is_file()} == before


def test_a_wrong_layout_is_refused_quickly_and_before_weights_are_read(model, tmp_path):
    (tmp_path / "hf").mkdir()
    shutil.copyfile(model / "config.json", tmp_path / "hf" / "config.json")  # no weights at all
    for flag, size, arithmetic in (("tensor", 3, "8 = 2 x 3 + 2"), ("expert", 3, "8 = 2 x 3 + 2"),
                                   ("pipeline", 5, "8 = 1 x 5 + 3")):
        with at_most_cpu_seconds(5.0):
            done = type_in(tmp_path, "python tools/checkpoint/util.py --model-type GPT --loader mixtral_hf --saver "
                                     f"mixtral --load-dir hf --save-dir mg --target-{flag}-parallel-size {size}")
        assert done.returncode == 1
        assert arithmetic in done.stderr and f"--target-{flag}-parallel-size" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "mg").exists()


# -- In this process: fast -------------------------------------------------------------------------------


@pytest.fixture
def hf(tmp_path) -> Path:
    return tiny_hf_mixtral(tmp_path / "hf", torch.bfloat16)


def convert(hf: Path, target: Path, *more: str) -> int:
    return util(["--loader", "mixtral_hf", "--load-dir", str(hf), "--save-dir", str(target), *more])


def test_dry_run_writes_nothing(hf, tmp_path, capsys):
    assert convert(hf, tmp_path / "mg", "--target-tensor-parallel-size", "2", "--target-expert-parallel-size", "4",
                   "--target-expert-tensor-parallel-size", "1", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "tp 1 ep 3 etp 0: layers 0-3, experts 3-3 + embedding + output_layer" in said
    assert not (tmp_path / "mg").exists()


@pytest.mark.parametrize("flags", [(), ("--target-ckpt-format", "torch_dist"), ("--params-dtype", "fp32")])
def test_dry_run_names_the_files_that_are_written(hf, tmp_path, capsys, flags):
    flags = ("--target-pipeline-parallel-size", "2", *flags)
    assert convert(hf, tmp_path / "mg", *flags, "--dry-run") == 0
    said = dict(re.findall(r"^(\S+): \d+ tensors, (.+)$", capsys.readouterr().out, re.MULTILINE))
    assert convert(hf, tmp_path / "mg", *flags) == 0
    report = json.loads((tmp_path / "mg/conversion.json").read_text())
    assert said == {name: human_size((tmp_path / "mg" / name).stat().st_size) for name in report["files"]}


# A program that looks at its memory whenever it writes into a file, since a block is held then.
LOOKING = """
import re, runpy, sys, threading
peak = 0
def look(frame, event, function):
    global peak
    if event == "c_call" and function.__name__ == "pwrite":
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
threading.setprofile(look)
sys.argv[0] = "megatron-mixtral"
try:
    runpy.run_module("megatron_mixtral", run_name="__main__")
finally:
    print("peak", peak)
"""


def _peak_of_its_own(argv: list[str]) -> int:
    """The most anonymous memory of a conversion, bytes."""
    done = subprocess.run([sys.executable, "-c", LOOKING, "convert", *argv], cwd=ROOT, check=True,
                          stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("cast", [(), ("--params-dtype", "fp32")], ids=["as it is", "cast"])
def test_memory_is_what_the_dry_run_says(tmp_path, capsys, cast):
    """Never more, and not less than a third of it: which blocks are held at one moment is left to chance."""
    hf = random_hf_directory(tmp_path / "hf", MixtralConfig(hidden_size=512, intermediate_size=1792,
                                                            num_hidden_layers=4, vocab_size=512), torch.bfloat16)
    argv = ["--loader", "mixtral_hf", "--load-dir", str(hf), "--save-dir", str(tmp_path / "mg"), "--jobs", "2",
            "--target-tensor-parallel-size", "2", *cast]
    assert "2 thread(s), about " in _said(argv, capsys)
    predicted = own_memory(2, bool(cast))
    measured = _peak_of_its_own(argv)
    assert predicted / 3 < measured < predicted


def _said(argv: list[str], capsys) -> str:
    assert util([*argv, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_exotic_layouts_old_flags_and_defaults(hf, tmp_path):
    assert convert(hf, tmp_path / "mg", "--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2",
                   "--target-virtual-pipeline-parallel-size", "2", "--max-queue-size", "50", "--no-checking",
                   "--megatron-path", "/nowhere", "--make-vocab-size-divisible-by", "128") == 0
    # Without sizes the source's are kept.
    assert util(["--loader", "mixtral_mg", "--saver", "mixtral", "--load-dir", str(tmp_path / "mg"), "--save-dir",
                 str(tmp_path / "mg2"), "--target-pipeline-parallel-size", "2", "--target-first-pipeline-num-layers",
                 "1"]) == 0
    assert sorted(p.name for p in (tmp_path / "mg2/release").iterdir()) == [
        "mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    assert to_hf(["--megatron-checkpoint-path", str(tmp_path / "mg2"), "--huggingface-checkpoint-path",
                  str(tmp_path / "back"), "--params-dtype", "bf16"]) == 0
    assert_same_weights(hf, tmp_path / "back")


def test_refusals_say_what_to_do(hf, tmp_path, capsys):
    assert convert(hf, tmp_path / "mg", "--target-tensor-parallel-size", "2") == 0
    mg = ["--megatron-checkpoint-path", str(tmp_path / "mg"), "--huggingface-checkpoint-path", str(tmp_path / "out")]
    large = tmp_path / "tokenizer.model"
    shutil.copyfile(str(files("mistral_common") / "data" / "tokenizer.model.v1"), large)
    (tmp_path / "junk.model").write_text("junk")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").touch()
    other = json.loads((hf / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    capsys.readouterr()
    for call, sentence in (
        (lambda: to_hf([*mg, "--tensor-parallel-size", "4"]), "--tensor-parallel-size 4 contradicts the checkpoint"),
        (lambda: to_hf([*mg, "--pipeline-parallel-size", "2"]), "--pipeline-parallel-size 2 contradicts"),
        (lambda: to_hf([*mg, "--huggingface-config-path", str(tmp_path / "other")]), "rms_norm_eps is 0.5"),
        (lambda: convert(hf, tmp_path / "mg"), "is not empty"),
        (lambda: convert(tmp_path / "absent", tmp_path / "x"), "--load-dir"),
        (lambda: convert(tmp_path / "mg", tmp_path / "x"), "config.json does not exist"),
        (lambda: convert(hf, tmp_path / "x", "--tokenizer-model", str(tmp_path / "no.model")), "does not exist\n"),
        (lambda: convert(hf, tmp_path / "x", "--tokenizer-model", str(tmp_path / "other" / "tokenizer.model")),
         "the folder's tokenizer.json comes along by itself: leave the flag out"),
        (lambda: convert(hf, tmp_path / "x", "--tokenizer-model", str(tmp_path / "junk.model")), "sentencepiece model"),
        (lambda: convert(hf, tmp_path / "x", "--tokenizer-model", str(large)), "has 32000 tokens, more than"),
        (lambda: convert(hf, tmp_path / "x", "--make-vocab-size-divisible-by", "0"), "must be positive"),
        (lambda: convert(hf, tmp_path / "x", "--target-pipeline-parallel-size", "0"), "positive integer"),
        (lambda: util(["--loader", "mixtral_mg", "--load-dir", str(hf), "--save-dir", str(tmp_path / "x")]),
         "not a Megatron checkpoint"),
    ):
        assert call() == 1
        said = capsys.readouterr().err
        assert sentence in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "x").exists() and not (tmp_path / "out").exists()


def test_a_killed_conversion_leaves_nothing_that_looks_complete(hf, tmp_path, capsys):
    code = ("import os, sys; from megatron_mixtral.weights import cli\n"
            "from megatron_mixtral.weights.files import writer; whole = writer.FileWriter.open\n"
            "def die(self):\n"
            "    if '_001' in str(self.path): os.kill(os.getpid(), 9)\n"
            "    return whole(self)\n"
            "writer.FileWriter.open = die; cli.convert(sys.argv[1:])")
    arguments = ["--loader", "mixtral_hf", "--load-dir", str(hf), "--save-dir", str(tmp_path / "mg"),
                 "--target-pipeline-parallel-size", "2", "--jobs", "1"]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT)},
                            capture_output=True, check=False)
    assert killed.returncode == -9
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mg.partial", "hf"]
    capsys.readouterr()
    assert util([*arguments, "--resume", "--verify", "--check-finite"]) == 0  # takes up where it was killed
    said = capsys.readouterr().out
    assert "1 files were there already" in said and "checksums equal" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "mg"]
    report = json.loads((tmp_path / "mg" / "conversion.json").read_text())
    assert report["resumed"] == ["release/mp_rank_00_000/model_optim_rng.pt"] and report["not_finite"] == []
    assert to_hf(["--megatron-checkpoint-path", str(tmp_path / "mg"), "--huggingface-checkpoint-path",
                  str(tmp_path / "back")]) == 0
    assert_same_weights(hf, tmp_path / "back")
