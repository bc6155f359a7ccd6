"""Conversations to tokens: ids and loss mask are born together, piece by piece.

A conversation is a list of `Turn`s, a `Template` says in plain text how one is written, and `render` gives the ids and,
for each id, whether it is trained. What is trained and what is not are never encoded in one string, so the boundary
between a prompt and its answer cannot shift by a token, and generation (which encodes the prompt alone) sees the very
ids that training saw.

Text is text: what stands in a turn never becomes a control token. Only the template's own control strings do, and only
where the vocabulary has them as control tokens.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer.tokenizer import Tokenizer

IGNORED = -100  # the label of an id that is not trained


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    `input` None is plain text: `output` stands alone, without a prompt. `output` None is a question still to be
    answered: rendering stops after its prompt, which is what generation starts from. `loss` says whether the answer is
    trained.

    Of tools: `tools` are those that may be called, `results` what some of them answered, in place of a question, and
    `calls` says that `output` calls tools; each is JSON as `mistral-common` writes it.
    """

    input: str | None
    output: str | None
    system: str = ""
    loss: bool = True
    tools: str = ""
    results: tuple[str, ...] = ()
    calls: bool = False


@dataclass(frozen=True)
class Template:
    """How a turn is written. `{system}`, `{input}` and `{output}` are the holes; everything else is literal.

    `prompt` and `system` (written before the prompt of a turn that has a system text) are not trained; `answer` is, and
    so is the end-of-sequence id after it (`eos`); `separator`, between two turns, is not. `system_prompt` replaces
    `system` + `prompt` where the two are interwoven. `default_system` is the system text of a first turn without one.
    `bos` is where the begin-of-sequence id goes: "first" turn or "every" turn. `strip` removes white space around the
    texts, `strip_end` spaces at the end of an answer. `controls` are the template's strings that are control tokens
    where the vocabulary knows them; `needs_controls`: it must.

    `tools`, `result` and `calls` say how tools, a result and an answer that calls tools are written; empty: this
    template has no words for them. `last`: system texts and tools stand at the last question of the user, wherever they
    were.
    """

    prompt: str
    answer: str = "{output}"
    system: str = ""
    system_prompt: str = ""
    default_system: str = ""
    separator: str = ""
    bos: str = "first"
    eos: bool = True
    strip: bool = False
    strip_end: bool = False
    controls: tuple[str, ...] = ()
    needs_controls: bool = False
    tools: str = ""
    result: str = ""
    calls: str = ""
    last: bool = False


_ALPACA = "Below is an instruction that describes a task{} Write a response that appropriately completes the request."

