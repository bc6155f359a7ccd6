"""A folder of the shape of MMLU's, with questions of random words, whose answers nobody knows."""

import csv
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

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


def shipped_questions(subject: str) -> list[dict[str, str]]:
    """MMLU's own questions for examples, as lm-eval's wheel has them: `question` with its choices, `target` with the
    letter of the right one at its end.
    """
    import lm_eval

    path = Path(lm_eval.__file__).parent / f"tasks/mmlu/flan_cot_fewshot/mmlu_{subject}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]


def write_shipped(folder: Path, subjects: Sequence[str], examples: int = 1) -> Path:
    """The same in the original's form: the first of them as examples, the others as questions."""
    for split, part in (("dev", slice(examples)), ("test", slice(examples, None))):
        (folder / split).mkdir(parents=True)
        for subject in subjects:
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as stream:
                for one in shipped_questions(subject)[part]:
                    question, *choices = re.split(r"\s*\([ABCD]\)\s*", one["question"])
                    letter = re.search(r"answer is \(([ABCD])\)", one["target"])[1]
                    csv.writer(stream).writerow([question.strip(), *choices, letter])
    return folder


def write_task(folder: Path) -> None:
    """A task of lm-eval's, `after`, whose eight questions are in a local file."""
    folder.mkdir()
    rows = [{"asked": f"{one} after", "choices": ["abc", "b", "cc"], "right": number % 3}
            for number, one in enumerate("abcdefgh")]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "after.yaml").write_text(yaml.safe_dump({
        "task": "after", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "num_fewshot": 0, "doc_to_text": "asked", "doc_to_choice": "choices", "doc_to_target": "right",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/rows.json"}, "cache_dir": f"{folder}/cache"}}))
