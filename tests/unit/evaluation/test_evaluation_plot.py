"""The picture of evaluations shows their figures, each beside its own reference."""

import json
from pathlib import Path

import pytest

from megatron_mixtral import __main__ as commands
from megatron_mixtral.errors import DataError
from megatron_mixtral.evaluation import plot

OURS = {"groups": {"mmlu": {"acc,none": 0.6, "acc_stderr,none": 0.01, "alias": "mmlu"},
                   "mmlu_stem": {"acc,none": 0.5, "acc_stderr,none": 0.02}},
        "results": {"mmlu_anatomy": {"acc,none": 0.4, "acc_stderr,none": 0.03, "alias": "anatomy"},
                    "mmlu_astronomy": {"acc,none": 0.7, "acc_stderr,none": "N/A"},
                    "arc": {"acc_norm,none": 0.3, "acc,none": 0.2, "acc_norm_stderr,none": 0.1},
                    "pile": {"word_perplexity,none": 9.0}}}
THEIRS = {"results": {"mmlu_anatomy": {"acc,none": 0.8}, "mmlu_virology": {"exact_match,letter": 0.9}}}


def test_every_accuracy_is_a_dot_in_the_row_of_its_subject(monkeypatch, tmp_path: Path) -> None:
    runs = [("ours", plot.figures_of(OURS, "a")), ("theirs", plot.figures_of(THEIRS, "b"))]
    assert runs[0][1] == {"mmlu": (0.6, 0.01), "mmlu_stem": (0.5, 0.02), "mmlu_anatomy": (0.4, 0.03),
                          "mmlu_astronomy": (0.7, 0.0), "arc": (0.2, 0.0)}
    rows = plot.rows_of(runs)
    assert rows == [("MMLU", "mmlu"), ("STEM", "mmlu_stem"), ("    astronomy", "mmlu_astronomy"),
                    ("    anatomy", "mmlu_anatomy"), ("other", None), ("    virology", "mmlu_virology"), ("arc", "arc")]
    figures = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, path: figures.append(figure))
    plot.draw(runs, tmp_path / "pictures" / "a.png")
    [axes] = figures[0].axes
    shown = {}
    for container in axes.containers:
        dots, _, (bars,) = container.lines
        errors = [(segment[1][0] - segment[0][0]) / 2 for segment in bars.get_segments()]
        shown[container.get_label()] = [*zip(dots.get_xdata(), dots.get_ydata(), errors, strict=True)]
    assert shown["ours: 60.0 % of MMLU"] == [pytest.approx(one) for one in (
        (0.6, 0, 0.01), (0.5, -1, 0.02), (0.7, -2, 0), (0.4, -3, 0.03), (0.2, -6, 0))]
    assert shown["theirs"] == [pytest.approx(one) for one in ((0.8, -3, 0), (0.9, -5, 0))]
    assert [one.get_text() for one in axes.get_yticklabels()] == [label for label, _ in rows]


def test_the_command_takes_folders_and_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text(json.dumps(OURS))
    (tmp_path / "theirs.json").write_text(json.dumps(THEIRS))
    words = [str(tmp_path / "mine"), "--reference", str(tmp_path / "theirs.json")]
    assert commands.run("plot-evaluation", words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mine' / 'evaluation.png'}\n"
    assert (tmp_path / "mine" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert commands.run("plot-evaluation", [*words, "--labels", "a"]) == 1
    assert "--labels has 1 names for 2 models" in capsys.readouterr().err


def test_results_without_a_share_of_right_answers_are_refused() -> None:
    with pytest.raises(DataError, match="f.json holds no figure: expected results.json of an evaluation"):
        plot.figures_of({"results": {"pile": {"word_perplexity,none": 9.0}, "group": {"alias": "x"}}}, "f.json")
