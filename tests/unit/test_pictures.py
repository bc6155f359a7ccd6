"""The drawn pictures are those of their program, and the house in them is the package's."""

import re
import runpy
from pathlib import Path

import pytest
from helpers.house import PACKAGE

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs/figures"
DRAWN = runpy.run_path(str(FIGURES / "draw_house.py"))


@pytest.mark.parametrize("name", DRAWN["PICTURES"])
def test_a_picture_is_what_its_program_draws_and_is_shown(name):
    assert (FIGURES / name).read_text("utf-8") == DRAWN["PICTURES"][name](), "start python docs/figures/draw_house.py"
    assert any(f"](figures/{name})" in page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))


def test_every_room_is_drawn():
    rooms = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    drawn = {room for _, names, _ in DRAWN["levels"]() for room in names}
    assert rooms and rooms <= drawn
    words = set(re.findall(">([^<]+)</text>", DRAWN["PICTURES"]["house.svg"]()))
    assert drawn - words == {"megatron_mixtral/__main__.py"}
