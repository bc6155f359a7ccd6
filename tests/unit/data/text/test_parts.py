"""Finished pieces of a killed run: when they are another run's, of another input, or damaged."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_mixtral.data.corpus import cut_chunks, list_inputs
from megatron_mixtral.data.text.options import TextOptions
from megatron_mixtral.data.text.parts import FinishedParts
from megatron_mixtral.data.text.run import made_with
from megatron_mixtral.data.text.workers import ChunkResult, KeyCounts, part_paths

TOKENIZER = SimpleNamespace(name="json", sha256="abc")
CHOICE = SimpleNamespace(engine=SimpleNamespace(name="native", version="1"))
OPTIONS = TextOptions(inputs=("x",), output_prefix="y", tokenizer_path="z", tokenizer_type="PretrainedFromHF")


@pytest.mark.parametrize("options", [
    {"allow_special_in_text": True}, {"keys": ("title",)}, {"append_eod": True}, {"prepend_bod": True}], ids=str)
def test_pieces_of_other_flags_are_not_taken_up(tmp_path: Path, options: dict) -> None:
    """Everything that changes an id; the number of workers changes none."""
    before = made_with(OPTIONS, TOKENIZER, CHOICE)
    FinishedParts(tmp_path, before).close()
    (tmp_path / "part-1").touch()
    FinishedParts(tmp_path, made_with(replace(OPTIONS, workers=7), TOKENIZER, CHOICE)).close()
    assert (tmp_path / "part-1").exists()
    FinishedParts(tmp_path, made_with(replace(OPTIONS, **options), TOKENIZER, CHOICE)).close()
    assert not (tmp_path / "part-1").exists()


def test_pieces_of_another_tokenizer_or_engine_are_not_taken_up() -> None:
    tokenizer = SimpleNamespace(name="json", sha256="abd")
    choices = [SimpleNamespace(engine=SimpleNamespace(name=name, version=version))
               for name, version in (("json", "1"), ("native", "2"))]
    found = [made_with(OPTIONS, TOKENIZER, CHOICE), made_with(OPTIONS, tokenizer, CHOICE),
             *(made_with(OPTIONS, TOKENIZER, choice) for choice in choices)]
    assert all(one not in found[:number] for number, one in enumerate(found))


def test_a_piece_is_named_by_all_that_says_whether_its_input_changed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n')
    [chunk] = cut_chunks(list_inputs([str(path)]).files, 1000)
    names = {chunk.name, replace(chunk, end=chunk.end - 1).name, replace(chunk, start=1).name}
    names |= {replace(chunk, file=replace(chunk.file, **{name: getattr(chunk.file, name) + 1})).name
              for name in ("size", "mtime_ns")}
    assert len(names) == 5


def test_a_damaged_piece_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}")
    [chunk] = cut_chunks(list_inputs([str(path)]).files, 1000)
    parts = FinishedParts(tmp_path, {})
    ids, lengths = part_paths(tmp_path, chunk, 0)
    contents = {ids: np.array([5, 6, 7], dtype="<u2").tobytes(), lengths: np.array([1, 2], dtype="<i4").tobytes()}
    import zlib

    parts.add(chunk, ChunkResult(keys=[KeyCounts(documents=2, tokens=3)], checksums=[zlib.crc32(contents[ids])]))
    parts.close()
    damaged = {ids: np.array([5, 6, 8], dtype="<u2").tobytes(), lengths: np.array([1, 3], dtype="<i4").tobytes()}
    for changed in ({}, {ids: damaged[ids]}, {lengths: damaged[lengths]}, {ids: contents[ids][:-2]}):
        for file, content in (contents | changed).items():
            file.write_bytes(content)
        assert parts.is_whole(chunk, 2) == (not changed)
    ids.unlink()
    assert not parts.is_whole(chunk, 2)
