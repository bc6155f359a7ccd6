"""Planted faults: small edits that make the library silently wrong, each with the test that must then fail.

    make faults                            all of them; not an everyday check, it takes minutes
    make faults FAULTS='window training/'  those whose ROOM/NAME contains one of these words
    python tests/faults/run.py --jobs 4 [WORD ...]

ROOM.toml lists the faults of a room: `name`, `file`, the edit (`old` becomes `new`, or `append` is added at the end),
the `test` that must fail, and `why`: what a user would not notice. Each is planted in a copy of the tree of its own.
Before, the named tests must pass without any fault. The exit status is 1 where a fault survives, its edit no longer
applies, or its test fails for another reason (an import, a set-up, a name that does not exist: the edit is broken).
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "work_quickstart")  # of the copies
SECONDS = 600  # for the test of a fault
# Imported once, for all tests: half of their time. Nothing of the tree.
PRELOADED = ["pytest", "torch", "megatron.core", "megatron.training", "transformers.models.mixtral.modeling_mixtral"]
CAUGHT = "caught"
# Errors that an edit makes which is no longer valid code, rather than wrong code.
_NOT_VALID = re.compile(r"^(?:E\s+)?(?:\w+\.)*((?:Import|ModuleNotFound|Syntax|Indentation|Name|UnboundLocal|Attribute)"
                        r"Error\b.*)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: the text `old`, which occurs once in `file`, becomes `new`; or `append` is added to the file."""

    room: str
    name: str
    file: str
    test: str
    why: str
    old: str | None = None
    new: str | None = None
    append: str | None = None

    def __str__(self) -> str:
        return f"{self.room}/{self.name}"

    def planted(self, text: str) -> str:
        """The file with the fault. Raises ValueError where the edit does not apply."""
        if self.append is not None:
            return f"{text}\n\n{self.append}"
        if self.old is None or self.new is None or (found := text.count(self.old)) == 0:
            raise ValueError(f"{self.file} does not have the text to be replaced: {self.old}")
        if found > 1:
            raise ValueError(f"{self.file} has the text to be replaced {found} times: {self.old}")
        return text.replace(self.old, self.new)


def read(folder: Path = HERE) -> list[Fault]:
    """Every fault of a folder's tables, by room."""
    return [Fault(room=path.stem, **entry) for path in sorted(folder.glob("*.toml"))
            for entry in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]]


def unfit(fault: Fault, root: Path = ROOT) -> str | None:
    """Why a fault cannot be planted in a tree, if it cannot."""
    path, _, name = fault.test.partition("::")
    try:
        fault.planted((root / fault.file).read_text(encoding="utf-8"))
        if f"def {name.partition('[')[0]}(" not in (root / path).read_text(encoding="utf-8"):
            return f"its test does not exist: {fault.test}"
    except (OSError, ValueError) as error:
        return f"does not apply any more: {error}"
    return None


@dataclass
class Results:
    """What a run of pytest found: its exit status and the end of its output, and of each test ("passed", "failure",
    "error" or "skipped", the traceback).
    """

    status: int
    output: str
    tests: dict[str, tuple[str, str]]


