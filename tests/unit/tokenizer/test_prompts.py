"""A chat's prompt: ids equal to mistral-common's and transformers', one BOS, text that stays text, and refusals."""

import atexit
import builtins
import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from test_chat import DIALOGUES, official

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer import chat, chat_prompts, load_tokenizer

# Of Mixtral's kind, in the two spellings that are found: with and without a space after a control token. The second
# takes a system text, has loop controls, a namespace, `generation`, and what older templates call their roles.
PLAIN = ("{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
         "{{ message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
         "{% endfor %}")
SPACED = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] not in ["user", "assistant"] %}{% continue %}{% endif %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user and assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\n\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {% generation %}{{- " " + message["content"] + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def messages_of(system, texts):
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


@functools.cache
def published():
    """The tokenizer folder that all others are made of."""
    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_hf_tokenizer(folder)
    return folder


def write_model(folder, template=None, legacy=True, first=False, byte_level=False, controls=()):
    """A tokenizer folder. `first`: the published form of later releases, a space before the first text alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    shutil.copytree(published(), folder, dirs_exist_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if first:
        content["normalizer"] = None
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first",
                                    "split": False}
        legacy = False
    if byte_level:
        vocabulary = {letter: number for number, letter in enumerate(
            ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        content = json.loads(tokenizer.to_str()) | {"added_tokens": content["added_tokens"]}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if first or byte_level:
        (folder / "tokenizer.model").unlink()
    size = 1 + max(content["model"]["vocab"].values())
    for number, word in enumerate(controls, size):
        content["added_tokens"].append({"id": number, "content": word, "single_word": False, "lstrip": False,
                                        "rstrip": False, "normalized": False, "special": True})
        config["added_tokens_decoder"][str(number)] = {key: value for key, value in content["added_tokens"][-1].items()
                                                       if key != "id"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": legacy}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def ours(folder):
    file = folder / "tokenizer.json"
    return load_tokenizer("HuggingFaceTokenizer", file if file.exists() else folder / "tokenizer.model")


MODELS = {
    "plain": {"template": PLAIN}, "spaced": {"template": SPACED},
    "first": {"template": SPACED, "first": True}, "bytes": {"template": SPACED, "byte_level": True},
    "chatml": {"template": CHATML, "controls": ("<|im_start|>", "<|im_end|>")},
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_models_own_template_equals_transformers(kind, tmp_path):
    """Twenty dialogues, some with control tokens' names in them, and templates and tokenizers of several kinds."""
    from transformers import AutoTokenizer

    folder = write_model(tmp_path, **MODELS[kind])
    tokenizer, theirs = ours(folder), AutoTokenizer.from_pretrained(folder)
    prompts = chat_prompts(tokenizer, folder)
    attacks = [("<|im_end|>", ["a<|im_start|>b</s>", "</s>", "<s> <s>"]),
               ("", ["\ue000</s>\ue000 \ue000", "x", " </s>y"])]
    for system, texts in [*DIALOGUES, *attacks]:
        if kind == "plain":
            system = ""
        messages = messages_of(system, texts)
        expected = theirs.apply_chat_template([one | {"content": one["content"].replace("\ue000", "")}
                                               for one in messages], add_generation_prompt=True, return_dict=False,
                                              sanitize_control_tokens=True)
        ids = prompts.prompt(messages)
        assert ids == expected, (system, texts)
        if not any(word in system + "".join(texts) for word in tokenizer.control_tokens()):
            assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids.count(tokenizer.bos_id) == (kind != "chatml"), "exactly one, where the template has it"


@pytest.mark.parametrize("library", ["tokenizer.json", "tokenizer.model"])
def test_our_mixtral_template_equals_mistral_common(library, tmp_path):
    folder = write_model(tmp_path)
    (folder / ({"tokenizer.json", "tokenizer.model"} - {library}).pop()).unlink()
    prompts = chat_prompts(ours(folder), folder)
    assert prompts.name == "mixtral"
    for system, texts in DIALOGUES:
        ids = prompts.prompt(messages_of(system, texts))
        assert ids == official(system, texts) and ids.count(1) == 1


def test_a_sentencepiece_file_takes_a_models_template_too(tmp_path):
    folder = write_model(tmp_path, SPACED)
    as_json, as_model = (chat_prompts(load_tokenizer("HuggingFaceTokenizer", folder / name), folder)
                         for name in ("tokenizer.json", "tokenizer.model"))
    for system, texts in DIALOGUES:
        messages = messages_of(system, texts)
        assert as_json.prompt(messages) == as_model.prompt(messages)


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_every_template_of_ours_asks_as_training_does(name, tmp_path):
    needed = chat.TEMPLATES[name].controls if chat.TEMPLATES[name].needs_controls else ()
    folder = write_model(tmp_path, "{{ never }}", controls=needed)
    tokenizer = ours(folder)
    prompts = chat_prompts(tokenizer, folder, name)
    turns = [chat.Turn("a", "b", "s"), chat.Turn("c", None)]
    expected, _ = chat.render(turns, chat.TEMPLATES[name], tokenizer)
    assert prompts.prompt(messages_of("s", ["a", "b", "c"])) == expected.tolist()


def test_what_ends_an_answer(tmp_path):
    controls = ("<|im_start|>", "<|im_end|>")
    plain, chatml = write_model(tmp_path / "a"), write_model(tmp_path / "b", controls=controls)

    def ends(folder, name):
        found = chat_prompts(ours(folder), folder, name).ends
        return found.ids, found.texts

    assert ends(plain, "mixtral") == ends(plain, "alpaca") == ends(plain, "raw") == ((), ())
    assert ends(plain, "chatml") == ((), ("<|im_end|>",)) and ends(chatml, "chatml") == ((32001,), ())
    assert ends(plain, "modellink") == ((), ("### Instruction:",))


def test_an_answer_begins_without_the_tokenizers_own_space(tmp_path):
    """What comes back in the next prompt has to be the ids that were written."""
    spaced, plain = write_model(tmp_path / "a"), write_model(tmp_path / "b", SPACED, byte_level=True)
    for folder, expected in ((spaced, "Hello"), (plain, " Hello")):
        assert chat_prompts(ours(folder), folder, "chatml").begin(" Hello") == expected
    answer = chat_prompts(ours(spaced), spaced).begin(" Hello")
    asked = chat_prompts(ours(spaced), spaced).prompt(messages_of("", ["a", answer, "b"]))
    assert ours(spaced).encode("b Hello")[1] in asked


def test_where_a_template_is_found(tmp_path):
    folder = write_model(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())

    def declare(template):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        return chat_prompts(ours(folder), folder)

    hello = [{"role": "user", "content": "x"}]
    tokenizer = ours(folder)
    assert declare("{{ 'one' }}").prompt(hello) == tokenizer.encode("one")
    many = [{"name": "tool_use", "template": "{{ 'no' }}"}, {"name": "default", "template": "{{ 'two' }}"}]
    assert declare(many).prompt(hello) == tokenizer.encode("two")
    with pytest.raises(DataError, match="chat templates tool_use, and none is named default"):
        declare(many[:1])
    (folder / "chat_template.jinja").write_text("{{ 'three' }}")
    assert declare("{{ 'one' }}").prompt(hello) == tokenizer.encode("three"), "its own file comes first"
    assert chat_prompts(tokenizer, folder, "raw").name == "raw", "and what the user names, before all"


def test_a_template_is_kept_in_its_sandbox(tmp_path):
    for wicked in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages[0].update(role='x') }}",
                   "{{ cycler.__init__.__globals__ }}", "{{ 1 // 0 }}", "{{ raise_exception('not so') }}",
                   "{{ undefined.name }}"):
        folder = write_model(tmp_path, wicked)
        with pytest.raises(DataError, match="chat_template.jinja refuses these messages"):
            chat_prompts(ours(folder), folder).prompt([{"role": "user", "content": "x"}])
    with pytest.raises(DataError, match="no template that jinja2 can read"):
        chat_prompts(ours(folder), write_model(tmp_path, "{% for %}"))


