"""Parts of an evaluation to `results.json` in lm-eval's form, a table beside a reference, what could explain a gap."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mixtral.config import MixtralConfig, preset, read_json
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.evaluation.mmlu import CATEGORIES, CATEGORY_OF, QUESTIONS

PUBLISHED = {"mixtral-8x7b": 0.706, "mixtral-8x22b": 0.778}  # MMLU, 5-shot: arXiv 2401.04088; the model's announcement
_ROTARY_BASE = 1e6
_SAMPLE = 1 << 20  # bytes of each end of a file
_BY_TASK = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "groups", "group_subtasks")


def fingerprint(directory: Path) -> str:
    """sha256 of names, sizes, and the first and last MiB of every file: a model's weights are not read for it twice."""
    digest = hashlib.sha256()
    for path in sorted(one for one in directory.rglob("*") if one.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory).as_posix()} {size}\n".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_SAMPLE))
            stream.seek(max(size - _SAMPLE, 0))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def depends_on(config: MixtralConfig, directory: Path, tokenizer: Any, adapter: Path | None = None,
               **settings: Any) -> dict[str, Any]:
    """What figures depend on, beside the code: plain values, one line each in the report. Of a model with adapters,
    they are in the directory `adapter`.
    """
    if adapter is not None:
        settings |= {"adapter": str(adapter), "adapter_fingerprint": fingerprint(adapter)}
    return {
        "checkpoint": str(directory), "checkpoint_fingerprint": fingerprint(directory), "rope_theta": config.rope_theta,
        "tokenizer_sha256": getattr(tokenizer, "sha256", None), "bos_id": getattr(tokenizer, "bos_id", None),
    } | settings


def read_results(path: Path) -> dict[str, Any]:
    """The `results.json` of an evaluation, in lm-eval's form. `ConfigError` for a file that is no JSON, `DataError` for
    one of another form, or without a figure.
    """
    whole = read_json(path)
    tables = [whole.get(key, {}) for key in ("groups", "results")]
    rows = [row for table in tables if isinstance(table, dict) for row in table.values()]
    if not all(isinstance(one, dict) for one in (*tables, *rows)) or not any(map(figures_of, rows)):
        raise DataError(f"{path} holds no figure: expected results.json of an evaluation, in lm-eval's form")
    return whole


def check_new(output: Path) -> None:
    """`ConfigError` for a folder in which tasks of an evaluation are finished."""
    if parts := [*(output / "parts").glob("*.json")]:
        raise ConfigError(f"{output / 'parts'} holds {len(parts)} finished tasks: go on with --resume, or give another "
                          "--output")


def finished(output: Path, depends_on: Mapping[str, Any], resume: bool) -> dict[str, dict[str, Any]]:
    """The parts of an evaluation that are finished, by task. `ConfigError` for such without `resume`, for one that was
    measured otherwise, and for one that is none.
    """
    if not resume:
        check_new(output)
    parts = {}
    for path in sorted((output / "parts").glob("*.json")):
        parts[path.stem] = part = read_json(path)
        if absent := {"depends_on", "lm_eval", "counts", "prompts_sha256"} - part.keys():
            raise ConfigError(f"{path} is no finished task of an evaluation, it has no {min(absent)}: remove it")
        was = part["depends_on"]
        changed = [f"{key}: {was.get(key)!r} then, {depends_on.get(key)!r} now"
                   for key in sorted(was.keys() | depends_on.keys()) if was.get(key) != depends_on.get(key)]
        if changed:
            raise ConfigError(f"{path} was measured otherwise: {'; '.join(changed)}; give another --output")
    return parts


def assemble(parts: Mapping[str, Mapping[str, Any]], depends: Mapping[str, Any], is_mmlu: bool) -> dict[str, Any]:
    """lm-eval's results of all parts as one; MMLU's groups; what was counted, and what all of it depends on. Nothing in
    it is of the time, so a second evaluation of the same gives the same.
    """
    whole: dict[str, Any] = {key: {} for key in _BY_TASK}
    for part in parts.values():
        for key in _BY_TASK:
            whole[key] |= part["lm_eval"].get(key, {})
    if is_mmlu:
        _group_mmlu(whole)
    counts = {key: sum(part["counts"].get(key, 0) for part in parts.values())
              for key in ("requests", "requested", "distinct", "read", "kept", "truncated")}
    prompts = hashlib.sha256("".join(parts[name]["prompts_sha256"] for name in sorted(parts)).encode()).hexdigest()
    return whole | {"config": dict(depends) | {"prompts_sha256": prompts}, "tokens": counts}


