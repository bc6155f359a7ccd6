"""The tables of planted faults fit the tree, and their runner tells a caught fault from everything else.

The faults themselves are planted by `make faults`, not here.
"""

import ast
from pathlib import Path

from faults import run

ROOT = Path(__file__).resolve().parents[2]


def test_every_fault_applies_and_its_test_exists() -> None:
    faults = run.read()
    assert len(faults) > 100 and len({str(fault) for fault in faults}) == len(faults)
    assert {str(fault): why for fault in faults if (why := run.unfit(fault)) is not None} == {}
    for fault in faults:
        text = (ROOT / fault.file).read_text(encoding="utf-8")
        assert fault.planted(text) != text and ast.parse(fault.planted(text)) and fault.why, fault


def test_every_room_has_faults() -> None:
    rooms = {path.parent.name for path in (ROOT / "megatron_mixtral").glob("*/__init__.py")}
    assert {fault.room for fault in run.read()} >= rooms


TREE = {
    "room/sums.py": "def total(numbers):\n    return sum(numbers)\n",
    "tests/test_sums.py": """import pytest

from room.sums import total


@pytest.fixture
def three():
    return total([1, 2])


@pytest.mark.parametrize("more", [[], [3]])
def test_total(more):
    assert total([1, 2, *more]) == 3 + sum(more)


def test_blind():
    assert total([]) == 0


def test_of_three(three):
    assert three == 3


def test_wrong():
    assert total([1]) == 2


def test_left_out():
    pytest.skip("not here")
""",
}
VERDICTS = {  # a line in the place of `return sum(numbers)`, the test -> the verdict
    "caught": ("return sum(numbers[1:])", "test_total", "caught"),
    "survives": ("return sum(numbers[1:])", "test_blind", "SURVIVED: tests/test_sums.py::test_blind passes"),
    "no such name": ("return summe(numbers)", "test_total", "no valid code any more: NameError"),
    "in the set-up": ("assert not numbers", "test_of_three", "what is before it, tests/test_sums.py::test_of_three"),
    "wrong anyway": ("return sum(numbers[1:])", "test_wrong", "fails without the fault too"),
    "skipped": ("return sum(numbers[1:])", "test_left_out", "is skipped on this machine"),
    "no test": ("return sum(numbers[1:])", "test_nowhere", "its test does not exist: tests/test_sums.py::test_nowhere"),
}


def fault(name: str, test: str = "test_total", **edit: str) -> run.Fault:
    return run.Fault(room="room", name=name, file="room/sums.py", test=f"tests/test_sums.py::{test}", why="-", **edit)


def test_a_fault_is_caught_by_its_own_test_alone(tmp_path: Path) -> None:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    faults = [fault(name, test, old="return sum(numbers)", new=line) for name, (line, test, _) in VERDICTS.items()]
    faults += [fault("gone", old="return 0", new="return 1"), fault("twice", old="numbers", new="n")]
    found = run.check_all(faults, tmp_path, jobs=2, say=lambda *line, **how: None)
    for name, (_, _, expected) in VERDICTS.items():
        assert expected in found[f"room/{name}"], name
    assert found["room/gone"].endswith("room/sums.py does not have the text to be replaced: return 0")
    assert found["room/twice"].endswith("room/sums.py has the text to be replaced 2 times: numbers")
    assert (tmp_path / "room/sums.py").read_text() == TREE["room/sums.py"], "faults are planted in copies"


def test_an_edit_replaces_or_adds() -> None:
    assert fault("replaced", old="(numbers)", new="([])").planted("sum(numbers)\n") == "sum([])\n"
    assert fault("added", append="total = 7\n").planted("total = 1\n") == "total = 1\n\n\ntotal = 7\n"
