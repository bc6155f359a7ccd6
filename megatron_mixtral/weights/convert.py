"""`convert(source, sink)`: import, export and resharding are this one function.

The source is checked whole and every output file is planned to the byte before anything is written; the target gets
its name only when it is complete and on the disk (`staged`).
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import type_name
from megatron_mixtral.weights.files.atomic import Stage, need_space, refuse_existing, staged
from megatron_mixtral.weights.files.file_layout import Container
from megatron_mixtral.weights.files.writer import FileWriter, Meter, total_bytes, workers, write_files
from megatron_mixtral.weights.formats.dist_metadata import Region
from megatron_mixtral.weights.formats.dist_source import METADATA_FILE, DistSource
from megatron_mixtral.weights.formats.hf_source import BIN_FILE, BIN_INDEX_FILE, INDEX_FILE, SINGLE_FILE, HFSource
from megatron_mixtral.weights.formats.rank_source import TRACKER, RankDirSource, iteration_directory
from megatron_mixtral.weights.plan import human_size, whole
from megatron_mixtral.weights.protocols import OutputFile, TensorSink, TensorSource
from megatron_mixtral.weights.rules import hf_tensors
from megatron_mixtral.weights.streaming import checksum, region_checksum

logger = logging.getLogger(__name__)

REPORT_FILE = "conversion.json"
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass
class Report:
    """What a conversion did. `tensors` counts stored tensors, copies on several ranks included.

    `checksums` are CRC-32s of the Hugging Face tensors, as read back from the output; only when it was verified.
    """

    source: Path
    target: Path
    tensors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    not_finite: list[str] | None = None
    checksums: dict[str, int] | None = None

    def __str__(self) -> str:
        text = (f"{self.source} -> {self.target}: {self.tensors} tensors, {human_size(self.bytes)} in "
                f"{len(self.files)} files, {self.seconds:.1f} s")
        if self.resumed:
            text += f"; {len(self.resumed)} files were there already"
        if self.checksums is not None:
            text += f"; verified, {len(self.checksums)} checksums equal the source's"
        if self.not_finite:
            text += f"; NaN or Inf in {', '.join(self.not_finite)}"
        if self.carried:
            text += f"; carried along: {', '.join(self.carried)}"
        if self.left_behind:
            text += (f"; left behind, because only weights are converted here: {', '.join(self.left_behind)}. A run "
                     "started from the result begins at step 0 with a new optimizer")
        return text

    def to_json(self) -> str:
        """Contents of `conversion.json`."""
        values = asdict(self) | {"source": str(self.source), "target": str(self.target)}
        return json.dumps(values, indent=2) + "\n"


def convert(source: TensorSource, sink: TensorSink, *, dtype: Any = None, companions: Iterable[Path] = (),
            jobs: int | None = None, resume: bool = False, verify: bool = False, check_finite: bool = False,
            progress: Progress | None = None) -> Report:
    """Write all of `source` through `sink`, cast to `dtype` (torch's, or its name) where given; returns the report.

    `companions` are files to copy beside the weights, before those that the source itself has. `jobs` threads
    write (default: one for each core). `resume` keeps finished files of a killed conversion of the same
    source to the same target. `verify` reads the result back and compares checksums with the source's.
    Raises `CheckpointError`; then nothing is at the target that was not there before.
    """
    started = time.monotonic()
    _refuse(source, sink)
    source.check()
    name = type_name(dtype)
    dtypes = {key: name or source.dtype(tensor) for key, tensor in hf_tensors(source.config).items()}
    planned = [(file, sink.container(file, dtypes)) for file in sink.plan(dtypes)]
    companions = _unique([*companions, *source.companions()])
    report = Report(source.where, sink.target, carried=list(sink.carried),
                    left_behind=[name for name in source.left_behind if name not in sink.carried],
                    not_finite=[] if check_finite else None)
    for file, container in planned:
        report.files.append(file.path)
        report.tensors += len(container.placed)
        report.bytes += container.moved
    need_space(sink.target, total_bytes(container for _, container in planned)
               + sum(path.stat().st_size for path in companions))
    with staged(sink.target, sink.replace, resume=resume) as stage:
        stage.begin(_fingerprint(source, planned))
        _write_all(stage, planned, source, report, jobs, check_finite, progress)
        sink.finish(stage.root, companions)
        if verify:
            report.checksums = compare(source, open_source(stage.root), name, jobs)
            _compare_copied(stage.root, planned)
        report.seconds = time.monotonic() - started
        (stage.root / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _refuse(source: TensorSource, sink: TensorSink) -> None:
    if source.config != sink.config:
        raise CheckpointError(f"{source.where} and {sink.target}: source and target describe different models")
    refuse_existing(sink.target, sink.replace)
    if sink.replace and source.where.resolve().is_relative_to(sink.target.resolve()):
        raise CheckpointError(f"{sink.target} holds the source {source.where}; choose another target")


def _write_all(stage: Stage, planned: Sequence[tuple[OutputFile, Container]], source: TensorSource, report: Report,
               jobs: int | None, check_finite: bool, progress: Progress | None) -> None:
    """Write what is not there yet; the first failure stops all."""
    not_finite: dict[str, list[str]] = {}
    due = []
    for file, container in planned:
        notes = stage.finished(file.path, container.size)
        if notes is None:
            due.append((file.path, container))
        else:
            report.resumed.append(file.path)
            not_finite[file.path] = notes
    total = sum(container.moved for _, container in due)
    meter = Meter(source.release, None if progress is None else lambda done: progress(done, total))

    def writer(path: str, container: Container) -> FileWriter:
        def done(bad: list[str]) -> None:
            stage.note(path, bad)
            not_finite[path] = bad

        return FileWriter(stage.root / path, container, source, meter, check_finite=check_finite, done=done)

    write_files([writer(path, container) for path, container in due], meter, jobs)
    if check_finite:
        report.not_finite = [f"{file.path}: {name}" for file, _ in planned for name in not_finite[file.path]]


def compare(source: TensorSource, written: TensorSource, dtype: str | None = None,
            jobs: int | None = None) -> dict[str, int]:
    """Checksums of every Hugging Face tensor, which must be the same in both. Raises `CheckpointError` naming one."""
    written.check()
    meter = Meter(lambda: (source.release(), written.release()) and None)

    def one(name: str) -> tuple[str, int]:
        target = whole(hf_tensors(source.config)[name])
        ours, theirs = checksum(target, source, dtype), checksum(target, written)
        meter.add(target.elements)
        if ours != theirs:
            raise CheckpointError(f"{written.where}: {name} has checksum {theirs:08x} when read back, the source's is "
                                  f"{ours:08x}; the disk or the memory of this machine is at fault")
        return name, ours

    names = list(hf_tensors(source.config))
    with ThreadPoolExecutor(workers(jobs, len(names))) as pool:
        return dict(pool.map(one, names))


def _compare_copied(root: Path, planned: Sequence[tuple[OutputFile, Container]]) -> None:
    """Read back what was taken over byte for byte. Raises `CheckpointError` naming the file."""
    for file, container in planned:
        for copied in container.copied:
            written = Region(root / file.path, copied.offset, copied.region.length)
            if region_checksum(written) != region_checksum(copied.region):
                raise CheckpointError(f"{written.file}: bytes {written.offset} to {written.offset + written.length} "
                                      f"are not those of {copied.region.file} when read back; the disk or the memory "
                                      "of this machine is at fault")


def _fingerprint(source: TensorSource, planned: Sequence[tuple[OutputFile, Container]]) -> str:
    """Says whether a started conversion is this one: the source's files as they are now, and the plan to the byte."""
    digest = hashlib.sha256(str(source.where.resolve()).encode())
    for path in sorted(path for path in source.where.rglob("*") if path.is_file()):
        state = path.stat()
        digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
    for file, container in planned:
        digest.update(f"{file.path} {container.size}\n".encode())
        for placed in container.placed:
            digest.update(placed.before + placed.after(0))
        digest.update(container.end([0] * len(container.placed)))
    return digest.hexdigest()


def _unique(paths: Iterable[Path]) -> list[Path]:
    """The first of each file name."""
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(path.name, path)
    return list(found.values())


def open_megatron(directory: str | Path, *, compare_copies: bool = True) -> TensorSource:
    """The source for a Megatron checkpoint directory: rank directories or a distributed checkpoint."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist or is not a directory")
    _, iteration = iteration_directory(directory)
    if (iteration / METADATA_FILE).exists():
        return DistSource(directory)
    if any(iteration.glob("mp_rank_*")):
        return RankDirSource(directory, compare_copies=compare_copies)
    raise CheckpointError(f"{directory} is not a Megatron checkpoint: no {TRACKER}, no mp_rank_* directories and no "
                          f"{METADATA_FILE}")


def open_source(directory: str | Path, *, compare_copies: bool = True) -> TensorSource:
    """The source for any directory this library reads, by what is in it."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist or is not a directory")
    if any((directory / name).exists() for name in (INDEX_FILE, SINGLE_FILE, BIN_INDEX_FILE, BIN_FILE)):
        return HFSource(directory)
    return open_megatron(directory, compare_copies=compare_copies)