def _group_mmlu(whole: dict[str, Any]) -> None:
    """Categories and total, each question with the same weight, by lm-eval's own formulas."""
    names = sorted(name for name in whole["results"] if name.removeprefix("mmlu_") in CATEGORY_OF)
    members = {f"mmlu_{one}": [name for name in names if CATEGORY_OF[name.removeprefix("mmlu_")] == one]
               for one in CATEGORIES}
    for group, subjects in ({"mmlu": names} | members).items():
        if subjects:
            whole["groups"][group] = _pooled([whole["results"][name] for name in subjects],
                                             [whole["n-samples"][name]["effective"] for name in subjects])
            whole["groups"][group]["alias"] = group.removeprefix("mmlu_").replace("_", " ")
            whole["n-samples"][group] = {"effective": sum(whole["n-samples"][name]["effective"] for name in subjects)}
    whole["group_subtasks"] |= {"mmlu": [group for group in members if members[group]]} | {
        group: subjects for group, subjects in members.items() if subjects}


def _pooled(results: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr

    name, rule = accuracy_of(results[0]).split(",")
    errors = [one[f"{name}_stderr,{rule}"] for one in results]
    known = all(isinstance(one, float) for one in errors)
    return {f"{name},{rule}": aggregate_subtask_metrics([one[f"{name},{rule}"] for one in results], sizes),
            f"{name}_stderr,{rule}": float(pooled_sample_stderr(errors, sizes)) if known else "N/A"}


def figures_of(results: Mapping[str, Any]) -> dict[str, float]:
    """A task's figures, standard errors apart, by lm-eval's keys: metric and filter, as in `acc,none`."""
    return {key: value for key, value in results.items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)}


def accuracy_of(results: Mapping[str, Any]) -> str:
    """The key of a task's share of right answers; its first figure's where it has none. `IndexError` without any."""
    figures = [*figures_of(results)]
    return next((key for key in figures if key.startswith(("acc,", "exact_match,"))), figures[0])


def published(config: MixtralConfig, accuracy: str = "acc,none") -> dict[str, Any]:
    """The published figure of a model of this shape, in lm-eval's form; empty for another one."""
    for name, figure in PUBLISHED.items():
        other = preset(name)
        if (config.hidden_size, config.num_hidden_layers, config.num_local_experts) == (
                other.hidden_size, other.num_hidden_layers, other.num_local_experts):
            return {"groups": {"mmlu": {accuracy: figure}}}
    return {}


def table(whole: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """Markdown, in the columns of the published recipe: data set, questions, reference, ours; and standard errors."""
    lines = ["| data set | questions | reference | ours | standard error |", "|:---|---:|---:|---:|---:|"]
    known = reference.get("results", {}) | reference.get("groups", {})
    for name, results in (whole["groups"] | whole["results"]).items():
        for key, value in figures_of(results).items():
            metric, _, rule = key.partition(",")
            label = "MMLU" if name == "mmlu" else str(results.get("alias", name)).strip()
            if len({one.partition(",")[0] for one in results if "," in one and "_stderr" not in one}) > 1:
                label += f" ({metric})"
            count = whole["n-samples"].get(name, {}).get("effective", "")
            cells = (known.get(name, {}).get(key), value, results.get(f"{metric}_stderr,{rule}"))
            lines.append(f"| {label} | {count} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) and not math.isnan(value) else ""


def remarks(whole: Mapping[str, Any], is_mmlu: bool, model_type: str = "mixtral") -> list[str]:
    """A sentence for each thing that makes figures differ from others' of the same model. A dense `model_type` has
    rotary bases of its own.
    """
    config, tokens, found = whole["config"], whole["tokens"], []
    if config["bos_id"] is None:
        found.append("The tokenizer has no BOS, so no context begins with one: the model was trained with it, and "
                     "scores less without. Check --tokenizer-model.")
    if model_type == "mixtral" and config["rope_theta"] != _ROTARY_BASE:
        found.append(f"The model's rotary base is {config['rope_theta']:g}, Mixtral's is {_ROTARY_BASE:g}: with 10000 "
                     "the 8x7B is known to score about 0.66 instead of 0.706.")
    if tokens["truncated"]:
        found.append(f"{tokens['truncated']} of {tokens['requests']} contexts were longer than {config['max_length']} "
                     "tokens and lost their beginning: raise --max-length.")
    if config.get("limit") is not None:
        found.append(f"Only the first {config['limit']} questions of each task were asked (--limit).")
    if is_mmlu:
        subjects = [name for name in whole["results"] if name.removeprefix("mmlu_") in CATEGORY_OF]
        count = whole["n-samples"]["mmlu"]["effective"]
        if config.get("limit") is None and (len(subjects), count) != (len(CATEGORY_OF), QUESTIONS):
            found.append(f"These are {count} questions of {len(subjects)} subjects; MMLU has {QUESTIONS} of "
                         f"{len(CATEGORY_OF)}.")
    return found
