"""The writer of `.bin/.idx` against the engine's own builder and reader."""

import os

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_mixtral.data.indexed import IndexFile
from megatron_mixtral.data.indexed import writer as indexed
from megatron_mixtral.data.indexed.writer import IndexedWriter
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer.engines import token_dtype


def documents(vocab_size, count=500):
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 300, size=count)
    return [generator.integers(0, vocab_size, size=length).astype(np.int64) for length in lengths]


def engine_files(prefix, docs, vocab_size):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for ids in docs:
        builder.add_document(torch.from_numpy(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def write(prefix, docs, dtype, scratch, batch=37):
    scratch.mkdir(exist_ok=True)
    writer = IndexedWriter(prefix, dtype, scratch)
    for start in range(0, len(docs), batch):
        some = docs[start : start + batch]
        writer.add(np.concatenate(some).astype(dtype), np.array([len(ids) for ids in some], dtype=np.int32))
    writer.finish()
    writer.publish()
    writer.close()


def same_files(first, second):
    for end in (".bin", ".idx"):
        with open(f"{first}{end}", "rb") as one, open(f"{second}{end}", "rb") as two:
            assert one.read() == two.read(), end


@pytest.mark.parametrize("vocab_size", [300, 32000, 65499, 65500, 131072])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_same_bytes_as_the_engine(tmp_path, monkeypatch, vocab_size, block):
    monkeypatch.setattr(indexed, "BLOCK", block)
    docs = documents(vocab_size)
    engine_files(tmp_path / "engine", docs, vocab_size)
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))
    write(tmp_path / "ours", docs, token_dtype(vocab_size), tmp_path / "scratch")
    same_files(tmp_path / "engine", tmp_path / "ours")
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert len(dataset) == len(docs) and np.array_equal(dataset[3], docs[3])
    assert np.array_equal(dataset.document_indices, np.arange(len(docs) + 1))


@pytest.mark.parametrize("kernel", ["copy_file_range", "refused", "absent", "short"])
def test_parts_give_the_same_bytes(tmp_path, monkeypatch, kernel):
    real = getattr(os, "copy_file_range", None)
    if kernel == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif kernel != "copy_file_range":
        calls = []

        def stand_in(source, target, size):
            calls.append(size)
            if kernel == "short" and real and len(calls) % 3:
                return real(source, target, min(size, 101))
            raise OSError(18, "cross-device link")

        monkeypatch.setattr(os, "copy_file_range", stand_in, raising=False)
    docs = documents(32000)
    write(tmp_path / "whole", docs, np.dtype(np.uint16), tmp_path / "scratch")
    writer = IndexedWriter(tmp_path / "parts", np.dtype(np.uint16), tmp_path / "scratch")
    for start in range(0, len(docs), 100):
        some = docs[start : start + 100]
        np.concatenate(some).astype(np.uint16).tofile(tmp_path / "ids")
        np.array([len(ids) for ids in some], dtype=np.int32).tofile(tmp_path / "lengths")
        writer.add_part(tmp_path / "ids", tmp_path / "lengths")
    writer.finish()
    writer.publish()
    writer.close()
    same_files(tmp_path / "whole", tmp_path / "parts")
    assert (writer.documents, writer.tokens) == (len(docs), sum(map(len, docs)))


def test_places_beyond_two_giga_tokens(tmp_path):
    """Five documents of 2**30 tokens: a sparse file, which takes no room on the disk."""
    (tmp_path / "scratch").mkdir()
    writer = IndexedWriter(tmp_path / "set", np.dtype(np.uint16), tmp_path / "scratch")
    writer.add_lengths(np.full(5, 2**30, dtype=np.int32))
    writer.tokens = 5 * 2**30
    writer.close()
    os.truncate(tmp_path / "scratch" / "set.bin.tmp", 10 * 2**30)
    writer.finish()
    writer.publish()
    index = IndexFile(str(tmp_path / "set"))
    assert index.pointers.tolist() == [number * 2**31 for number in range(5)]
    assert index.tokens == 5 * 2**30 and index.documents.tolist() == [0, 1, 2, 3, 4, 5]


def test_nothing_is_published_early(tmp_path):
    (tmp_path / "scratch").mkdir()
    writer = IndexedWriter(tmp_path / "set", np.dtype(np.uint16), tmp_path / "scratch")
    writer.add(np.array([5, 6], dtype=np.uint16), np.array([2], dtype=np.int32))
    writer.finish()
    assert not list(tmp_path.glob("set*"))
    writer.publish()
    assert sorted(path.name for path in tmp_path.glob("set*")) == ["set.bin", "set.idx"]


def test_empty_and_torn_are_refused(tmp_path):
    (tmp_path / "scratch").mkdir()
    writer = IndexedWriter(tmp_path / "set", np.dtype(np.uint16), tmp_path / "scratch")
    with pytest.raises(DataError, match="No document"):
        writer.finish()
    np.zeros(9, dtype=np.uint16).tofile(tmp_path / "ids")
    np.array([10], dtype=np.int32).tofile(tmp_path / "lengths")
    with pytest.raises(DataError, match="has 18 bytes; its 10 ids need 20"):
        writer.add_part(tmp_path / "ids", tmp_path / "lengths")
    writer.close()