def run_tests(tree: Path, tests: Sequence[str], seconds: float, *flags: str) -> Results:
    """Run some tests of a tree, with its package. Raises TimeoutError after so many seconds."""
    temporary, log = tree.with_name(f"{tree.name}.tmp"), tree.with_name(f"{tree.name}.log")
    words = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={tree}.xml",
             f"--basetemp={temporary}", *flags, *tests]
    process = multiprocessing.get_context("forkserver").Process(target=_pytest, args=(str(tree), str(log), words))
    process.start()
    process.join(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with what its tests have left
    late = process.exitcode is None
    process.join()
    shutil.rmtree(temporary, ignore_errors=True)
    if late:
        raise TimeoutError(f"no end after {seconds:.0f} s")
    found, report = {}, Path(f"{tree}.xml")
    for case in xml.parse(report).iter("testcase") if report.exists() else ():
        how = [(part.tag, part.text or "") for part in case if part.tag in ("failure", "error", "skipped")]
        found[f"{case.get('file')}::{case.get('name')}"] = how[0] if how else ("passed", "")
    return Results(process.exitcode, log.read_text(encoding="utf-8", errors="replace")[-2000:], found)


def _pytest(tree: str, log: str, words: list[str]) -> None:
    """The body of a process: it is as if pytest had been started in the tree."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    own = [tree, str(Path(tree, "tests"))]
    sys.path[:] = own + [path for path in sys.path if not Path(path).is_relative_to(ROOT) or "site-packages" in path]
    os.environ.update(PYTHONPATH=os.pathsep.join(own), OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    os.chdir(tree)
    import pytest

    sys.exit(int(pytest.main(words)))


def verdict(fault: Fault, tree: Path) -> str:
    """Plant a fault in a tree and run its test: `CAUGHT`, or what is wrong."""
    path = tree / fault.file
    path.write_text(fault.planted(path.read_text(encoding="utf-8")), encoding="utf-8")
    found = run_tests(tree, [fault.test], SECONDS, "-x")
    failed = {name: how for name, how in found.tests.items() if how[0] in ("failure", "error")}
    if found.status == 0:
        return f"SURVIVED: {fault.test} passes"
    if found.status != 1 or len(failed) != 1:
        return f"its test cannot be run, pytest ends with {found.status}: {found.output}"
    [(name, (kind, text))] = failed.items()
    if name.partition("[")[0] != fault.test.partition("[")[0] or kind != "failure":
        return f"not its test fails but what is before it, {name}: {text[-1000:]}"
    broken = _NOT_VALID.search(text)
    return f"the edit is no valid code any more: {broken[1]}" if broken else CAUGHT


def check_all(faults: Sequence[Fault], root: Path = ROOT, jobs: int = 1,
              say: Callable[..., None] = print) -> dict[str, str]:
    """The verdict on each fault. Copies of the tree `root` are made and removed."""
    verdicts = {str(fault): why for fault in faults if (why := unfit(fault, root)) is not None}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, ThreadPoolExecutor(jobs) as pool:
        root = _copy(root, Path(folder) / "as it is")  # which may be worked on meanwhile
        due = [fault for fault in faults if str(fault) not in verdicts]
        wrong = _without_faults({fault.test for fault in due}, root, Path(folder), pool, jobs)
        verdicts |= {str(fault): wrong[fault.test] for fault in due if fault.test in wrong}

        def one(number: int, fault: Fault) -> None:
            started = time.monotonic()
            tree = _copy(root, Path(folder) / str(number))
            try:
                verdicts[str(fault)] = verdict(fault, tree)
            except TimeoutError as error:
                verdicts[str(fault)] = str(error)
            shutil.rmtree(tree)
            say(f"{time.monotonic() - started:6.1f} s  {fault}: {verdicts[str(fault)]}", flush=True)

        due = [fault for fault in due if str(fault) not in verdicts]
        list(pool.map(one, range(len(due)), due))
    return verdicts


def _copy(root: Path, target: Path) -> Path:
    return Path(shutil.copytree(root, target, ignore=LEFT_OUT))


def _without_faults(tests: Iterable[str], root: Path, folder: Path, pool: ThreadPoolExecutor,
                    jobs: int) -> dict[str, str]:
    """Of the tests that do not pass as the tree is: why."""
    by_file: dict[str, list[str]] = {}
    for test in sorted(tests):
        by_file.setdefault(test.partition("::")[0], []).append(test)
    shares = [sum(list(by_file.values())[number::jobs], []) for number in range(jobs)]

    def one(name: str, share: list[str]) -> dict[str, str]:
        try:
            found = run_tests(_copy(root, folder / name), share, SECONDS * len(share))
        except TimeoutError as error:
            return dict.fromkeys(share, f"without the fault: {error}")
        if found.status == 4 and len(share) > 1:  # pytest does not know one of them, and runs none
            apart = [one(f"{name}-{number}", [test]) for number, test in enumerate(share)]
            return {test: why for wrong in apart for test, why in wrong.items()}
        wrong = {}
        for test in share:
            own = {how: text for name, (how, text) in found.tests.items()
                   if name == test or name.startswith(f"{test}[")}
            failed = own.get("failure", own.get("error"))
            if not own:
                wrong[test] = f"{test} cannot be run, pytest ends with {found.status}: {found.output}"
            elif failed is not None:
                wrong[test] = f"{test} fails without the fault too: {failed[-1000:]}"
            elif "passed" not in own:
                wrong[test] = f"{test} is skipped on this machine"
        return wrong

    found = pool.map(one, [f"whole{number}" for number in range(jobs)], filter(None, shares))
    return {test: why for share in found for test, why in share.items()}


def main(argv: Sequence[str]) -> int:
    """Check the faults that are asked for; 0 where each is caught."""
    parser = argparse.ArgumentParser(description="Plant faults and see the tests fail.")
    parser.add_argument("words", nargs="*", help="of ROOM/NAME of the faults (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time (default: one a core)")
    given = parser.parse_args(argv)
    faults = [fault for fault in read() if not given.words or any(word in str(fault) for word in given.words)]
    started = time.monotonic()
    os.environ |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}  # of the engine about itself
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    verdicts = check_all(faults, jobs=given.jobs)
    missed = {name: found for name, found in verdicts.items() if found != CAUGHT}
    print(f"{len(faults) - len(missed)} of {len(faults)} faults caught in {time.monotonic() - started:.0f} s")
    for name, found in sorted(missed.items()):
        print(f"  {name}: {found}")
    return 1 if missed or not faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
