"""The report on a data set: what is in it, and all that is needed to make it again. Written last, as JSON.

It lies in a folder of its own beside the data set: Megatron-LM's tools/merge_datasets.py takes every file of
a folder for half of a data set.
"""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron_mixtral
from megatron_mixtral import disk
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer import Tokenizer

REPORT_FOLDER, REPORT_SUFFIX = "reports", ".report.json"  # what ends so is never an input


def report_path(prefix: str | Path) -> Path:
    """Where the report of a run with this `--output-prefix` lies."""
    prefix = Path(prefix)
    return prefix.parent / REPORT_FOLDER / (prefix.name + REPORT_SUFFIX)


def _paths(prefix: Path) -> list[Path]:
    """Where a report may lie: now, and beside the data set, where earlier releases wrote it."""
    return [report_path(prefix), prefix.with_name(prefix.name + REPORT_SUFFIX)]


def publish(data_sets: Sequence[Any], prefix: str, report: dict[str, Any]) -> None:
    """Give all data sets of a run (`IndexedWriter`s, finished) their final names; the report, which says that all of
    them are new, comes last.
    """
    path = report_path(prefix)
    path.parent.mkdir(exist_ok=True)
    for old in _paths(Path(prefix)):
        old.unlink(missing_ok=True)
    for one in data_sets:
        one.publish()
    disk.write_whole(path, json.dumps(report, indent=2) + "\n")


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a report says of a tokenizer."""
    names = ("name", "path", "sha256", "vocab_size", "bos_id", "eos_id")
    return {name: getattr(tokenizer, name) for name in names} | {"path": str(tokenizer.path)}


def versions() -> dict[str, str]:
    """The versions of everything that can change an id."""
    libraries = {name: version(name) for name in ("numpy", "sentencepiece", "tokenizers")}
    return {"megatron_mixtral": megatron_mixtral.__version__, "python": platform.python_version(), **libraries}


def find_report(dataset: str) -> dict[str, Any] | None:
    """The report of the run that wrote a dataset (a prefix), or None. There is one for all keys of a run.

    Raises `DataError` for a report that cannot be read.
    """
    prefix = Path(dataset.removesuffix(".bin").removesuffix(".idx"))
    own = _paths(prefix)
    others = (path for place in own for path in sorted(place.parent.glob("*" + REPORT_SUFFIX)))
    for path in [*own, *others]:
        stem = path.name.removesuffix(REPORT_SUFFIX)
        if not path.is_file() or not (prefix.name == stem or prefix.name.startswith(stem + "_")):
            continue
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if "merged" in report:
                names = {stem}
            else:
                names = {Path(counts["output"]).name for counts in report["keys"].values()}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a report of preprocessing: {error!r}. Remove it.") from error
        if prefix.name in names:
            return report
    return None
