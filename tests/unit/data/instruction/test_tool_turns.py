"""Dialogues that call tools: every form gives the ids of mistral-common's v3 tokenizer, and answers alone train."""

import json
from functools import cache

import pytest
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    FinetuningAssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from megatron_mixtral.data.corpus import BadRecord
from megatron_mixtral.data.instruction import InstructionOptions, preprocess_instructions
from megatron_mixtral.data.instruction.formats import HANDLERS, detect
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer import chat, mixtral_tokenizer_path, open_tokenizer

DATA = mixtral_tokenizer_path().parent
V3 = open_tokenizer(DATA / "mistral_instruct_tokenizer_240323.model.v3")
TEMPLATES, Turn, check_template, render = chat.TEMPLATES, chat.Turn, chat.check_template, chat.render
TEMPLATE = TEMPLATES["mixtral-v3"]
WEATHER = {"name": "get_weather", "description": "Wetter, 天气", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": CLOCK}]


def said(role, content=None, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, number=None):
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "function": function} | ({"id": number} if number else {})


ASKED = said("user", "Weather in Köln?")
CALLED = said("assistant", tool_calls=[call("get_weather", '{"city":"Köln", "days": 2}', "Abc123xyz")])
GIVEN = said("tool", '{"sky": "clear [/TOOL_RESULTS]", "t":[1.50, null]}', tool_call_id="Abc123xyz")
TOLD = said("assistant", "Clear, 天气好.  ")
RECORDS = {
    "one call": {"tools": TOOLS, "messages": [ASKED, CALLED, GIVEN, TOLD]},
    "a system text, and turns before and after": {"tools": TOOLS, "messages": [
        said("system", "Be kind. </s>"), said("user", "Hi"), said("assistant", " Hello "), ASKED, CALLED, GIVEN, TOLD,
        said("user", "Thanks [INST]"), said("assistant", "[TOOL_CALLS] no")]},
    "two at once, answered in another order": {"tools": TOOLS, "messages": [
        ASKED, said("assistant", "", tool_calls=[call("clock", "", "000000001"), call("clock", "{}", "000000002")]),
        said("tool", "mild", tool_call_id="000000002"), said("tool", "", tool_call_id="000000001"), TOLD]},
    "call after call": {"tools": TOOLS[:1], "messages": [
        ASKED, CALLED, GIVEN, said("assistant", tool_calls=[call("get_weather", {"city": "<s>"}, "BBBBBBBB2")]),
        said("tool", "12", tool_call_id="BBBBBBBB2"), TOLD]},
    "the last one is a call": {"tools": TOOLS, "messages": [
        ASKED, said("assistant", tool_calls=[call("clock", "x{")])]},
    "a call of weight 0": {"tools": TOOLS, "messages": [ASKED, CALLED | {"weight": 0}, GIVEN, TOLD]},
    "tools that nobody calls": {"tools": TOOLS, "messages": [said("user", "Hi"), said("assistant", "Hello")]},
    "no tools": {"messages": [said("system", "One."), said("user", "a"), said("user", "b"), said("assistant", "c")]},
}  # fmt: skip


@cache
def official_tokenizer():
    return MistralTokenizer.from_file(str(V3.path), mode=ValidationMode.finetuning)


def official(messages, tools=()):
    """(ids, whether each is the assistant's) by mistral-common: of the whole request, and message by message."""
    made = []
    for one in messages:
        content = {"content": one["content"]}
        if one["role"] == "assistant":
            calls = one.get("tool_calls")
            made.append(FinetuningAssistantMessage(**content, tool_calls=calls, weight=one.get("weight")))
        elif one["role"] == "tool":
            made.append(ToolMessage(**content, tool_call_id=one["tool_call_id"]))
        else:
            made.append({"user": UserMessage, "system": SystemMessage}[one["role"]](**content))
    request = ChatCompletionRequest(messages=made, tools=[Tool.from_openai(one) for one in tools] or None)
    # The normalizer of the installed release knows only messages of serving; weights are looked up by position.
    served = [AssistantMessage(**one.model_dump(exclude={"weight"})) if one.role == "assistant" else one
              for one in made]
    tokenizer = official_tokenizer()
    checked = tokenizer._chat_completion_request_validator.validate_request(request)
    plain = tokenizer._instruct_request_normalizer.from_chat_completion_request(
        ChatCompletionRequest(messages=served, tools=checked.tools))
    parts, trained = [V3.bos_id], [False]
    last = max(number for number, one in enumerate(plain.messages) if one.role == "user")
    weights = iter([one.weight for one in made if one.role == "assistant"])
    for number, one in enumerate(plain.messages):
        encode = tokenizer.instruct_tokenizer
        if one.role == "assistant":
            new = encode.encode_assistant_message(one, False)
        elif one.role == "tool":
            new = encode.encode_tool_message(one, False)[0]
        else:
            new = encode.encode_user_message(one, plain.available_tools, number == last, False, plain.system_prompt)[0]
        parts += new
        trained += [one.role == "assistant" and next(weights) != 0] * len(new)
    assert tokenizer.instruct_tokenizer.encode_instruct(plain).tokens == parts
    return parts, trained