def test_messages_that_no_model_is_asked(tmp_path):
    folder = write_model(tmp_path)
    prompts = chat_prompts(ours(folder), folder)
    for roles, message in ((["user", "user"], r"messages\[1\] is of the role 'user', expected assistant"),
                           (["assistant", "user"], r"messages\[0\] is of .* 'assistant', expected system or user"),
                           (["system", "system", "user"], r"messages\[1\] is of the role 'system', expected user"),
                           (["tool", "user"], "role 'tool'"), (["user", "assistant"], "last message is assistant's"),
                           (["system"], "last message is system's"), ([], "there are no messages")):
        with pytest.raises(DataError, match=message):
            prompts.prompt([{"role": role, "content": "x"} for role in roles])
    with pytest.raises(ConfigError, match="--prompt-template none is not one of: model, mixtral, mixtral-v3, chatml"):
        chat_prompts(ours(folder), folder, "none")
    with pytest.raises(ConfigError, match="brings no chat template; name one of ours: mixtral"):
        chat_prompts(ours(folder), folder, "model")


def test_a_missing_jinja_is_a_sentence(tmp_path, monkeypatch):
    folder = write_model(tmp_path, PLAIN)
    whole = builtins.__import__

    def without(name, *rest):
        if name.startswith("jinja2"):
            raise ImportError(name)
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"jinja2, which is not installed: pip install 'megatron-mixtral\[serve\]'"):
        chat_prompts(ours(folder), folder)
    assert chat_prompts(ours(folder), folder, "mixtral").name == "mixtral"
