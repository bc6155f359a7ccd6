"""`megatron_mixtral/__main__.py`: the table of commands, and how a command ends."""

import ast
import importlib
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_mixtral
from megatron_mixtral import __main__ as commands
from megatron_mixtral.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_is_offered_by_a_door(name):
    room, function, line = commands.COMMANDS[name]
    assert callable(operator.attrgetter(function)(importlib.import_module(f"megatron_mixtral.{room}")))
    assert line and len(line) < 80


def test_the_list_of_commands_needs_no_package():
    """And so it comes at once: only the standard library is imported."""
    code = ("import sys; from megatron_mixtral.__main__ import main; assert main([]) == 0; "
            "print([name for name in ('torch', 'numpy', 'megatron', 'argparse') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"\n  {name} " in done.stdout for name in commands.COMMANDS)


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    assert commands.main(["pretrian"]) == 2
    assert "there is no command 'pretrian'; the commands are preprocess, " in capsys.readouterr().err
    assert commands.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-mixtral {megatron_mixtral.__version__}\n"


def test_every_help_comes_at_once_and_a_misspelt_flag_names_its_neighbour():
    """All of them in one process: less than a second of the processor's time each, and no package that takes longer."""
    code = """
import sys, time
from megatron_mixtral import __main__ as commands
for name in commands.COMMANDS:
    try:
        began = time.process_time()
        code = commands.run(name, ["--help"])
    except SystemExit as end:
        code = end.code
    print("status", name, code or 0, time.process_time() - began < 1)
    try:
        commands.run(name, ["--a-flag-that-nobody-has"])
    except SystemExit:
        pass
print([name for name in ("torch", "megatron", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"(?m)^status .*$", done.stdout) == [f"status {name} 0 True" for name in commands.COMMANDS]
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr.count("--a-flag-that-nobody-has") >= len(commands.COMMANDS)
    assert done.stdout.count("of the engine: --load DIR") == 2 and "--help-engine" in done.stdout


@pytest.mark.parametrize(("words", "near"), [
    ("preprocess --inptu x", "there is no --inptu; is it --input?"),
    ("merge --output_prefx x", "is it --output-prefix?"),
    ("convert --load-dri x --loader mixtral_hf --save-dir y --load-dir z", "is it --load-dir"),
    ("plan --device-mem 80 --model tiny --devicse 8", "or --devices or"), ("watch --paeg run", "is it --page?"),
])
def test_a_misspelt_flag_names_its_neighbour(words, near, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(words.split())
    assert end.value.code == 2 and near in capsys.readouterr().err


@pytest.fixture
def ending(monkeypatch):
    """Have a command end with an error: `ending(error, "pretrain")`."""
    def prepare(error: BaseException, name: str = "pretrain") -> None:
        room, function, _ = commands.COMMANDS[name]

        def raises(argv):
            raise error

        getattr(importlib.import_module(f"megatron_mixtral.{room}"), function.split(".")[0])  # imports what is patched
        monkeypatch.setattr(f"megatron_mixtral.{room}.{function}", raises)

    return prepare


def test_an_error_of_the_user_is_a_sentence(ending, capsys):
    ending(ConfigError("--x 3 must be 2"))
    assert commands.run("pretrain", []) == 1
    assert capsys.readouterr().err == "error: --x 3 must be 2\n"


def test_the_machine_s_errors_are_sentences_except_in_training(ending, capsys):
    ending(OSError(28, "No space left on device"), "convert")
    assert commands.run("convert", []) == 1
    assert "No space left on device" in capsys.readouterr().err
    ending(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        commands.run("pretrain", [])


def test_an_interrupted_command_says_so(ending, capsys):
    ending(KeyboardInterrupt(), "convert")
    assert commands.run("convert", []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_has_enough_ends_a_command_without_a_word():
    """As `megatron-mixtral recipes list | head` does."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([sys.executable, "-m", "megatron_mixtral", "recipes", "list"], cwd=ROOT, stdout=theirs,
                          stderr=subprocess.PIPE, text=True, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, "")


def test_preprocessing_has_one_thread_before_numpy_is_there():
    """`OPENBLAS_NUM_THREADS` counts when numpy is imported; a process with more threads cannot fork its workers."""
    code = ("import os, sys; from megatron_mixtral.__main__ import main; assert 'numpy' not in sys.modules\n"
            "try: main(['preprocess', '--help'])\nexcept SystemExit: pass\n"
            "import numpy; print(os.environ['OPENBLAS_NUM_THREADS'], len(os.listdir('/proc/self/task')))")
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 1"


@pytest.mark.parametrize("folder", ["tools", "tools/checkpoint", "benchmarks", "benchmarks/gpu"])
def test_a_clone_that_is_not_installed_is_found_from_anywhere(folder, tmp_path):
    code = f"import sys; sys.path[0] = {str(ROOT / folder)!r}; import _clone, megatron_mixtral as m; print(m.__file__)"
    done = subprocess.run([sys.executable, "-E", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          check=True)
    assert Path(done.stdout.strip()) == ROOT / "megatron_mixtral" / "__init__.py"


def test_every_command_has_a_program_in_tools():
    programs = [ast.parse(path.read_text()) for path in (ROOT / "tools").rglob("*.py")]
    run = [node.args[0].value for program in programs for node in ast.walk(program)
           if isinstance(node, ast.Call) and ast.unparse(node.func) == "_clone.run"]
    assert sorted(run) == sorted(commands.COMMANDS)