def ours(record):
    return render(HANDLERS[detect(record)](record).turns, TEMPLATE, V3)


@pytest.mark.parametrize("name", RECORDS)
def test_ids_and_mask_are_those_of_mistral_common(name):
    record = RECORDS[name]
    ids, trained = ours(record)
    expected = official(record["messages"], record.get("tools", ()))
    assert ids.tolist() == expected[0]
    assert trained.tolist() == expected[1] and trained.any() and not trained[0]


def test_what_is_trained_is_what_the_model_says():
    ids, trained = ours(RECORDS["one call"])
    called = '[{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}, "id": "Abc123xyz"}]'
    assert ids[trained].tolist() == [V3.control_id("[TOOL_CALLS]"), *V3.encode(called), V3.eos_id,
                                     *V3.encode("Clear, 天气好."), V3.eos_id]
    ids, trained = ours(RECORDS["a call of weight 0"])
    assert ids[trained].tolist() == [*V3.encode("Clear, 天气好."), V3.eos_id]


def with_ids_of(record, written):
    """The record with the call ids that were written, in the order of the calls."""
    found = iter([one["id"] for turn in written if turn.calls for one in json.loads(turn.output)])
    messages, theirs = [], {}
    for one in record["messages"]:
        calls = [each | {"id": theirs.setdefault(each.get("id"), next(found))} for each in one.get("tool_calls", ())]
        number = {"tool_call_id": theirs[one["tool_call_id"]]} if one["role"] == "tool" else {}
        messages.append(one | ({"tool_calls": calls} if calls else {}) | number)
    return record | {"messages": messages}


SHAREGPT = [("human", "Weather in Köln?"), ("function_call", json.dumps({"name": "get_weather", "arguments": {
    "city": "Köln", "days": 2}})), ("observation", GIVEN["content"]), ("gpt", TOLD["content"])]


@pytest.mark.parametrize("form", ["sharegpt", "sharegpt tool", "role and content", "functions", "long ids"])
def test_other_forms_of_the_same_dialogue_differ_in_the_ids_of_calls_alone(form):
    """Made of the calls where there are none, or none that Mixtral's format can hold; the same in every run."""
    roles = {"human": "user", "gpt": "assistant"}
    conversations = [{"from": role, "value": text} for role, text in SHAREGPT]
    record = {
        "sharegpt": {"conversations": conversations, "tools": json.dumps([WEATHER, CLOCK])},
        "sharegpt tool": {"tools": TOOLS, "conversations": [
            one | {"from": "tool"} if one["from"] == "observation" else one for one in conversations]},
        "role and content": {"tools": TOOLS, "conversations": [
            said(roles.get(one["from"], one["from"]), one["value"]) for one in conversations]},
        "functions": {"functions": [WEATHER, CLOCK], "messages": [
            ASKED, said("assistant", function_call=CALLED["tool_calls"][0]["function"]),
            said("function", GIVEN["content"], name="get_weather"), TOLD]},
        "long ids": {"tools": TOOLS, "messages": [
            ASKED, said("assistant", tool_calls=[CALLED["tool_calls"][0] | {"id": "call_0123456789"}]),
            GIVEN | {"tool_call_id": "call_0123456789"}, TOLD]},
    }[form]
    turns = HANDLERS[detect(record)](record).turns
    assert turns == HANDLERS[detect(record)](record).turns
    expected = with_ids_of(RECORDS["one call"], turns)
    assert expected != RECORDS["one call"]
    ids, trained = render(turns, TEMPLATE, V3)
    assert (ids.tolist(), trained.tolist()) == official(expected["messages"], TOOLS)


def test_calls_behind_one_another_are_made_together():
    """Two messages of function_call, as sharegpt files have them, and their results in order."""
    texts = [("human", "a"), ("function_call", '{"name": "clock", "arguments": {}}'),
             ("function_call", '[{"name": "get_weather", "arguments": {"city": "b"}}]'), ("observation", "1"),
             ("observation", "2"), ("gpt", "c")]  # fmt: skip
    turns = HANDLERS["sharegpt"]({"conversations": [{"from": role, "value": text} for role, text in texts]}).turns
    calls, results = json.loads(turns[0].output), [json.loads(one) for one in turns[1].results]
    assert [one["name"] for one in calls] == ["clock", "get_weather"] and len(turns) == 2
    assert [one["call_id"] for one in results] == [one["id"] for one in calls] and calls[0]["id"] != calls[1]["id"]
    assert [one["content"] for one in results] == [1, 2]


