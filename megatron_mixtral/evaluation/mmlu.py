"""MMLU (Hendrycks et al., arXiv 2009.03300) from a folder: 57 subjects as lm-eval's tasks, without a network.

A folder is the original one (`dev/SUBJECT_dev.csv`, `test/SUBJECT_test.csv`: question, four choices, a letter, without
a header), its `test/`, beside which `dev/` is found, or the hub's (`SUBJECT/dev-*.parquet`, `SUBJECT/test-*.parquet`:
question, choices, answer as a number). The prompt is lm-eval's: five examples from dev, then the question, of which the
letters' log-probabilities are compared. Or (`modellink`) it is that of the published recipe's program, whose one new
token is searched for a letter.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mixtral.errors import DataError

LETTERS = "ABCD"
QUESTIONS = 14042  # of the whole test set
SHOTS = 5
METHODS = ("log-likelihood", "modellink")
CATEGORIES = {
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
}
CATEGORY_OF = {name: category for category, names in CATEGORIES.items() for name in names.split()}


class Question(NamedTuple):
    """One question; `answer` is the place of the right one of its four choices."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Mmlu:
    """What a folder holds: a subject's questions, by split."""

    folder: Path
    subjects: Mapping[str, Mapping[str, Sequence[Question]]]

    @property
    def questions(self) -> int:
        """How many there are to answer."""
        return sum(len(splits["test"]) for splits in self.subjects.values())

    def digest(self) -> str:
        """sha256 of all questions and examples."""
        return hashlib.sha256(json.dumps(self.subjects, ensure_ascii=False, sort_keys=True).encode()).hexdigest()

    def tasks(self, shots: int = SHOTS, method: str = METHODS[0]) -> dict[str, dict[str, Any]]:
        """Name -> task of lm-eval, of each subject in alphabetical order. `method` is one of `METHODS`."""
        task = _modellink if method == "modellink" else _task
        return {f"mmlu_{name}": {"task": f"mmlu_{name}", "task_alias": name, "test_split": "test",
                                 "metadata": {"version": 1.0}} | task(name.replace("_", " "), splits, shots)
                for name, splits in sorted(self.subjects.items())}


def _task(title: str, splits: Mapping[str, Sequence[Question]], shots: int) -> dict[str, Any]:
    def dataset(**metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {split: Dataset.from_list([one._asdict() for one in rows]) for split, rows in splits.items()}

    return {
        "custom_dataset": dataset, "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "output_type": "multiple_choice", "doc_to_choice": list(LETTERS), "doc_to_target": "answer",
        "description": f"The following are multiple choice questions (with answers) about {title}.\n\n",
        "doc_to_text": "\n".join(["{{question.strip()}}", *(f"{letter}. {{{{choices[{place}]}}}}"
                                                             for place, letter in enumerate(LETTERS)), "Answer:"]),
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _modellink(title: str, splits: Mapping[str, Sequence[Question]], shots: int) -> dict[str, Any]:
    """As ModelLink's `tasks/evaluation` asks: the examples are a text of their own, with two spaces in its first line
    and no empty ones, and an answer is the letter before a full stop, else the first letter. Where there is none, which
    is an exception there that is passed over, the question counts as wrong.
    """
    head = f"The following are multiple choice questions (with answers) about  {title}."
    examples = "\n".join([head, *(f"{_asked(one)} {LETTERS[one.answer]}" for one in splits["dev"][:shots])])

    def dataset(**metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list([{"prompt": f"{examples}\n\n{_asked(one)}", "letter": LETTERS[one.answer]}
                                           for one in splits["test"]])}

    letter = {"function": "regex", "regex_pattern": r"\A\s*(?:.*([A-D|])\.|([A-D|]))"}  # | is in its brackets, too
    return {
        "custom_dataset": dataset, "num_fewshot": 0, "output_type": "generate_until",
        "doc_to_text": "prompt", "doc_to_target": "letter",
        "generation_kwargs": {"until": [], "max_gen_toks": 1, "do_sample": False},
        "filter_list": [{"name": "letter", "filter": [letter, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _asked(one: Question) -> str:
    choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, one.choices, strict=True))
    return "\n".join([one.question, *choices, "Answer:"])


def read_mmlu(path: str | Path, shots: int = SHOTS) -> Mmlu:
    """Read and check all of it. `DataError`, with file and line, for what is missing or damaged."""
    path = Path(path)
    root = path.parent if path.name == "test" and any(path.glob("*_test.csv")) else path
    files: dict[str, dict[str, Path]] = {}
    read: Callable[[Path], Iterator[Question]] = _read_csv
    for found in sorted((root / "test").glob("*_test.csv")):
        name = found.name.removesuffix("_test.csv")
        files[name] = {"test": found, "dev": root / "dev" / f"{name}_dev.csv"}
    if not files:
        read = _read_parquet
        for found in sorted(root.glob("*/test-*.parquet")):
            dev = sorted(found.parent.glob("dev-*.parquet")) or [found.parent / "dev-00000-of-00001.parquet"]
            files[found.parent.name] = {"test": found, "dev": dev[0]}
    if not files:
        raise DataError(f"{path} holds no MMLU: expected test/SUBJECT_test.csv beside dev/SUBJECT_dev.csv, or "
                        "SUBJECT/test-*.parquet beside SUBJECT/dev-*.parquet")
    if unknown := sorted(files.keys() - CATEGORY_OF.keys()):
        raise DataError(f"{root}: {', '.join(unknown)}: not among MMLU's {len(CATEGORY_OF)} subjects; move them away")
    subjects = {name: {split: tuple(read(file)) for split, file in splits.items()} for name, splits in files.items()}
    for name, splits in subjects.items():
        if len(splits["dev"]) < shots:
            raise DataError(f"{files[name]['dev']}: {len(splits['dev'])} examples, expected at least {shots}, which "
                            "stand before each question (--num-fewshot)")
        if not splits["test"]:
            raise DataError(f"{files[name]['test']}: no question")
    return Mmlu(root, subjects)


def _read_csv(path: Path) -> Iterator[Question]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if text.count("\n") == text.count("\r\n"):
            # Another system's copy: a line break inside of a question was converted too, and would change the prompt.
            text = text.replace("\r\n", "\n")
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(LETTERS) + 2:
                raise DataError(f"{where}: {len(row)} fields, expected {len(LETTERS) + 2}: a question, four choices "
                                "and the letter of the right one")
            if row[-1] not in list(LETTERS):
                raise DataError(f"{where}: the answer is {row[-1]!r}, expected one of {', '.join(LETTERS)}")
            if not row[0].strip():
                raise DataError(f"{where}: the question is empty")
            yield Question(row[0], tuple(row[1:-1]), LETTERS.index(row[-1]))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}") from error


def _read_parquet(path: Path) -> Iterator[Question]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path}: parquet needs pyarrow: pip install 'megatron-mixtral[formats]'") from error
    try:
        rows = parquet.read_table(path, columns=list(Question._fields)).to_pylist()
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, row in enumerate(rows, 1):
        question, choices, answer = (row.get(name) for name in Question._fields)
        if not question or not isinstance(choices, list) or len(choices) != len(LETTERS) or answer not in range(4):
            raise DataError(f"{path}, row {number}: expected a question, a list of four choices and an answer of 0..3")
        yield Question(question, tuple(choices), answer)
