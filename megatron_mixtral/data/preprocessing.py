"""Preprocessing as a function, for a Python program: plain text or dialogues, as its arguments say."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_mixtral.data.instruction import InstructionOptions, preprocess_instructions
from megatron_mixtral.data.options import Options
from megatron_mixtral.data.text import TextOptions, preprocess_text
from megatron_mixtral.errors import ConfigError


def preprocess(
    inputs: str | Path | Sequence[str | Path], output_prefix: str | Path, *, tokenizer: str | Path,
    handler: str = "none", **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Tokenize files, folders or glob patterns; returns the report, which also lies in `reports/` beside the data sets.

    `tokenizer` is a directory with `tokenizer.json` or `tokenizer.model`, or such a file. With `handler` "none" the
    inputs are plain text and `{output_prefix}_text_document.bin/.idx` is written; else they are dialogues of that form.

    Settings of both: `append_eod`, `prepend_bod`, `workers` (1), `on_error` ("stop" or "skip"), `log_interval`,
    `tokenizer_type`. Of plain text: `keys` (("text",)), `tokenizer_engine`, `allow_special_in_text`, `num_shards`,
    `shard_index`. Of dialogues: `prompt_type`, `seq_length`, `pack`. They mean what the flags of these names mean.

    With `workers` above 1 in a program of several threads, workers import the program's main module: guard its calls
    with `if __name__ == "__main__":`.

    Raises:
        ConfigError: settings, paths or a tokenizer that cannot work.
        DataError: a bad record unless such are skipped, nothing to write, or a worker that died. No output is left.
    """
    kind, more = (TextOptions, {}) if handler == "none" else (InstructionOptions, {"handler": handler})
    if unknown := set(settings) - {field.name for field in fields(kind)} - {"inputs", "output_prefix", "handler"}:
        what = "plain text" if handler == "none" else "dialogues"
        raise ConfigError(f"preprocess() of {what} has no setting {', '.join(sorted(unknown))}; its settings are "
                          f"{', '.join(field.name for field in fields(kind)[3:])}.")  # fmt: skip
    given = [inputs] if isinstance(inputs, str | Path) else inputs
    return run(kind(tuple(map(str, given)), str(output_prefix), str(tokenizer), **more, **settings))


def run(options: Options) -> dict[str, Any]:
    """The run of `TextOptions` or `InstructionOptions`; see `preprocess`."""
    return preprocess_text(options) if isinstance(options, TextOptions) else preprocess_instructions(options)
