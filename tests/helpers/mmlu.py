"""A folder of the shape of MMLU's, with questions of random words, whose answers nobody knows."""

import csv
import random
from collections.abc import Sequence
from pathlib import Path

SUBJECTS = ("abstract_algebra", "anatomy", "astronomy", "econometrics", "global_facts", "marketing", "philosophy",
            "sociology", "virology", "world_religions")
WORDS = """time year people way day man thing woman life child world school state family student group country problem
    hand part place case week company system program question work government number night point home water""".split()


def write_mmlu(folder: Path, subjects: Sequence[str] = SUBJECTS, questions: int = 4, words: int = 6) -> Path:
    """The original's form. Questions have a comma, quotes and sometimes a line break, as the real ones do."""
    draw = random.Random(0)
    for split, count in (("dev", 5), ("test", questions), ("val", 1)):
        (folder / split).mkdir(parents=True)
        for subject in subjects:
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as stream:
                rows = csv.writer(stream)
                for number in range(count):
                    asked = ", ".join(draw.choices(WORDS, k=words)) + f'\n"{split} {number}"?'
                    rows.writerow([asked, *draw.sample(WORDS, 4), draw.choice("ABCD")])
    return folder