TEMPLATES = {
    # Mixtral-8x7B-Instruct-v0.1, as mistral-common's v1 instruct tokenizer writes it.
    "mixtral": Template(prompt="[INST] {input} [/INST]", system_prompt="[INST] {system}\n\n{input} [/INST]"),
    # Mixtral-8x22B-Instruct-v0.1, as mistral-common's v3 instruct tokenizer (32,768 ids) writes it, with tools.
    "mixtral-v3": Template(
        prompt="[INST]{input}[/INST]",
        system_prompt="[INST]{system}\n\n{input}[/INST]",
        strip_end=True,
        controls=("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
                  "[/TOOL_RESULTS]"),
        needs_controls=True,
        tools="[AVAILABLE_TOOLS]{tools}[/AVAILABLE_TOOLS]",
        result="[TOOL_RESULTS]{input}[/TOOL_RESULTS]",
        calls="[TOOL_CALLS]{output}",
        last=True,
    ),
    # OpenAI's chat markup.
    "chatml": Template(
        prompt="<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{system}<|im_end|>\n",
        answer="{output}<|im_end|>",
        separator="\n",
        eos=False,
        controls=("<|im_start|>", "<|im_end|>"),
    ),
    # Meta's Llama-2-chat (generation.py of the reference implementation): every turn is a sequence of its own.
    "llama2": Template(
        prompt="[INST] {input} [/INST]",
        system_prompt="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{input} [/INST]",
        answer="{output} ",
        bos="every",
        strip=True,
    ),
    # Llama-3-Instruct, as Meta's ChatFormat writes it.
    "llama3": Template(
        prompt="<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        answer="{output}<|eot_id|>",
        eos=False,
        strip=True,
        controls=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # Stanford's Alpaca without input; an input stands below the instruction, on lines of its own.
    "alpaca": Template(
        prompt="### Instruction:\n{input}\n\n### Response:\n",
        system="{system}\n\n",
        default_system=_ALPACA.format("."),
        separator="\n\n",
    ),
    # What ModelLink's GeneralInstructionHandler writes. Only `--append-eod` ends it with EOS, as there.
    "modellink": Template(
        prompt="### Instruction:\n{input}\n### Response:\n",
        system="\n{system}\n",
        default_system=_ALPACA.format(", paired with an input that provides further context.")
        + " Please note that you need to think through your response logically and step by step.",
        answer="{output}\n",
        eos=False,
    ),
    # No words of ours: the question, then the answer.
    "raw": Template(prompt="{input}", system="{system}"),
}

TEMPLATES["internlm2_chat"] = TEMPLATES["chatml"]  # under XTuner's name
_LATER = "[SYSTEM_PROMPT]"  # a control token since mistral-common's v7
PLAIN = TEMPLATES["raw"]  # how a turn without a question is written, whatever the template


@dataclass(frozen=True)
class Piece:
    """Text to be encoded on its own, or a single control id; trained or not."""

    content: str | int
    trained: bool


def check_template(template: Template, tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` where the tokenizer cannot write the template: an EOS it lacks, or `[INST]` as one id."""
    if template.eos and tokenizer.eos_id is None:
        raise ConfigError("This template ends answers with the end-of-sequence id, and the tokenizer declares no "
                          "eos_token: declare one in tokenizer_config.json, or take --prompt-type chatml.")
    if template.needs_controls:
        missing = [word for word in template.controls if tokenizer.control_id(word) is None]
        later = tokenizer.control_id(_LATER) is not None
        if missing or later:
            raise ConfigError("This template is that of the v3 tokenizer, of Mixtral-8x22B-Instruct; this tokenizer "
                              + (f"has no control token {missing[0]}: take --prompt-type mixtral, the one of the first "
                                 "Mixtral." if missing else f"has {_LATER}, and so belongs to a later format. Take "
                                 "another --prompt-type."))
    elif "[INST]" in template.prompt and tokenizer.control_id("[INST]") is not None:
        raise ConfigError("This template writes [INST] as text, as the first Mixtral and Llama-2 do; the tokenizer has "
                          "a control token of that name, and so belongs to a later format. Take another "
                          "--prompt-type: mixtral-v3 is that of Mixtral-8x22B-Instruct.")


def render(turns: Sequence[Turn], template: Template, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """A conversation -> (ids, trained): int32 and bool, both (tokens,).

    The first id is the begin-of-sequence id where the tokenizer has one. Every piece of text is encoded alone.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for piece in pieces(turns, template, tokenizer):
        new = [piece.content] if isinstance(piece.content, int) else tokenizer.encode(piece.content)
        ids += new
        trained += [piece.trained] * len(new)
    return np.array(ids, dtype=np.int32), np.array(trained, dtype=bool)


def pieces(turns: Sequence[Turn], template: Template, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The pieces of a conversation in order, see `render`."""
    for number, turn in enumerate(_at_the_last(turns) if template.last else turns):
        form = PLAIN if turn.input is None else template
        if tokenizer.bos_id is not None and (number == 0 or form.bos == "every"):
            yield Piece(tokenizer.bos_id, False)
        if (turn.results or turn.calls) and not form.calls:
            raise DataError("This template has no words for calls of tools and their results; mixtral-v3 has.")
        if turn.results:
            for result in turn.results:
                yield from _written(form.result, Turn(result, None), form, tokenizer, trained=False)
        elif turn.input is not None:
            yield from _written(_prompt_form(turn, form, first=number == 0), turn, form, tokenizer, trained=False)
        if turn.output is None:
            return
        yield from _written(form.calls if turn.calls else form.answer, turn, form, tokenizer, trained=turn.loss)
        if form.eos and tokenizer.eos_id is not None:
            yield Piece(tokenizer.eos_id, turn.loss)
        if form.separator and number + 1 < len(turns):
            yield from _written(form.separator, turn, form, tokenizer, trained=False)


def _at_the_last(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with all system texts, a blank line between them, and the tools at the last question of the user."""
    last = max((number for number, turn in enumerate(turns) if turn.input is not None and not turn.results), default=-1)
    system = "\n\n".join(turn.system for turn in turns if turn.system)
    tools = next((turn.tools for turn in turns if turn.tools), "")
    return [replace(turn, system=system if number == last else "", tools=tools if number == last else "")
            for number, turn in enumerate(turns)]  # fmt: skip


def _prompt_form(turn: Turn, form: Template, first: bool) -> str:
    """Everything before the answer, with holes."""
    if turn.tools and form.tools:
        return form.tools + _prompt_form(replace(turn, tools=""), form, first)
    if turn.system:
        return form.system_prompt or form.system + form.prompt
    if first and form.default_system:
        return form.system.replace("{system}", form.default_system) + form.prompt
    return form.prompt


_HOLES = ("{system}", "{input}", "{output}", "{tools}")


def _written(form: str, turn: Turn, template: Template, tokenizer: Tokenizer, trained: bool) -> Iterator[Piece]:
    """A form with its holes filled, cut only at control tokens. The texts of the turn are not searched for any."""
    controls = {word: found for word in template.controls if (found := tokenizer.control_id(word)) is not None}
    text = ""
    for part in re.split("(" + "|".join(map(re.escape, (*_HOLES, *controls))) + ")", form):
        if part in controls:
            if text:
                yield Piece(text, trained)
            yield Piece(controls[part], trained)
            text = ""
        elif part in _HOLES:
            content = getattr(turn, part[1:-1]) or ""
            content = content.rstrip(" ") if template.strip_end and part == "{output}" else content
            text += content.strip() if template.strip else content
        else:
            text += part
    if text:
        yield Piece(text, trained)
