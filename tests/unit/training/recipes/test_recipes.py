"""Recipes: those that come along, how a file becomes a command line, and what is refused in it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.events import HANG, until
from helpers.models import TINY, random_hf_directory

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral import __main__ as commands
from megatron_mixtral.config import MixtralConfig, preset
from megatron_mixtral.data.datasets import InstructionFiles
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.training import arguments, preflight
from megatron_mixtral.training.checkpoints import lease
from megatron_mixtral.training.recipes import book, raw_data, recipe

ROOT = Path(__file__).resolve().parents[4]
QLORA = "mixtral_8x7b_instruct_qlora_oasst1_e3"
RECORD = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "Yes, number %d."}]}\n'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each model's sizes, with its config.json alone."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name in ("tiny", "mixtral-4x7b", "mixtral-8x7b"):
        found[name] = folder / name
        found[name].mkdir()
        (found[name] / "config.json").write_text(json.dumps(preset(name).to_hf_dict()))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and raw dialogues."""
    folder = tmp_path_factory.mktemp("place")
    random_hf_directory(folder / "hf", MixtralConfig(**TINY | {"vocab_size": 32000}))
    write_hf_tokenizer(folder / "hf")
    (folder / "raw.jsonl").write_text("".join(RECORD % (f"Is this {n}?", n) for n in range(9)))
    return folder


def argv_of(name: str, *typed: str) -> list[str]:
    return recipe.words_of(recipe.read(name), name, typed)


# -- those that come along ---------------------------------------------------------------------------------


def test_there_is_one_of_each_kind() -> None:
    names = set(book.recipes())
    for model in ("mixtral_8x7b", "mixtral_8x7b_instruct", "mixtral_4x7b"):
        assert {f"{model}_{method}_{data}_e3" for method in ("lora", "qlora", "full")
                for data in ("oasst1", "alpaca", "alpaca_zh", "openai_json")} < names
    assert any(name.startswith("tiny_qlora_openai_json") for name in names)


@pytest.mark.parametrize("name", book.recipes())
def test_each_is_a_run_that_can_be(name: str, models: dict[str, Path]) -> None:
    """Its text is what it is; its flags are taken by both parsers; its layout fits its devices, memory included."""
    assert tomllib.loads(book.text(name)) == book.recipes()[name]
    assert all(len(line) <= 120 for line in book.text(name).splitlines()), "a line is too long to be read"
    model = {"t": "tiny", "4": "mixtral-4x7b"}.get(name.removeprefix("mixtral_")[0], "mixtral-8x7b")
    devices = book.devices(book.recipes()[name])
    raw, training = raw_data.split(argv_of(name, "--hf-checkpoint", str(models[model])))
    run = arguments.resolve([*training, "--is-instruction-dataset"], {"WORLD_SIZE": str(devices)})
    assert run.layout.min_world == devices and raw.pack and raw.input
    given = vars(raw) | vars(run.flags) | dict(run.engine.named)
    for values in book.recipes()[name].values():
        for key, value in values.items():
            read = given.get(f"--{key}", given.get(key.replace("-", "_")))
            assert key == "hf-checkpoint" or read in (value, [value]), key
    assert (run.adapter is not None) == ("lora_" in name) and (run.adapter and run.adapter.quantized) == (
        True if "qlora" in name else None if "full" in name else False)
    preflight.check_memory(preflight.shape_of(run), 80 * 10**9)


def test_the_numbers_are_those_of_published_recipes() -> None:
    found = recipe.read(QLORA)
    flat = {key: value for values in found.values() for key, value in values.items()}
    expected = {"lora-rank": 64, "lora-alpha": 16, "lora-dropout": 0.1, "lr": 2e-4, "adam-beta1": 0.9,
                "adam-beta2": 0.999, "weight-decay": 0.0, "clip-grad": 1.0, "lr-decay-style": "cosine",
                "train-epochs": 3, "seq-length": 2048, "pack": True, "global-batch-size": 16, "save-interval": 500,
                "save-total-limit": 2, "evaluation-interval": 500, "moe-aux-loss-coeff": 0.0, "qlora": True,
                "lr-warmup-fraction": 0.03, "handler-name": "oasst1"}
    assert {key: flat[key] for key in expected} == expected
    full = {key: value for values in recipe.read(QLORA.replace("qlora", "full")).values()
            for key, value in values.items()}
    assert (full["lr"], full["global-batch-size"]) == (2e-5, 256) and "lora-rank" not in full


