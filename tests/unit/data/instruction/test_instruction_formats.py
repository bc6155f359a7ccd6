"""Every form of instruction data gives the same turns, by its name and by its content; what does not fit says why."""

import pytest

from megatron_mixtral.data.corpus import BadRecord
from megatron_mixtral.data.instruction.formats import HANDLERS, detect
from megatron_mixtral.tokenizer import chat

Turn = chat.Turn
TWO = [Turn("Hi", "Hello", "Be kind."), Turn("Who?", "Me.")]

RECORDS = {
    "alpaca": ({"instruction": "Add 1.", "input": "2", "output": "3"}, [Turn("Add 1.\n2", "3")]),
    "alpaca_zh": ({"instruction_zh": "加一。", "input_zh": None, "output_zh": "三"}, [Turn("加一。", "三")]),
    "oasst1": ({"text": "### Human: How?\n### Markdown title\n###Assistant: So:\n### Step 1### Human: More"},
               [Turn("How?\n### Markdown title", "So:\n### Step 1")]),
    "openai": ({"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
                             {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Who?"},
                             {"role": "assistant", "content": "Me."}]}, TWO),
    "sharegpt": ({"system": "Be kind.", "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "Me."}]}, TWO),
    "conversation": ({"conversation": [{"system": "Be kind.", "input": "Hi", "output": "Hello"},
                                       {"input": "Who?", "output": "Me."}]}, TWO),
    "pair": ({"system_prompt": "Be kind.", "question": "Hi", "response": "Hello"}, TWO[:1]),
    "pretrain": ({"text": "Some text. ### Human: not a dialogue"},
                 [Turn(None, "Some text. ### Human: not a dialogue")]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_each_form_by_name_and_by_content(name):
    record, turns = RECORDS[name]
    assert HANDLERS[name](record).turns == turns
    assert detect(record) == name


@pytest.mark.parametrize("keys", ["prompt response", "prompt completion", "question answer", "query response",
                                  "input output"])
def test_a_question_and_its_answer_under_any_pair_of_keys(keys):
    question, answer = keys.split()
    record = {question: "Hi", answer: "Hello", "id": 7}
    assert detect(record) == "pair" and HANDLERS["pair"](record).turns == [Turn("Hi", "Hello")]


@pytest.mark.parametrize("key", ["conversations", "conversation"])
def test_messages_under_another_forms_key_are_messages(key):
    said = RECORDS["openai"][0]["messages"]
    assert HANDLERS[detect({key: said})]({key: said}).turns == TWO


def test_neighbours_of_one_role_are_one_text():
    said = _messages(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e"),
                     ("assistant", "f"))  # fmt: skip
    assert HANDLERS["openai"](said).turns == [Turn("a\n\nb", "c\n\nd"), Turn("e", "f")]
    said["messages"][0]["weight"] = 0  # of a question it says nothing
    assert HANDLERS["openai"](said).turns[0] == Turn("a\n\nb", "c\n\nd")
    said["messages"][3]["weight"] = 0  # half an answer cannot be trained
    with pytest.raises(BadRecord, match="two messages of assistant") as found:
        HANDLERS["openai"](said)
    assert found.value.reason == "roles_out_of_order"


def test_modellinks_handler_always_writes_a_line_for_the_input():
    handler = HANDLERS["GeneralInstructionHandler"]
    assert handler({"instruction": "Hi", "input": "", "output": "Hello"}).turns == [Turn("Hi\n", "Hello")]
    assert handler(RECORDS["alpaca"][0]).turns == [Turn("Add 1.\n2", "3")]


def test_a_record_in_two_languages_is_counted():
    both = RECORDS["alpaca"][0] | RECORDS["alpaca_zh"][0]
    assert detect(both) == "alpaca"
    assert HANDLERS["GeneralInstructionHandler"](both).left_out == {"output_zh_not_read": 1}
    assert HANDLERS["alpaca_zh"](both).left_out == {"output_not_read": 1}
    assert HANDLERS["alpaca"](RECORDS["alpaca"][0]).left_out == {}


@pytest.mark.parametrize(("loss", "expected"), [
    (True, True), (False, False), ("True", True), ("false", False), (0, False), ("1", True), (None, True)])
def test_the_loss_flag_is_a_boolean_a_word_or_absent(loss, expected):
    trained = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "loss": loss}, *trained]
    assert [turn.loss for turn in HANDLERS["openai"]({"messages": messages}).turns] == [expected, True]


@pytest.mark.parametrize(("weight", "expected"), [
    (0, False), (0.0, False), (False, False), (1, True), (1.0, True), (None, True)])
@pytest.mark.parametrize("name", ["openai", "sharegpt", "conversation"])
def test_an_answer_of_weight_0_is_not_trained(name, weight, expected):
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": weight}
    record = {
        "openai": {"messages": [question, answer, question, answer | {"weight": 1}]},
        "sharegpt": {"conversations": [{"from": one["role"], "value": one["content"], **one}
                                       for one in (question, answer, question, answer | {"weight": 1})]},
        "conversation": {"conversation": [{"input": "Hi", "output": "Hello", "weight": weight},
                                          {"input": "Hi", "output": "Hello", "weight": 1}]},
    }[name]
    assert [turn.loss for turn in HANDLERS[name](record).turns] == [expected, True]


def test_an_answer_is_trained_only_where_loss_and_weight_agree():
    answer = {"input": "Hi", "output": "Hello"}
    said = [answer | {"loss": loss, "weight": weight} for loss in (True, False) for weight in (1, 0)]
    assert [turn.loss for turn in HANDLERS["conversation"]({"conversation": said}).turns] == [True, False, False, False]


def test_messages_without_a_place_are_counted():
    said = [("gpt", "Welcome"), ("human", "Hi"), ("gpt", "Hello"), ("human", "And?")]
    messages = [{"from": role, "value": text} for role, text in said]
    dialogue = HANDLERS["sharegpt"]({"conversations": messages})
    assert dialogue.turns == [Turn("Hi", "Hello")]
    assert dialogue.left_out == {"answer_without_question": 1, "question_without_answer": 1}


def test_a_content_of_several_text_parts_is_joined():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "three"}]
    assert HANDLERS["openai"]({"messages": messages}).turns == [Turn("one\n\ntwo", "three")]


