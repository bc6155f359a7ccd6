"""Draws the house and one training step: house.svg and step.svg, of docs/design.md and docs/training.md.

    python docs/figures/draw_house.py

The rooms and their levels are those of the block in docs/design.md; their files say which of them import the engine.
"""

import re
import sys
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
INK, QUIET, LINE = "#1b2733", "#51606e", "#6b7a89"
PLAIN, ENGINE, MOVED, KEPT = "#eef2f6", "#cfe3f7", "#fbe3c4", "#d9efd9"


class Picture:
    """Boxes, arrows and words on white, in pixels from the left upper corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'font-family="Helvetica, Arial, sans-serif" role="img"><title>{escape(title)}</title>',
            f'<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
            f'<path d="M0,0 L9,4 L0,8 z" fill="{LINE}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>']

    def words(self, x: float, y: float, text: str, size: int = 14, colour: str = INK, anchor: str = "start",
              bold: bool = False) -> None:
        weight = ' font-weight="bold"' if bold else ""
        place = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place}{weight}>{escape(text)}</text>")

    def box(self, x: float, y: float, width: float, height: float, title: str, *lines: str, fill: str = PLAIN) -> None:
        """A title in bold and lines below it, in the middle of the box."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" '
                          f'stroke="{LINE}"/>')
        first = y + height / 2 + 5 - 9 * len(lines)
        self.words(x + width / 2, first, title, 15, anchor="middle", bold=True)
        for number, line in enumerate(lines, 1):
            self.words(x + width / 2, first + 18 * number, line, 13, QUIET, "middle")

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.6"{dash} '
                          'marker-end="url(#tip)"/>')

    def text(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def levels() -> list[tuple[str, list[str], str]]:
    """(level, rooms, what they are) from the top, as docs/design.md lists them."""
    found = []
    for line in (ROOT / "docs/design.md").read_text("utf-8").splitlines():
        if match := re.fullmatch(r"    (L\d) +(.*)", line):
            names, _, what = match[2].partition("    ") if "    " in match[2] else (match[2], "", "")
            found.append((match[1], re.split(r" {2,}", names.strip()), what.strip()))
    return found


def knows_the_engine(room: str) -> bool:
    """Whether a file of the room imports megatron-core."""
    files = (ROOT / "megatron_mixtral" / room).rglob("*.py")
    return any(re.search(r"^\s*(from|import) megatron\.", file.read_text("utf-8"), re.M) for file in files)


def house() -> str:
    """A row for each level; what is above may import what is below."""
    rows, left, width, step = levels(), 60, 520, 56
    picture = Picture(960, step * len(rows) + 112, "The rooms of megatron_mixtral, by level")
    picture.words(left, 30, "Rooms import rooms of lower levels only", 17, bold=True)
    for number, (level, rooms, what) in enumerate(rows):
        y, each = 48 + step * number, (width - 10 * (len(rooms) - 1)) / len(rooms)
        picture.words(left - 12, y + 27, level, 14, QUIET, "end")
        for place, room in enumerate(rooms):
            name = room.removeprefix("megatron_mixtral/")
            picture.box(left + place * (each + 10), y, each, step - 12, name,
                        fill=ENGINE if knows_the_engine(room) else PLAIN)
        picture.words(left + width + 18, y + 27, what[:1].upper() + what[1:], 13, QUIET)
    below = 48 + step * len(rows) + 8
    for x, fill, what in ((left, ENGINE, "imports megatron-core, the engine"), (left + 280, PLAIN, "knows no engine")):
        picture.box(x, below, 26, 18, "", fill=fill)
        picture.words(x + 36, below + 14, what, 13)
    return picture.text()


def step() -> str:
    """From bytes on disk to new weights. Shapes are those of one rank without parallelism."""
    picture = Picture(1000, 800, "One training step of a Mixtral: what goes from where to where")
    picture.words(30, 32, "One training step", 17, bold=True)
    left, mid, right, wide = 30, 365, 700, 270
    picture.box(left, 70, wide, 64, "PREFIX.bin / .idx", "document ids on disk", "data/indexed", fill=KEPT)
    picture.box(left, 184, wide, 74, "Sample of s + 1 ids", "shuffled, blended, or a pack", "data/datasets")
    picture.box(left, 308, wide, 74, "Micro-batch", "ids, labels, loss mask [b, s]", "training/micro_batch.py")
    picture.box(left, 432, wide, 74, "Embedding", "[b, s] to [s, b, h], cut over TP", "first pipeline stage",
                fill=ENGINE)
    for y in (134, 258, 382):
        picture.arrow((left + wide / 2, y), (left + wide / 2, y + 50))
    picture.parts.append(f'<rect x="{mid - 14}" y="46" width="{wide + 28}" height="576" rx="10" fill="none" '
                         f'stroke="{LINE}" stroke-dasharray="6 5"/>')
    picture.words(mid, 68, "Each layer; PP cuts between layers", 13, QUIET)
    chain = [
        ("Norm, attention", "heads cut over TP, [s, b, h]", "model/attention.py", ENGINE),
        ("Norm, router", "softmax of k of 8 logits a token", "model/router.py", ENGINE),
        ("Tokens to their experts", "all-to-all over EP: [tokens x k, h]", "", MOVED),
        ("Experts", "w1, w3, SwiGLU, w2, cut over ETP", "model/experts.py", ENGINE),
        ("Back, weighted sum", "all-to-all over EP: [s, b, h]", "", MOVED),
    ]
    for number, (title, what, where, fill) in enumerate(chain):
        y = 84 + 108 * number
        picture.box(mid, y, wide, 74, title, *filter(None, (what, where)), fill=fill)
        if number:
            picture.arrow((mid + wide / 2, y - 34), (mid + wide / 2, y))
    picture.arrow((left + wide, 469), (mid - 32, 469), (mid - 32, 121), (mid, 121))
    picture.box(right, 60, wide, 74, "Norm, output layer", "logits, vocabulary cut over TP", "last pipeline stage",
                fill=ENGINE)
    picture.arrow((mid + wide, 553), (right - 32, 553), (right - 32, 97), (right, 97))
    picture.box(right, 184, wide, 74, "Loss", "cross entropy in chunks of tokens", "model/cross_entropy.py")
    picture.box(right, 308, wide, 74, "Backward", "the same way back: gradients in fp32", "added up over micro-batches",
                fill=ENGINE)
    picture.box(right, 432, wide, 74, "Sum over replicas", "reduce-scatter over DP; experts over", "their own replicas",
                fill=MOVED)
    picture.box(right, 556, wide, 74, "Clip, Adam", "each rank its share of the state", "(distributed optimizer)",
                fill=ENGINE)
    picture.box(right, 680, wide, 74, "New weights", "all-gather over DP, in bf16", fill=MOVED)
    for y in (134, 258, 382, 506, 630):
        picture.arrow((right + wide / 2, y), (right + wide / 2, y + 50))
    picture.box(mid, 680, wide, 74, "metrics.jsonl, checkpoints", "loss, load of experts, throughput",
                "training/metrics", fill=KEPT)
    picture.arrow((right, 717), (mid + wide, 717))
    picture.arrow((mid, 717), (left + wide / 2, 717), (left + wide / 2, 506), dashed=True)
    picture.words(left + wide / 2 + 12, 640, "the next step", 13, QUIET)
    picture.words(left, 56, "b rows of s ids, h hidden size, k experts a token", 13, QUIET)
    for number, (fill, what) in enumerate(((PLAIN, "ours"), (ENGINE, "the engine's, with our parts"),
                                           (MOVED, "between devices"), (KEPT, "on disk"))):
        picture.box(left + number * 235, 774, 26, 16, "", fill=fill)
        picture.words(left + number * 235 + 36, 787, what, 13)
    return picture.text()


PICTURES = {"house.svg": house, "step.svg": step}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
    sys.exit(0)
