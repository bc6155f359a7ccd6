"""What a conversion would do, for `--dry-run`: the files and their sizes, the disk it needs and the memory it takes.

It goes through the same plan as `convert`, up to the first byte.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_mixtral.weights.dtypes import type_name
from megatron_mixtral.weights.files.writer import RELEASE, total_bytes, workers
from megatron_mixtral.weights.plan import human_size
from megatron_mixtral.weights.protocols import TensorSink, TensorSource
from megatron_mixtral.weights.rules import hf_tensors
from megatron_mixtral.weights.streaming import BLOCK

# Bytes of its own that a conversion takes, measured on Linux with Python 3.12 (tests/integration/test_convert_cli.py):
INTERPRETER = 30 << 20  # Python, numpy and the plan
TORCH = 340 << 20  # only a cast imports it
BLOCKS = 4  # of `BLOCK` bytes in each thread: gathered, cast, summed, written


def preview(source: TensorSource, sink: TensorSink, *, dtype: Any = None, jobs: int | None = None,
            companions: Iterable[Path] = ()) -> str:
    """The plan of `convert` with the same arguments. Raises `CheckpointError` for a source that is not whole."""
    source.check()
    name = type_name(dtype)
    dtypes = {key: name or source.dtype(tensor) for key, tensor in hf_tensors(source.config).items()}
    planned = [(file, sink.container(file, dtypes)) for file in sink.plan(dtypes)]
    lines = [f"{source.where} -> {sink.target}"]
    lines += [f"{file.path}: {len(container.placed)} tensors, {human_size(container.size)}"
              for file, container in planned]
    copied = sum(path.stat().st_size for path in {*companions, *source.companions()})
    needed = total_bytes(container for _, container in planned) + copied
    tensors = sum(len(container.placed) for _, container in planned)
    threads = workers(jobs, tensors)
    lines += [
        f"{len(planned)} files, {tensors} tensors, {human_size(needed)} with {human_size(copied)} of other files; "
        f"{human_size(_free(sink.target))} free there",
        f"{threads} thread(s), about {human_size(own_memory(threads, name is not None))} of memory, and up to "
        f"{human_size(threads * RELEASE)} of the source mapped at a time",
    ]
    if sink.carried:
        lines.append(f"carried along: {', '.join(sink.carried)}")
    return "\n".join(lines)


def own_memory(threads: int, cast: bool) -> int:
    """Bytes that a conversion takes besides mapped pages of files; the size of the model is not among the causes."""
    return INTERPRETER + BLOCKS * BLOCK * threads + (TORCH if cast else 0)


def _free(target: Path) -> int:
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