def test_they_are_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert commands.main(["recipes", "list", "-p", "8x7b_qlora_alpaca"]) == 0
    assert capsys.readouterr().out.split()[::5] == ["mixtral_8x7b_qlora_alpaca_e3", "mixtral_8x7b_qlora_alpaca_zh_e3"]
    assert commands.main(["recipes", "copy", QLORA, str(tmp_path / "new")]) == 0
    copy = tmp_path / "new" / f"{QLORA}.toml"
    assert copy.read_text() == book.text(QLORA) and recipe.read(str(copy)) == book.recipes()[QLORA]
    assert commands.main(["recipes", "copy", QLORA, str(tmp_path / "new")]) == 1
    assert "is there already, and may have been changed" in capsys.readouterr().err
    assert commands.main(["recipes", "copy", QLORA.replace("oasst1", "oast1"), str(tmp_path)]) == 1
    assert f"is it {QLORA}?" in capsys.readouterr().err


# -- a file of one's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "words"), [
    ("[optimizer]\nweight-decy = 0.1", "[optimizer] weight-decy: there is no such flag; is it --weight-decay"),
    ("[model]\nlora_rank = 8", "[model] lora_rank: there is no such flag; is it --lora-rank"),
    ("[data]\nhandler-nam = 'auto'", "is it --handler-name"),
    ("[optimiser]\nlr = 0.1", "there is no section [optimiser]; is it [optimizer]?"),
    ("lr = 0.1", "there is no section [lr]"),
    ("[optimizer]\nlr = 0.1\n[runtime]\nlr = 0.2", "lr stands in [optimizer] and in [runtime]"),
    ("[model]\nqlora = 1", "[model] qlora = 1: expected true or false"),
    ("[model]\nlora-rank = true", "[model] lora-rank = True: expected a value"),
    ("[data]\ninput = []", "expected a number, a text, or a list of them"),
    ("[optimizer]\nlr = 'fast'", "argument --lr: invalid float value: 'fast'"),
    ("[optimizer]\nlr = ", "cannot be read as TOML"),
])
def test_what_is_no_recipe_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        argv_of(str(tmp_path / "my.toml"))
    assert words in str(error.value) and ("my.toml" in str(error.value) or "argument" in str(error.value))


def test_what_is_typed_wins() -> None:
    words = argv_of(QLORA, "--lr", "1e-4", "--train-iters", "9", "--data-path", "a", "b", "--lr-warmup-iters", "1")
    for flag, times in (("--lr", 1), ("--train-epochs", 0), ("--input", 0), ("--lr-warmup-fraction", 0), ("--qlora", 1),
                        ("--train-iters", 1), ("--weight-decay", 1)):
        assert words.count(flag) == times, flag
    with pytest.raises(ConfigError, match="--lora-rnak is neither a flag of training nor .*; is it --lora-rank"):
        argv_of(QLORA, "--lora-rnak", "8")


@pytest.mark.parametrize(("typed", "words"), [
    ("--deepspeed deepspeed_zero2", "zero1 and zero2 are --use-distributed-optimizer"),
    ("--deepspeed=deepspeed_zero3", "cut by --expert-model-parallel-size"), ("--work-dir x", "it is --save"),
    ("--launcher slurm", "the program sees who started it"), ("--resume iter_8500.pth", "--ckpt-step N")])
