"""`convert(source, sink)`: import, export and resharding are this one function. `preview` says what it would do.

The source is checked whole and every output file is planned to the byte before anything is written; the target gets
its name only when it is complete and on the disk (`files.atomic.staged`).
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_mixtral.config import AdapterConfig, read_json
from megatron_mixtral.disk import free_space, human_size
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.dtypes import type_name
from megatron_mixtral.weights.files import atomic, file_layout, writer
from megatron_mixtral.weights.opening import open_source
from megatron_mixtral.weights.plan import whole
from megatron_mixtral.weights.protocols import Output, TensorSink, TensorSource
from megatron_mixtral.weights.rules import ROUTER, hf_tensors
from megatron_mixtral.weights.streaming import BLOCK, blocks

logger = logging.getLogger(__name__)

REPORT_FILE = "conversion.json"
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

# Bytes of its own that a conversion takes, measured on Linux with Python 3.12 (tests/integration/test_convert_cli.py):
INTERPRETER = 30 << 20  # Python, numpy and the plan
TORCH = 340 << 20  # only a cast imports it
BLOCKS = 4  # of `BLOCK` bytes in each thread: gathered, cast, summed, written


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
        return json.dumps(asdict(self), indent=2, default=str) + "\n"


def convert(source: TensorSource, sink: TensorSink, *, dtype: Any = None, companions: Iterable[Path] = (),
            jobs: int | None = None, resume: bool = False, verify: bool = False, check_finite: bool = False,
            progress: Progress | None = None) -> Report:
    """Write all of `source` through `sink`, cast to `dtype` (torch's, or its name) where given; returns the report.

    `companions` are files to copy beside the weights, before those that the source itself has. `jobs` threads
    write (default: one for each core). `resume` keeps finished files of a killed conversion of the same
    source to the same target. `verify` reads the result back and compares checksums with the source's.
    A source that is written to meanwhile is refused at the end, and so is an archive of torch's whose storages are not
    those that its checksums were made of.
    Raises `CheckpointError`; then nothing is at the target that was not there before.
    """
    started = time.monotonic()
    atomic.refuse_existing(sink.target, sink.replace)
    if sink.replace and source.where.resolve().is_relative_to(sink.target.resolve()):
        raise CheckpointError(f"{sink.target} holds the source {source.where}; choose another target")
    name = type_name(dtype)
    _watch(source, sink.target)
    output = _plan(source, sink, name)
    found = [*companions, *output.companions, *source.companions]
    companions = list({path.name: path for path in reversed(found)}.values())  # the first of each name
    for path in companions:
        if path.suffix == ".json":
            read_json(path)  # transformers would not load the result beside it
    report = Report(source.where, sink.target, files=list(output.files), carried=list(output.carried),
                    tensors=sum(layout.tensors for layout in output.files.values()),
                    bytes=sum(layout.moved for layout in output.files.values()),
                    left_behind=[name for name in source.left_behind if name not in output.carried],
                    not_finite=[] if check_finite else None)
    atomic.need_space(sink.target, output.size + sum(path.stat().st_size for path in companions))
    with atomic.staged(sink.target, sink.replace, resume=resume) as stage:
        stage.begin(_fingerprint(source, output))
        _write_all(stage, output, source, report, jobs, check_finite, progress)
        source.mapped.check_sums()
        write_beside(stage.root, output, companions)
        if verify:
            report.checksums = compare(source, open_source(stage.root), name, jobs)
            _compare_copied(stage.root, output)
        source.mapped.check_unchanged()
        report.seconds = time.monotonic() - started
        (stage.root / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _watch(source: TensorSource, target: Path) -> None:
    """Note the state of every file of a source, but of no target in its folder."""
    folders = {Path(os.path.abspath(target)), atomic.partial_of(target)}
    source.mapped.watch(path for path in [*source.where.rglob("*"), *source.companions]
                        if path.is_file() and not folders & set(Path(os.path.abspath(path)).parents))


def preview(source: TensorSource, sink: TensorSink, *, dtype: Any = None, companions: Iterable[Path] = (),
            jobs: int | None = None) -> str:
    """What `convert` would do with the same arguments: files and sizes, the disk it needs and the memory it takes.

    Raises `CheckpointError` for a source that is not whole.
    """
    name = type_name(dtype)
    output = _plan(source, sink, name)
    tensors = sum(layout.tensors for layout in output.files.values())
    copied = sum(path.stat().st_size for path in {*companions, *output.companions, *source.companions})
    threads = writer.workers(jobs, tensors)
    lines = [f"{source.where} -> {sink.target}"]
    lines += [f"{path}: {layout.tensors} tensors, {human_size(layout.size)}" for path, layout in output.files.items()]
    lines += [
        f"{len(output.files)} files, {tensors} tensors, {human_size(output.size + copied)} with {human_size(copied)} "
        f"of other files; {human_size(free_space(sink.target))} free there",
        f"{threads} thread(s), about {human_size(own_memory(threads, name is not None))} of memory",
    ]
    if output.carried:
        lines.append(f"carried along: {', '.join(output.carried)}")
    return "\n".join(lines)


def own_memory(threads: int, cast: bool) -> int:
    """Bytes that a conversion takes besides mapped pages of files; the size of the model is not among the causes."""
    return INTERPRETER + BLOCKS * BLOCK * threads + (TORCH if cast else 0)


def _plan(source: TensorSource, sink: TensorSink, dtype: str | None) -> Output:
    """The plan of a source that is whole. Raises `CheckpointError` for one that is not."""
    source.check()
    kind = "adapters" if isinstance(source.config, AdapterConfig) else "model"
    if kind not in getattr(sink, "contents", TensorSink.contents):
        raise ConfigError(f"{source.where} holds {'adapters' if kind == 'adapters' else 'a whole model'}, which cannot "
                          f"be written in the form asked for: adapters go to --save-model-type peft, or into their "
                          "base with merge-lora; a model goes to the others")
    return sink.plan(source, {key: dtype or source.dtype(tensor) for key, tensor in hf_tensors(source.config).items()})


def _write_all(stage: atomic.Stage, output: Output, source: TensorSource, report: Report, jobs: int | None,
               check_finite: bool, progress: Progress | None) -> None:
    """Write what is not there yet; the first failure stops all."""
    not_finite = {path: notes for path, layout in output.files.items()
                  if (notes := stage.finished(path, layout.size)) is not None}
    report.resumed = list(not_finite)
    due = {path: layout for path, layout in output.files.items() if path not in not_finite}
    total = sum(layout.moved for layout in due.values())
    meter = writer.Meter(None if progress is None else lambda done: progress(done, total))

    def done(path: str, bad: list[str]) -> None:
        stage.note(path, bad)
        not_finite[path] = bad

    writer.write_files(stage.root, due, meter, jobs, check_finite, done)
    if check_finite:
        report.not_finite = [f"{path}: {name}" for path in output.files for name in not_finite[path]]


def write_beside(root: Path, output: Output, companions: Iterable[Path]) -> None:
    """Write the small files and copy the companions; a companion does not replace a file of the plan."""
    for name, contents in output.beside.items():
        (root / name).write_bytes(contents)
    for path in companions:
        if path.name not in output.beside:
            shutil.copyfile(path, root / path.name)


def compare(source: TensorSource, written: TensorSource, dtype: str | None = None,
            jobs: int | None = None) -> dict[str, int]:
    """Checksums of every Hugging Face tensor, which must be the same in both. Raises `CheckpointError` naming one.

    A dense model's directory has no routers, so they are left out there.
    """
    written.check()
    tensors = {name: tensor for name, tensor in hf_tensors(source.config).items()
               if source.config.dense_config is None or tensor.rule is not ROUTER}

    def one(name: str) -> tuple[str, int]:
        target = whole(tensors[name])
        ours, theirs = (file_layout.checksum(blocks(target, *one)) for one in ((source, dtype), (written,)))
        if ours != theirs:
            raise CheckpointError(f"{written.where}: {name} has checksum {theirs:08x} when read back, the source's is "
                                  f"{ours:08x}; the disk or the memory of this machine is at fault")
        return name, ours

    with ThreadPoolExecutor(writer.workers(jobs, len(tensors))) as pool:
        return dict(pool.map(one, tensors))


def _compare_copied(root: Path, output: Output) -> None:
    """Read back what was taken over byte for byte. Raises `CheckpointError` naming the file."""
    for path, layout in output.files.items():
        for placed in layout.placed:
            copied = placed.payload
            written = file_layout.Region(root / path, placed.offset, copied.size)
            if copied.dtype is None and file_layout.checksum(written.blocks()) != file_layout.checksum(
                    block for (block,) in copied.blocks([copied.part])):
                raise CheckpointError(f"{written.file}: bytes {written.offset} to {written.offset + written.length} "
                                      f"({copied.name}) are not those of the source when read back; the disk or the "
                                      "memory of this machine is at fault")


def _fingerprint(source: TensorSource, output: Output) -> str:
    """Says whether a started conversion is this one: the source's files as they are now, and the plan to the byte."""
    digest = hashlib.sha256(str(source.where.resolve()).encode())
    for path, (size, written, _) in sorted(source.mapped.watch(()).items()):
        digest.update(f"{path} {size} {written}\n".encode())
    for path, layout in output.files.items():
        digest.update(f"{path} {layout.size}\n".encode())
        for placed in layout.placed:
            digest.update(placed.before + placed.after(0))
        digest.update(layout.end([0] * len(layout.placed)))
    return digest.hexdigest()