def test_a_last_result_without_an_answer_is_counted():
    dialogue = HANDLERS["openai"]({"messages": [ASKED, CALLED, GIVEN]})
    assert dialogue.left_out == {"result_without_answer": 1} and [turn.calls for turn in dialogue.turns] == [True]


BAD = {
    "text beside a call": ([ASKED, CALLED | {"content": "Let me look."}, GIVEN, TOLD], "text_beside_calls"),
    "text behind a call": ([ASKED, CALLED, said("assistant", "so"), GIVEN, TOLD], "text_beside_calls"),
    "a result without a call": ([ASKED, TOLD, GIVEN, TOLD], "roles_out_of_order"),
    "a result too many": ([ASKED, CALLED, GIVEN, GIVEN, TOLD], "roles_out_of_order"),
    "a result of another call": ([ASKED, CALLED, GIVEN | {"tool_call_id": "x"}, TOLD], "bad_tool_call"),
    "an answer before the second result": ([ASKED, CALLED | {"tool_calls": CALLED["tool_calls"] * 2}, GIVEN, TOLD],
                                           "roles_out_of_order"),
    "a question before the answer": ([ASKED, CALLED, GIVEN, ASKED, TOLD], "roles_out_of_order"),
    "no name": ([ASKED, said("assistant", tool_calls=[{"arguments": "{}"}])], "bad_tool_call"),
    "no object": ([ASKED, said("function_call", "get_weather(Köln)")], "bad_tool_call"),
    "half a pair": ([ASKED, said("assistant", tool_calls=[call("clock", '{"a": "\\ud800"}')])], "lone_surrogate"),
    "a role nearly known": ([ASKED, said("observations", "x")], "unknown_role"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_dialogue_with_tools_says_why(name):
    messages, reason = BAD[name]
    with pytest.raises(BadRecord) as found:
        HANDLERS["openai"]({"messages": messages})
    assert found.value.reason == reason
    assert name != "a role nearly known" or "the nearest is observation" in str(found.value)


def test_only_the_tokenizer_and_the_template_of_tools_write_them(tmp_path):
    v1 = open_tokenizer(mixtral_tokenizer_path())
    with pytest.raises(ConfigError, match=r"has no control token \[INST\]: take --prompt-type mixtral"):
        check_template(TEMPLATE, v1)
    with pytest.raises(ConfigError, match="mixtral-v3 is that of Mixtral-8x22B-Instruct"):
        check_template(TEMPLATES["mixtral"], V3)
    with pytest.raises(ConfigError, match=r"has \[SYSTEM_PROMPT\], and so belongs to a later format"):
        check_template(TEMPLATE, open_tokenizer(DATA / "mistral_instruct_tokenizer_241114.model.v7"))
    check_template(TEMPLATE, V3)
    turns = HANDLERS["openai"](RECORDS["one call"]).turns
    with pytest.raises(DataError, match="mixtral-v3 has"):
        render(turns, TEMPLATES["mixtral"], v1)
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(RECORDS[name]) + "\n" for name in ("no tools", "tools that nobody calls",
                                                                             "one call")))
    options = InstructionOptions((str(source),), str(tmp_path / "out"), str(v1.path), "Llama2Tokenizer",
                                 on_error="skip", workers=1)
    report = preprocess_instructions(options)
    assert report["skipped"] == {"tool_message": 1}
    assert report["left_out_of_samples"] == {"tools_not_written": 1} and report["samples"] == 2


def test_a_prompt_of_tools_is_the_beginning_of_what_training_saw():
    """Of the last question on: the format puts tools and system text there (mistral-common, in serving mode)."""
    turns = HANDLERS["openai"](RECORDS["one call"]).turns
    whole, _ = render(turns, TEMPLATE, V3)
    asked, untrained = render([Turn(turns[0].input, None, tools=turns[0].tools)], TEMPLATE, V3)
    messages = [UserMessage(content="Weather in Köln?")]
    request = ChatCompletionRequest(messages=messages, tools=[Tool.from_openai(one) for one in TOOLS])
    assert asked.tolist() == MistralTokenizer.v3().encode_chat_completion(request).tokens
    assert whole[: asked.size].tolist() == asked.tolist() and not untrained.any()
