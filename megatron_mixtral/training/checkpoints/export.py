"""Hugging Face folders from a running job (`--export-hf-interval`): the conversion of a checkpoint that was just saved.

It runs in a process of its own beside rank 0, as `tools/checkpoint/util.py` would by hand, while training goes on: it
reads the checkpoint from the disk, not the model, and needs neither a device nor torch.distributed.
"""

import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_mixtral.config import AdapterConfig
from megatron_mixtral.errors import MixtralError

logger = logging.getLogger(__name__)

EXPORTS = "hf"  # below --save


def write(checkpoint: Path, target: Path, template: Path | None, adapter_format: str) -> None:
    """Convert one iteration's directory; the exit status says whether it succeeded. The body of the process.

    A checkpoint of adapters becomes a folder of PEFT's.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the training, which waits for this
    os.nice(10)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from megatron_mixtral.weights import convert, open_sink, open_source

    try:
        source = open_source(checkpoint)
        if isinstance(source.config, AdapterConfig):
            sink = open_sink(target, "peft", adapter_format=adapter_format, replace=True)
        else:
            sink = open_sink(target, template=template, replace=True)
        report = convert(source, sink, jobs=1)
    except MixtralError as error:
        logger.error("export: %s", error)
        sys.exit(1)
    logger.info("export: %s", report)


class Exporter:
    """The exports of a run, on rank 0."""

    def __init__(self, save: Path, interval: int | None, template: Path | None,
                 adapter_format: str = "per-expert") -> None:
        """`template` is a Hugging Face directory whose config.json and tokenizer files go along."""
        self._save, self._interval, self._template = save, interval, template
        self._adapter_format, self._running = adapter_format, dict[int, Any]()

    def start(self, iteration: int, checkpoint: Path) -> None:
        """Export a checkpoint that has its name, if its iteration is due."""
        if self._interval is None or iteration % self._interval:
            return
        target = self._save / EXPORTS / checkpoint.name
        process = multiprocessing.get_context("spawn").Process(
            target=write, args=(checkpoint, target, self._template, self._adapter_format),
            name=f"export of {checkpoint.name}")
        process.start()
        self._running[iteration] = process

    def busy(self) -> list[int]:
        """Iterations that are being read; those that failed since the last call are reported."""
        for iteration, process in list(self._running.items()):
            if not process.is_alive():
                self._take(iteration)
        return list(self._running)

    def wait(self) -> None:
        """Wait for every export."""
        for iteration in list(self._running):
            self._take(iteration)

    def _take(self, iteration: int) -> None:
        process = self._running.pop(iteration)
        process.join()
        if process.exitcode != 0:
            logger.error("%s failed with status %s; training goes on, and the checkpoint is whole: "
                         "tools/checkpoint/util.py --loader mixtral_mg --save-model-type huggingface converts it",
                         process.name, process.exitcode)
