"""Lines and documents far larger than a piece: read once, held a few times, in linear time."""

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_mixtral.data.text import TextOptions, preprocess_text
from megatron_mixtral.tokenizer import mixtral_tokenizer_path
from megatron_mixtral.tokenizer.engines import native

WORDS = "the quick brown fox jumps over a lazy dog, returns 42 and sleeps.\n"


def write_one_line(path: Path, size: int) -> int:
    """A document of about `size` bytes between two short ones; the number of its characters."""
    text = WORDS * (size // len(WORDS))
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in ("before", text, "after")))
    return len(text)


def most_memory() -> int:
    """In bytes, of this process. (`getrusage` would count what the process had that it was forked from.)"""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure(connection, path: str, prefix: str) -> None:
    """In a process of its own: seconds, and what the run added to the most memory that the process had."""
    before = most_memory()
    started = time.process_time()
    report = preprocess_text(TextOptions((path,), prefix, str(mixtral_tokenizer_path()), "Llama2Tokenizer",
                                         tokenizer_engine="native", workers=1))  # fmt: skip
    seconds = time.process_time() - started
    connection.send((seconds, most_memory() - before, report["keys"]["text"]))


def run(path: Path, prefix: Path) -> tuple[float, int, dict]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(theirs, str(path), str(prefix)))
    process.start()
    theirs.close()  # so that its end is seen
    found = ours.recv()
    process.join()
    return found


@pytest.mark.parametrize(("small", "large"), [(5, 20), pytest.param(50, 200, marks=pytest.mark.slow)])
def test_one_huge_line(tmp_path, small, large):
    if not list(Path(native.__file__).parent.glob("_native_bpe*")):  # another test's build is not a fresh process's
        pytest.skip("other engines take 12 times the memory for a document of this size, and ours is not built")
    results = {}
    for megabytes in (small, large):
        characters = write_one_line(tmp_path / "x.jsonl", megabytes << 20)
        results[megabytes] = run(tmp_path / "x.jsonl", tmp_path / "set")
        counts = results[megabytes][2]
        assert counts["documents"] == 3 and counts["text_bytes"] == characters + len("before") + len("after")
        lengths = np.fromfile(tmp_path / "set_text_document.idx", dtype="<i4", count=3, offset=34)
        assert lengths.sum() == counts["tokens"] and lengths[1] > characters / 5
    assert results[large][1] < 6 * (large << 20), f"{results[large][1] / (large << 20):.1f} bytes for each of the line"
    assert results[large][0] < 3 * large / small * results[small][0] + 1, results