def test_flags_of_xtuner_are_refused_with_their_row(typed: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        argv_of(QLORA, *typed.split())
    assert words in str(error.value) and "docs/from_xtuner.md" in str(error.value)


def test_a_switch_says_no_only_where_it_can(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[model]\nqlora = false\nbf16 = true\n")
    assert argv_of(str(tmp_path / "my.toml")) == ["--bf16"]


# -- raw data ----------------------------------------------------------------------------------------------

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}  # of every start alike
ME = lease.this_process(STEP)


def wanted(place: Path, folder: Path, *more: str, length: int = 64) -> raw_data.InstructionOptions:
    raw, rest = raw_data.split(["--input", str(place / "raw.jsonl"), "--pack", "--workers", "1", *more])
    assert not rest
    return raw_data.placed(raw_data.options(raw, str(place / "hf"), length), folder)


def test_an_equal_data_set_is_used_again_and_another_is_not(place: Path, tmp_path: Path) -> None:
    first = wanted(place, tmp_path)
    raw_data.make(first, True, ME)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert len(InstructionFiles(first.output_prefix)) and raw_data.is_whole(first.output_prefix)
    again = wanted(place, tmp_path)
    raw_data.make(again, True, ME)
    assert again == first and files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    shutil.copytree(place, other)
    (other / "raw.jsonl").write_text((place / "raw.jsonl").read_text().replace("Yes", "No"))
    names = [wanted(place, tmp_path, length=65), wanted(place, tmp_path, "--prompt-type", "alpaca"),
             wanted(place, tmp_path, "--handler-name", "openai"), wanted(other, tmp_path), first]
    assert len({one.output_prefix for one in names}) == 5
    shutil.copy(place / "raw.jsonl", other / "raw.jsonl")
    assert wanted(other, tmp_path).output_prefix == first.output_prefix  # the same content elsewhere
    with (other / "hf" / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert wanted(other, tmp_path).output_prefix != first.output_prefix
    with pytest.raises(ConfigError):
        wanted(tmp_path / "nowhere", tmp_path)


def test_other_ranks_wait_for_the_first(place: Path, tmp_path: Path) -> None:
    data, found = wanted(place, tmp_path), []

    def wait() -> None:
        raw_data.make(data, False, ME)
        found.append(raw_data.is_whole(data.output_prefix))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    raw_data.make(data, True, ME)
    waiting.join(HANG)
    assert found == [True]


def failing(*options: object) -> None:
    raise DataError("raw.jsonl, line 3: no dialogue" if options else "it waits")


class Clock:
    """Seconds that pass while somebody sleeps; something may happen meanwhile."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now, self._meanwhile = 0.0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._meanwhile()


def test_what_ends_the_first_ends_the_others_of_its_start(place: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of no other start: of another step, of the job that Slurm has started again, of a torchrun whose starts
    have all one name. There a note counts that is new, or stays.
    """
    data, told = wanted(place, tmp_path), "raw.jsonl, line 3: no dialogue"

    def first(environ: dict[str, str]) -> None:
        with monkeypatch.context() as broken, pytest.raises(DataError, match="line 3"):
            broken.setattr(raw_data, "preprocess_instructions", failing)
            raw_data.make(data, True, lease.this_process(environ))

    def other(environ: dict[str, str], sleep: Callable[[], object], sentence: str) -> float:
        with monkeypatch.context() as watched, pytest.raises(DataError, match=f"^{sentence}$"):
            watched.setattr(raw_data, "time", clock := Clock(sleep))
            raw_data.make(data, False, lease.this_process(environ))
        return clock.now

    first(STEP)
    other({**STEP, "MASTER_ADDR": "10.0.0.1"}, pytest.fail, told)  # nodes call the first one by different names
    for environ in ({**STEP, "SLURM_STEP_ID": "4"}, {**STEP, "SLURM_RESTART_COUNT": "1"}, TORCHRUN, {}):
        other(environ, failing, "it waits")
    first(TORCHRUN)
    other(TORCHRUN, failing, "it waits")
    assert other(TORCHRUN, lambda: first(TORCHRUN), told) < 1
    assert other(TORCHRUN, lambda: None, told) > lease.STILL
    raw_data.make(data, True, ME)
    assert raw_data.is_whole(data.output_prefix) and not list(tmp_path.glob("*.failed"))


def test_a_task_of_srun_ends_when_the_first_fails(place: Path, tmp_path: Path) -> None:
    """Two processes as srun starts them on two nodes, of which it ends none when the other fails."""
    shutil.copytree(place, tmp_path / "place")
    with (tmp_path / "place" / "raw.jsonl").open("a") as file:
        file.write("no record\n")

    def task(rank: int) -> tuple[subprocess.Popen, Path]:
        (node := tmp_path / f"node{rank}").mkdir()
        given = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD"))}
        given |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank),
                  "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank), "SLURM_STEP_NODELIST": "node[0-1]",
                  "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "TMPDIR": str(node), "PYTHONPATH": str(ROOT)}
        words = ["finetune", "tiny_lora_openai_json_e20", "--hf-checkpoint", tmp_path / "place" / "hf", "--input",
                 tmp_path / "place" / "raw.jsonl", "--save", tmp_path / "save", "--seq-length", "64",
                 "--global-batch-size", "2"]
        with (node / "log").open("w") as log:
            return subprocess.Popen([sys.executable, "-m", "megatron_mixtral", *map(str, words)], env=given,
                                    stdout=log, stderr=log), node / "log"

    other, said = task(1)
    until(lambda: "waits for rank 0" in said.read_text() or other.poll() is not None)
    first, reason = task(0)
    assert (first.wait(HANG), other.wait(HANG)) == (1, 1)
    sentence = reason.read_text().splitlines()[-1].removeprefix("error: ")
    assert "raw.jsonl" in sentence and said.read_text().splitlines()[-1].endswith(sentence), said.read_text()


def test_a_data_set_without_its_report_is_made_again(place: Path, tmp_path: Path) -> None:
    """The report comes last; without it, a run was ended between."""
    data = wanted(place, tmp_path)
    raw_data.make(data, True, ME)
    [report] = (tmp_path / "reports").iterdir()
    report.unlink()
    assert not raw_data.is_whole(data.output_prefix)
    raw_data.make(data, True, ME)
    assert raw_data.is_whole(data.output_prefix) and report.is_file()


# -- the command -------------------------------------------------------------------------------------------


def test_a_dry_run_prints_commands_that_do_the_same(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """What it prints can be pasted: preprocessing so makes the data set under the name that finetune looks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRY_RUN", "1")
    argv = ["finetune", "tiny_lora_openai_json_e20", "--hf-checkpoint", str(place / "hf"), "--input",
            str(place / "raw.jsonl"), "--save", "saved dir", "--seq-length", "64"]
    assert commands.main(argv) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "a dry run makes nothing"
    first, note, second = (shlex.split(one, comments=True) for one in printed.replace("\\\n", " ").splitlines())
    assert not note and first[:2] == ["megatron-mixtral", "preprocess"] and second[:2] == ["megatron-mixtral",
                                                                                         "pretrain"]
    prefix = second[second.index("--data-path") + 1]
    assert first[first.index("--output-prefix") + 1] == prefix and prefix.startswith("saved dir/data/raw-")
    (tmp_path / "saved dir" / "data").mkdir(parents=True)
    assert commands.main(first[1:]) == 0
    assert raw_data.is_whole(prefix)
    run = arguments.resolve(second[2:], {})
    assert run.flags.is_instruction_dataset and run.engine.load == run.engine.save == "saved dir"
    assert commands.main([*argv[:5], "missing.jsonl", *argv[6:]]) == 0  # files need not be there
    assert "data/missing-KEY" in capsys.readouterr().out
    assert commands.main([*argv, "--context-parallel-size", "2"]) == 0  # samples are cut over devices: room for it
    printed = shlex.split(capsys.readouterr().out.replace("\\\n", " "), comments=True)
    assert printed[printed.index("--pad-to-multiple-of") + 1] == "4"
    assert printed[printed.index("--output-prefix") + 1] not in (prefix, "saved dir/data/raw-KEY")


@pytest.mark.parametrize(("words", "sentence"), [
    ("--data-path x --input y", "names raw data with input and a data set besides"),
    ("--train-epochs 0", "--train-epochs 0 trains nothing"),
    ("--handler-name alpca", "--handler-name alpca is not one of: none, auto"),
    ("--input nowhere.json", "nowhere.json"),
    ("--eval-limit 5", "--eval-limit needs --eval-tasks NAMES"),
    ("--tensor-model-parallel-size 3", "set --tensor-model-parallel-size to one of"),
    ("--context-parallel-size 2", "tiny_lora_openai_json_e20 asks it: to ask nothing, take evaluation-questions and"),
])
def test_what_cannot_be_is_a_sentence(words: str, sentence: str, place: Path, tmp_path: Path,
                                      capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is preprocessed, which may take an hour."""
    monkeypatch.chdir(tmp_path)
    assert commands.main(["finetune", "tiny_lora_openai_json_e20", "--hf-checkpoint", str(place / "hf"), "--input",
                          str(place / "raw.jsonl"), "--seq-length", "64", "--save", "s", *words.split()]) == 1
    assert sentence in capsys.readouterr().err and not list(tmp_path.rglob("*.idx"))


def test_a_recipe_without_a_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "my.toml").write_text("[settings]\nhf-checkpoint = 'x'\n")
    assert commands.main(["finetune", str(tmp_path / "my.toml")]) == 1
    assert "my.toml needs save = DIR in [settings]" in capsys.readouterr().err