def _messages(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(("name", "record", "reason"), [
    ("alpaca", {"instruction": "x"}, "missing_key"),
    ("alpaca", {"instruction": "x", "output": 3}, "not_a_string"),
    ("alpaca", {"instruction": "x", "output": "  "}, "no_answer"),
    ("alpaca", {"instruction": "x", "output": "<nooutput>"}, "no_answer"),
    ("alpaca", {"instruction": "x", "output": "a\ud800"}, "lone_surrogate"),
    ("oasst1", {"text": "no marks"}, "unknown_form"),
    ("oasst1", {"text": "### Human: only a question"}, "no_answer"),
    ("openai", {"messages": []}, "missing_key"),
    ("openai", {"messages": ["Hi"]}, "missing_key"),
    ("openai", _messages(("user", "a"), ("system", "b"), ("assistant", "c")), "roles_out_of_order"),
    ("openai", _messages(("user", "a"), ("tool", "b")), "roles_out_of_order"),
    ("openai", {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "bad_tool_call"),
    ("openai", _messages(("user", "a"), ("critic", "b")), "unknown_role"),
    ("pair", {"prompt": "a", "answer": "b"}, "missing_key"),
    ("openai", {"messages": [{"role": ["user"], "content": "a"}]}, "unknown_role"),
    ("openai", _messages(("user", "a"), ("assistant", None)), "not_a_string"),
    ("openai", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": "maybe"}]},
     "bad_loss_flag"),
    ("openai", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]},
     "no_trained_answer"),
    ("conversation", {"conversation": [{"input": "a", "output": "b", "weight": 0}]}, "no_trained_answer"),
    *(("conversation", {"conversation": [{"input": "a", "output": "b", "weight": wrong}]}, "bad_weight")
      for wrong in (0.5, -1, 2, "0", [])),
    ("conversation", {"conversation": [{"input": "a"}]}, "missing_key"),
    ("pretrain", {"text": ""}, "no_answer"),
])
def test_records_that_do_not_fit_say_why(name, record, reason):
    with pytest.raises(BadRecord) as found:
        HANDLERS[name](record)
    assert found.value.reason == reason and str(found.value)


@pytest.mark.parametrize(("keys", "nearest"), [
    ("Question Answers", "pair, which has question and answer"), ("instructions outputs", "alpaca, which has"),
    ("message", "openai, which has messages"), ("content", "pretrain|conversation")])
def test_an_unknown_form_lists_its_keys_and_the_nearest(keys, nearest):
    with pytest.raises(BadRecord, match=f"no known form .* has the keys {', '.join(keys.split())}; .* ({nearest})"):
        detect(dict.fromkeys(keys.split(), "a"))
