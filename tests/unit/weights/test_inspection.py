"""What `inspect` says of a directory whose report is damaged, or says nothing."""

import json
from pathlib import Path

import pytest
import torch
from helpers.models import TINY, random_hf_directory

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.weights import convert, open_sink, open_source
from megatron_mixtral.weights.inspection import inspect


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    hf = random_hf_directory(root / "hf", MixtralConfig(**TINY | {"num_hidden_layers": 1}), torch.bfloat16)
    convert(open_source(hf), open_sink(root / "out"), verify=True)
    return root / "out"


def said(directory: Path, contents: str) -> str:
    """What is said of a directory with these contents of its report, which is put back afterwards."""
    report = directory / "conversion.json"
    before = report.read_text()
    try:
        report.write_text(contents)
        return str(inspect(directory, deep=True))
    finally:
        report.write_text(before)


def test_checksums_that_are_equal_are_counted(converted):
    text = said(converted, (converted / "conversion.json").read_text())
    assert ", whole" in text and "checksums equal" in text


@pytest.mark.parametrize("contents", ["{", "[]", "\0", '{"checksums": [1]}', '{"checksums": "x"}'])
def test_a_damaged_report_is_named(converted, contents):
    text = said(converted, contents)
    assert "NOT WHOLE" in text and "conversion.json" in text and "checksums equal" not in text


@pytest.mark.parametrize("contents", ["{}", '{"checksums": null}', '{"checksums": {}}'])
def test_a_report_without_checksums_proves_nothing(converted, contents):
    text = said(converted, contents)
    assert ", whole" in text and "checksums equal" not in text


def test_wrong_checksums_are_not_called_equal(converted):
    text = said(converted, json.dumps({"checksums": {"lm_head.weight": 1}}))
    assert "NOT WHOLE" in text and "not what the conversion wrote" in text and "checksums equal" not in text
