"""The quickstart's corpus: the documented layout, the same every time, nothing rewritten without need."""

import json

from examples.quickstart import corpus


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_layout_repetition_and_shrinking(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "FILE_BYTES", 100_000)
    assert corpus.main(["--output-dir", str(tmp_path / "a"), "--megabytes", "1"]) == 0
    first = contents(tmp_path / "a")
    for folder in corpus.FOLDERS:
        assert f"{folder}/0.jsonl" in first and f"{folder}/1.jsonl" in first
    assert 500_000 < sum(map(len, first.values())) <= 1_000_000
    for content in first.values():
        for line in content.splitlines():
            assert list(json.loads(line)) == ["text"]
    capsys.readouterr()
    corpus.main(["--output-dir", str(tmp_path / "a"), "--megabytes", "1"])
    assert capsys.readouterr().out.count("already there") == 2 and contents(tmp_path / "a") == first
    corpus.main(["--output-dir", str(tmp_path / "a"), "--megabytes", "0.3"])
    assert sum(map(len, contents(tmp_path / "a").values())) <= 300_000


def test_python_without_tests_or_texts(tmp_path, monkeypatch):
    modules, _ = corpus.library_files()
    monkeypatch.setattr(corpus, "library_files", lambda: (modules[:60], []))
    corpus.build(tmp_path, 0.2)
    pages = (tmp_path / "tests_and_docs" / "0.jsonl").read_text().splitlines()
    assert len(pages) > 5 and all(len(json.loads(page)["text"]) >= corpus.SMALLEST for page in pages)
