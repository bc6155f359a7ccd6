"""Finished pieces of a run, kept so that a killed run can be taken up where it was.

The scratch directory of a run holds part files, the dataset so far, and `finished.jsonl`: a first line that says what
the parts were made with, then a line for each finished chunk with its counts and the checksum of its ids. The line is
what makes a part exist. A part is used again only if size and checksum fit, so nothing needs to be flushed to the disk
on the way, and a machine that lost power costs no more than the parts that it lost.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron_mixtral import disk
from megatron_mixtral.data.corpus import Chunk
from megatron_mixtral.data.scratch import checksum, clear
from megatron_mixtral.data.text.workers import ChunkResult, part_paths

logger = logging.getLogger(__name__)

RECORDS = "finished.jsonl"


class FinishedParts:
    """The finished chunks of a scratch directory, from earlier runs and from this one: `results`, by the names of the
    chunks. One that is taken out of them will be encoded again.
    """

    def __init__(self, scratch: Path, made_with: dict[str, Any]) -> None:
        """Reads what earlier runs left, or clears the directory with a sentence where it was made with other flags."""
        self._scratch = scratch
        self._path = scratch / RECORDS
        self.results: dict[str, ChunkResult] = {}
        found, lines = _read_records(self._path)
        if found == made_with:
            self.results = {line["chunk"]: msgspec.convert(line, ChunkResult) for line in lines}
        else:
            if found is not None:
                differing = [key for key in {**found, **made_with} if found.get(key) != made_with.get(key)]
                logger.warning(
                    "%s holds pieces of an unfinished run with another %s: they are cleared, the run starts anew",
                    scratch, ", ".join(differing),
                )  # fmt: skip
            clear(scratch)
        # Written anew, since the last line of a killed run may be torn.
        kept = (_line(name, result) for name, result in self.results.items())
        disk.write_whole(self._path, "".join([json.dumps(made_with) + "\n", *kept]))
        self._stream = open(self._path, "a", encoding="utf-8")

    def add(self, chunk: Chunk, result: ChunkResult) -> None:
        """Note that the parts of a chunk are whole."""
        self.results[chunk.name] = result
        self._stream.write(_line(chunk.name, result))
        self._stream.flush()

    def is_whole(self, chunk: Chunk, itemsize: int) -> bool:
        """Whether the part files of a finished chunk have the size and the checksum that were noted."""
        result = self.results[chunk.name]
        for number, (counts, noted) in enumerate(zip(result.keys, result.checksums, strict=True)):
            ids, lengths = part_paths(self._scratch, chunk, number)
            sizes = {ids: counts.tokens * itemsize, lengths: 4 * counts.documents}
            if any(not path.exists() or path.stat().st_size != size for path, size in sizes.items()):
                return False
            with ids.open("rb") as stream:
                found = checksum(stream, sizes[ids])
            if found != noted or int(np.fromfile(lengths, dtype="<i4").sum(dtype=np.int64)) != counts.tokens:
                return False
        return True

    def close(self) -> None:
        self._stream.close()


def _read_records(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The first line and the others; the last one may be torn, since its writer was killed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        first = json.loads(lines[0])
    except (OSError, ValueError, IndexError):
        return None, []
    records = []
    for line in lines[1:]:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return first, records


def _line(chunk_name: str, result: ChunkResult) -> str:
    return json.dumps({"chunk": chunk_name, **asdict(result)}) + "\n"
