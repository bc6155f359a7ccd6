"""lm-eval's tasks, one after another. Each is kept as a file when it is finished, so a killed evaluation can go on.

A part has lm-eval's own results of one task, what was counted, and what they depend on: one of another checkpoint, data
set or setting is refused, not mixed in.
"""

import difflib
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate as run_tasks
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from megatron_mixtral import disk
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.evaluation.harness import Harness
from megatron_mixtral.evaluation.report import finished

logger = logging.getLogger(__name__)

_SEED = 1234  # of few-shot samplers that draw: lm-eval's own
_BOOTSTRAPS = 100000  # of metrics whose standard error has no formula: lm-eval's own
Part = dict[str, Any]


def evaluate(harness: Harness, tasks: Mapping[str, dict[str, Any] | str], output: Path | None,
             depends_on: Mapping[str, Any], *, sizes: Mapping[str, int] | None = None, limit: int | None = None,
             shots: int | None = None, include: Path | None = None, samples: bool = False,
             resume: bool = False) -> dict[str, Part]:
    """Name -> part of every task: a task of lm-eval's by name, or as its configuration.

    `limit` questions of each, `shots` examples before each where the task does not fix them, `include` a folder of
    further tasks. With `samples`, every question and answer goes to `output/samples/NAME.jsonl`. `sizes` are the tasks'
    shares of the time left. Without `output` nothing is written. `ConfigError` for parts that are there already without
    `resume`, or of something else.
    """
    kept = {} if output is None else finished(output, depends_on, resume)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # for each task it explains how settings could be given
    named = [task for name, task in tasks.items() if name not in kept and isinstance(task, str)]
    manager = check_names(named, include)
    sizes = {name: (sizes or {}).get(name, 1) for name in tasks if name not in kept}
    if kept:
        logger.info("%d of %d tasks are finished", len(kept.keys() & tasks.keys()), len(tasks))
    found, begin, done = {}, time.monotonic(), 0
    for name, task in tasks.items():
        if name in kept:
            found[name] = kept[name]
            continue
        found[name], took = _one(harness, manager, name, task, limit, shots, output if samples else None)
        found[name]["depends_on"] = dict(depends_on)
        if output is not None:
            (output / "parts").mkdir(parents=True, exist_ok=True)
            disk.write_whole(output / "parts" / f"{name}.json", _json(found[name]))
        done += sizes[name]
        left = (time.monotonic() - begin) * (sum(sizes.values()) / done - 1)
        counts = found[name]["counts"]
        # A run in training asks often, and has lines of its own.
        logger.log(logging.DEBUG if output is None else logging.INFO, "%s: %d tokens read for %d asked, %.1f s; "
                   "%d of %d tasks, about %.0f s left", name, counts["read"], counts["requested"], took, len(found),
                   len(tasks), left)
    return found


def check_names(names: Iterable[str], include: Path | None) -> TaskManager:
    """What lm-eval knows these tasks by, its own ones and those of the folder `include`. `ConfigError`, with the names
    that are near, for one that is in neither.
    """
    folder = None if include is None else str(include)
    manager = _manager(folder, False)
    if not {*names} <= {*manager.all_tasks}:
        manager = _manager(folder, True)
    for name in sorted({*names} - {*manager.all_tasks}):
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        raise ConfigError(f"there is no task {name!r} among lm-eval's" + (f" and those of {folder}" if folder else "")
                          + (f"; is it {' or '.join(near)}?" if near else ""))
    return manager


@cache
def _manager(folder: str | None, everything: bool) -> TaskManager:
    """With `everything` it reads lm-eval's own 14,000, too, which takes seconds."""
    return TaskManager(include_defaults=everything, include_path=folder)


def _one(harness: Harness, manager: TaskManager, name: str, task: dict[str, Any] | str, limit: int | None,
         shots: int | None, output: Path | None) -> tuple[Part, float]:
    begin, before = time.monotonic(), harness.counts.copy()
    try:
        loaded = manager.load([task])
    except (KeyError, ValueError, FileNotFoundError, ConnectionError) as error:
        raise ConfigError(f"task {name} cannot be loaded: {error}; tasks of lm-eval that are not local need a network, "
                          "or --include-path DIR with a task of local files") from error
    for one in loaded["tasks"].values():
        fixed = one.get_config("num_fewshot")
        if fixed is None or (shots is not None and fixed != 0):  # a task that says 0 means it
            one.set_config(key="num_fewshot", value=shots or 0)
        one.set_fewshot_seed(seed=_SEED)
    results = run_tasks(harness, loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS)
    answers = results.pop("samples")
    for config in results["configs"].values():
        config.pop("custom_dataset", None)  # a function: its name is another one in every process
    asked = hashlib.sha256()
    for place in sorted(answers):
        for answer in answers[place]:
            asked.update(json.dumps(answer["arguments"], default=str, ensure_ascii=False).encode())
    if output is not None:
        (output / "samples").mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(answer, default=handle_non_serializable, ensure_ascii=False)
                 for place in sorted(answers) for answer in answers[place])
        disk.write_whole(output / "samples" / f"{name}.jsonl", "".join(line + "\n" for line in lines))
    counts = {key: harness.counts[key] - before[key] for key in sorted(harness.counts)}
    part = json.loads(_json({"lm_eval": results, "counts": counts, "prompts_sha256": asked.hexdigest()}))
    return part, time.monotonic() - begin


def _json(value: Any) -> str:
    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
