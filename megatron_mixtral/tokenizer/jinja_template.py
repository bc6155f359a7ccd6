"""The chat template that a model brings (`chat_template.jinja`): found, compiled in a sandbox, rendered to text.

A template is a program of the model's authors, so it runs in jinja2's immutable sandbox, sees plain strings only, and
its names are those that `transformers` gives: `messages`, `add_generation_prompt`, `tools` and `documents` (none), the
special tokens, `raise_exception`, `strftime_now`, `tojson`, `{% generation %}` and loop controls.
jinja2 is part of the extra [serve]; it is imported when a template is.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer.tokenizer import read_settings

FILE = "chat_template.jinja"
Render = Callable[[Sequence[Mapping[str, str]]], str]


def find_template(directory: Path) -> tuple[str, Path] | None:
    """(the text of a model's template, the file it is from), or None: its own file, else what older models have in
    `chat_template.json` or `tokenizer_config.json`, where it may be a list of templates, one of them "default".

    Raises `DataError` for a list without a default.
    """
    if (directory / FILE).is_file():
        return (directory / FILE).read_text(encoding="utf-8"), directory / FILE
    for path in (directory / "chat_template.json", directory / "tokenizer_config.json"):
        found = read_settings(path).get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            if "default" not in named:
                raise DataError(f"{path} has chat templates {', '.join(map(str, named))}, and none is named default: "
                                f"write the one to use into {directory / FILE}, or give --prompt-template.")
            found = named["default"]
        if isinstance(found, str):
            return found, path
    return None


def compile_template(text: str, path: Path, specials: Mapping[str, str]) -> Render:
    """The template of `path` as a function of the messages. `specials` are names such as `bos_token` with their texts.

    Raises `ConfigError` without jinja2, and `DataError` for a template that is none. The function raises `DataError`
    for what the template refuses, in its own words.
    """
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ConfigError(f"{path} is a template for jinja2, which is not installed: pip install "
                          "'megatron-mixtral[serve]', or take a template of ours: --prompt-template NAME.") from error

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what training has to learn; of a prompt it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[Any]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's own would escape HTML

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse,
                            "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        template = environment.from_string(text)
    except jinja2.TemplateError as error:
        raise DataError(f"{path} is no template that jinja2 can read: {error}") from error

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        plain = [dict(message) for message in messages]
        try:
            return template.render(messages=plain, tools=None, documents=None, add_generation_prompt=True, **specials)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataError(f"{path} refuses these messages: {error}") from error

    return render
