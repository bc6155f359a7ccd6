"""MMLU from folders: what is read, what is refused with its line, and what lm-eval makes of it."""

import csv
import re
from pathlib import Path

import pytest
import yaml
from helpers.mmlu import SUBJECTS, write_mmlu

from megatron_mixtral.errors import DataError
from megatron_mixtral.evaluation import read_mmlu
from megatron_mixtral.evaluation.mmlu import CATEGORY_OF, QUESTIONS, SHOTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_mmlu(tmp_path / "mmlu", SUBJECTS[:2])


def test_subjects_categories_and_prompts_are_lm_evals() -> None:
    import lm_eval

    shipped = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    found = {path.stem.removeprefix("mmlu_"): yaml.safe_load(path.read_text()) for path in shipped.glob("mmlu_*.yaml")}
    assert {name: f"mmlu_{category}_tasks" for name, category in CATEGORY_OF.items()} == {
        name: one["tag"] for name, one in found.items()}
    assert (len(CATEGORY_OF), QUESTIONS, SHOTS) == (57, 14042, 5)


def test_tasks_are_lm_evals_but_for_where_the_questions_come_from(folder) -> None:
    import lm_eval

    shipped = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    for name, task in read_mmlu(folder).tasks().items():
        theirs = yaml.safe_load((shipped / "_default_template_yaml").read_text()) | yaml.safe_load(
            (shipped / f"{name}.yaml").read_text())
        del theirs["dataset_path"], theirs["dataset_name"], theirs["tag"], theirs["include"]
        del task["custom_dataset"]
        assert task.pop("num_fewshot") == 5
        assert task == theirs


def test_the_examples_are_the_first_five_of_dev_and_the_letters_stand_for_their_choices(folder) -> None:
    from lm_eval.tasks import TaskManager

    def rows(split: str) -> list[list[str]]:
        with (folder / split / f"anatomy_{split}.csv").open(newline="") as stream:
            return list(csv.reader(stream))

    def asked(row: list[str]) -> str:
        return "\n".join([row[0], *(f"{letter}. {one}" for letter, one in zip("ABCD", row[1:5], strict=True)),
                          "Answer:"])

    [task] = TaskManager(include_defaults=False).load([read_mmlu(folder).tasks()["mmlu_anatomy"]])["tasks"].values()
    task.build_all_requests()
    examples = "".join(f"{asked(row)} {row[5]}\n\n" for row in rows("dev"))
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    expected = [(head + examples + asked(row), f" {letter}") for row in rows("test") for letter in "ABCD"]
    assert [one.args for one in task.instances] == expected
    assert [task.doc_to_target(doc) for doc in task.test_docs()] == ["ABCD".index(row[5]) for row in rows("test")]


def test_modellinks_prompt_and_its_search_for_a_letter(folder) -> None:
    """Its prompt: two spaces in the first line, no empty line but before the question, nothing stripped. Its search, as
    it is written there: two patterns from the beginning of the answer, an exception for none.
    """
    from lm_eval.tasks import TaskManager

    mmlu = read_mmlu(folder)
    tasks = TaskManager(include_defaults=False).load([mmlu.tasks(method="modellink")["mmlu_anatomy"]])["tasks"]
    [task] = tasks.values()
    task.build_all_requests()

    def asked(one) -> str:
        a, b, c, d = one.choices
        return f"{one.question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"

    head = "The following are multiple choice questions (with answers) about  anatomy.\n"
    examples = head + "\n".join(asked(one) + " " + "ABCD"[one.answer] for one in mmlu.subjects["anatomy"]["dev"])
    test = mmlu.subjects["anatomy"]["test"]
    assert [one.args[0] for one in task.instances] == [f"{examples}\n\n{asked(one)}" for one in test]
    assert [one.args[1] for one in task.instances] == [{"until": [], "max_gen_toks": 1, "do_sample": False}] * len(test)

    def theirs(answer: str) -> str:
        for pattern in (r".*(?P<answer>[A|B|C|D])\..*", r"(?P<answer>[A|B|C|D])"):
            try:
                return re.match(pattern, answer.lstrip()).group("answer")
            except AttributeError:
                continue
        return "[invalid]"

    answers = ["B", " B", "\n\nC", "B. a\nD. b", "The answer is C. Not D.", "(A)", "", "E", "|", "AB.", "x\nB.", "b",
               " A|. D", "D.", "Because", "It is A.", "A"]
    [one_filter] = [one for one in task._filters if one.name == "letter"]
    for number, (instance, answer) in enumerate(zip(task.instances * 5, answers, strict=False)):
        instance.resps = [answer]
        one_filter.apply([instance])
        assert instance.filtered_resps["letter"] == theirs(answer), (number, answer)
    assert {theirs(answer) for answer in answers} == {"A", "B", "C", "D", "|", "[invalid]"}


def test_all_forms_of_a_folder_hold_the_same(folder, tmp_path) -> None:
    from pyarrow import Table, parquet

    whole = read_mmlu(folder)
    assert read_mmlu(folder / "test") == whole and whole.questions == 8 and "\n" in str(
        whole.subjects["anatomy"]["test"][0].question)
    for name, splits in whole.subjects.items():
        (tmp_path / "hub" / name).mkdir(parents=True)
        for split, rows in splits.items():
            parquet.write_table(Table.from_pylist([one._asdict() | {"subject": name} for one in rows]),
                                tmp_path / "hub" / name / f"{split}-00000-of-00001.parquet")
    hub = read_mmlu(tmp_path / "hub")
    assert (hub.subjects, hub.digest()) == (whole.subjects, whole.digest())


def test_a_copy_of_another_system_holds_the_same(folder) -> None:
    """With a byte-order mark, and CRLF also inside of questions."""
    whole = read_mmlu(folder)
    for path in folder.rglob("*.csv"):
        text = path.read_bytes().replace(b"\r\n", b"\n")
        path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert read_mmlu(folder).digest() == whole.digest()


@pytest.mark.parametrize(("file", "text", "sentence"), [
    ("test/anatomy_test.csv", "q,a,b,c,d,A\nq,a,b,c,A\n", "anatomy_test.csv, line 2: 5 fields, expected 6"),
    ("test/anatomy_test.csv", "q,a,b,c,d,A\n\"q\nr\",a,b,c,d,E\n", "line 3: the answer is 'E', expected one of A"),
    ("test/anatomy_test.csv", "question,A,B,C,D,answer\n", "line 1: the answer is 'answer'"),
    ("test/anatomy_test.csv", "q,a,b,c,d,A\n ,a,b,c,d,A\n", "line 2: the question is empty"),
    ("test/anatomy_test.csv", "q,a,b,c,d,\"A\nq,a,b,c,d,A\n", "line 2: "),
    ("test/anatomy_test.csv", "", "anatomy_test.csv: no question"),
    ("dev/anatomy_dev.csv", "q,a,b,c,d,A\n", "anatomy_dev.csv: 1 examples, expected at least 5"),
    ("dev/anatomy_dev.csv", None, "anatomy_dev.csv cannot be read"),
    ("test/cooking_test.csv", "q,a,b,c,d,A\n", "cooking: not among MMLU's 57 subjects"),
])
def test_what_is_missing_or_damaged_is_named(folder, file, text, sentence) -> None:
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(DataError) as error:
        read_mmlu(folder)
    assert sentence in str(error.value)


def test_a_folder_of_something_else_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="holds no MMLU: expected test/SUBJECT_test.csv beside dev/"):
        read_mmlu(tmp_path)
