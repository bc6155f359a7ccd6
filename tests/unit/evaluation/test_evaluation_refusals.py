"""What cannot be evaluated is refused in one sentence, before a model is read, and nothing is left half-written."""

import json
from pathlib import Path

import pytest
from helpers.mmlu import write_mmlu, write_task

from megatron_mixtral import __main__ as commands
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.evaluation import check_names, report

PART = {"depends_on": {"limit": 3}, "lm_eval": {}, "counts": {}, "prompts_sha256": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("refusals")
    write_mmlu(found / "mmlu", ["anatomy"])
    write_task(found / "tasks")
    (found / "file").write_text("")
    (found / "done" / "parts").mkdir(parents=True)
    (found / "done" / "parts" / "mmlu_anatomy.json").write_text(json.dumps(PART))
    for name, text in {"cut": '{"results": {"a"', "list": "[1]", "rows": '{"results": [1]}',
                       "row": '{"results": {"a": 1}}', "empty": "{}", "words": '{"results": {"a": {"alias": "b"}}}',
                       "perplexity": '{"results": {"a": {"word_perplexity,none": 9.5}}}',
                       "right": '{"results": {"a": {"acc,none": 0.5}}}'}.items():
        (found / f"{name}.json").write_text(text)
    return found


@pytest.mark.parametrize(("flags", "sentence"), [
    ("--limit 0", "a limit of at least 1"),
    ("--tasks ,", "expected a name at least"),
    ("--reference absent.json", "absent.json does not exist"),
    ("--reference cut.json", "cut.json cannot be read as JSON"),
    ("--reference list.json", "list.json: expected a JSON object, found list"),
    ("--reference rows.json", "rows.json holds no figure: expected results.json of an evaluation, in lm-eval's form"),
    ("--reference row.json", "row.json holds no figure"),
    ("--reference empty.json", "empty.json holds no figure"),
    ("--reference words.json", "words.json holds no figure"),
    ("--include-path absent", "--include-path absent is no folder"),
    ("--output done", "done/parts holds 1 finished tasks: go on with --resume, or give another --output"),
    ("--output file/out", "--output: nothing can be written in file/out (Not a directory)"),
    ("--output /proc/out", "--output: nothing can be written in /proc/out"),
    ("--tasks mmlu,aftr --include-path tasks", "there is no task 'aftr' among lm-eval's and those of tasks; is it "),
    ("--tasks hellasway", "there is no task 'hellasway' among lm-eval's; is it hellaswag"),
])
def test_an_evaluation_is_refused(flags, sentence, folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RANK", raising=False)
    before = sorted(folder.rglob("*"))
    words = flags.split() if "--tasks hell" in flags else ["--data-path", "mmlu", *flags.split()]
    assert commands.run("evaluate", ["--load", "absent", "--output", "out", *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("words", "sentence"), [
    ("absent.json", "absent.json does not exist"), (".", "results.json does not exist"),
    ("cut.json", "cut.json cannot be read as JSON"), ("rows.json", "rows.json holds no figure"),
    ("row.json", "row.json holds no figure"), ("perplexity.json", "perplexity.json holds no figure"),
    ("right.json --reference list.json", "list.json: expected a JSON object"),
    ("right.json --output picture.xyz", "--output picture.xyz: expected a name that ends in one of "),
    ("right.json --output picture", "--output picture: expected a name that ends in one of "),
    ("right.json --output file/a.png", "file"),
])
def test_a_picture_is_refused(words, sentence, folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert commands.run("plot-evaluation", words.split()) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda part: part | {"depends_on": {"limit": 4}}, "was measured otherwise: limit: 4 then, 3 now; give another"),
    (lambda part: part | {"depends_on": {"limit": 3, "checkpoint_fingerprint": "a"}}, "fingerprint: 'a' then"),
    (lambda part: {"limit": 3}, "mmlu_anatomy.json is no finished task of an evaluation, it has no counts: remove it"),
    (lambda part: [], "expected a JSON object, found list"),
])
def test_parts_of_something_else_are_refused(change, sentence, tmp_path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mmlu_anatomy.json").write_text(json.dumps(PART))
    assert report.finished(tmp_path, {"limit": 3}, resume=True) == {"mmlu_anatomy": PART}
    (tmp_path / "parts" / "mmlu_anatomy.json").write_text(json.dumps(change(PART)))
    with pytest.raises(ConfigError) as error:
        report.finished(tmp_path, {"limit": 3}, resume=True)
    assert sentence in str(error.value)


def test_names_of_tasks_are_looked_up_in_both_places(folder) -> None:
    assert "after" in check_names(["after"], folder / "tasks").all_tasks
    assert {"after", "hellaswag"} <= {*check_names(["after", "hellaswag"], folder / "tasks").all_tasks}
