"""Parsing of chat messages in all supported formats, and rejection of unsupported content."""

import pytest

from rwkv.data.convert import messages
from rwkv.data.convert.jsonl import BadRecord


def read(*entries):
    return [(message.role, message.content, message.train) for message in messages.read(list(entries), "messages")]


def test_openai_sharegpt_and_pairs():
    assert read({"role": "User", "content": "a"}, {"role": "assistant", "content": "b"}) == [
        ("user", "a", None),
        ("assistant", "b", None),
    ]
    assert read({"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}) == [
        ("user", "a", None),
        ("assistant", "b", None),
    ]
    pair = [("user", "a", None), ("assistant", "b", None)]
    # firefly, MOSS
    assert read({"human": "a", "assistant": "b"}) == read({"assistant": "b", "human": "a"}) == pair
    assert read({"system": "", "input": "a", "output": "b"}) == pair  # xtuner


def test_null_is_absent():
    # messages with different fields in a parquet column
    message = {
        "role": "user",
        "content": "a",
        "tool_calls": None,
        "weight": None,
        "reasoning_content": None,
        "from": None,
    }
    assert read(message) == [("user", "a", None)]
    mixed = {"role": "user", "content": None, "from": None, "value": "a"}
    assert read(mixed) == [("user", "a", None)]


def test_unused_fields():
    entry = {"role": "tool", "content": "a", "Mask": 1, "text": "b", "id": "1", "tool_call_id": "2", "audio": None}
    (message,) = messages.read([entry], "messages")
    assert message.unused == ["mask", "text"]
    (message,) = messages.read([{"role": "assistant", "content": "a", "weight": 1, "thinking": "b"}], "messages")
    assert message.unused == []


def test_object_of_lists():
    # a Sequence of objects in the datasets library
    (message, other) = messages.read({"from": ["human", "gpt"], "value": ["a", "b"]}, "conversations")
    assert (message.role, other.role, other.content) == ("user", "assistant", "b")


def test_content_parts():
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = messages.read([{"role": "assistant", "content": parts}], "messages")
    assert (message.content, message.reasoning) == ("ab", "hm")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "Reasoning_Content", "think"])
def test_reasoning_keys(key):
    # https://github.com/fw-ai/cookbook/pull/378: it used to be dropped, and models never learned to
    # produce it
    (message,) = messages.read([{"role": "assistant", key: "one and one", "content": "2"}], "messages")
    assert (message.content, message.reasoning) == ("2", "one and one")


def test_duplicate_reasoning():
    entry = {"role": "assistant", "content": "<think>hm</think>\n2", "reasoning_content": "hm"}
    assert messages.read([entry], "messages")[0].reasoning == ""
    with pytest.raises(BadRecord, match="other reasoning"):
        messages.read([entry | {"reasoning_content": "no"}], "messages")


def test_tool_calls():
    # https://github.com/hiyouga/LlamaFactory/issues/5866
    call = {"name": "f", "arguments": {"x": 1}}
    for entry in (
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "assistant", "content": "", "tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "function_call", "value": '[{"name": "f", "arguments": {"x": 1}}]'},
    ):
        (message,) = messages.read([entry], "messages")
        assert (message.role, message.content, message.calls, message.empty) == ("assistant", "", [call], False), entry
    (message,) = messages.read(
        [{"role": "function", "content": '{"name": "f", "arguments": {"x": 1}}'}], "messages"
    )  # LLaMA-Factory
    assert (message.role, message.calls) == ("assistant", [call])
    # OpenAI
    (message,) = messages.read([{"role": "function", "name": "f", "content": '{"sum": 2}'}], "messages")
    assert (message.role, message.content) == ("tool", '{"sum": 2}')
    assert messages.read([{"from": "function_call", "value": "f(1)"}], "messages")[0].calls == ["f(1)"]


def test_weights():
    answer = {"role": "assistant", "content": "a"}
    for flag, train in (
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"train": False}, False),
        ({"loss_mask": 0}, False),
        ({"trainable": False}, False),
        ({"loss": True}, True),
        ({"weight": 1, "train": False}, False),
    ):
        assert read(answer | flag) == [("assistant", "a", train)]
    assert read({"role": "user", "content": "a", "weight": 1}) == [
        ("user", "a", None)
    ]  # a value without meaning in OpenAI's format
    assert read({"role": "user", "content": "a", "train": True}) == [("user", "a", True)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("hi", '"messages" is not a list of messages'),
        ("[{'role': 'user', 'content': 'a'}]", '"messages" is a text that is not JSON.*json.dumps'),
        ({"a": 1}, '"messages" is not a list of messages'),
        (["hi"], 'message 1 of "messages" is of type str, not an object'),
        ([{"value": "a"}], 'message 1 of "messages" has no "role" \\(or "from"\\)'),
        ([{"role": 3, "content": "a"}], 'has no "role"'),
        (
            [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}],
            "message 2 of .* unknown role 'narrator'; known are user, human",
        ),
        ([{"role": "user", "content": None}], 'message 1 of "messages" has no text under "content"'),
        ([{"role": "user"}], "has no text"),
        ([{"role": "user", "content": 3}], "has no text: its content is of type int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "has no text in a part of type 'image_url'",
        ),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], '"weight": 0.5; only 0 and 1'),
        ([{"role": "assistant", "content": "a", "train": "no"}], "\"train\": 'no'; only 0 and 1"),
        (
            [{"role": "assistant", "content": "a", "train_detail": [{"begin_offset": 0}]}],
            "a loss mask inside a message",
        ),
        ([{"role": "assistant", "content": "a", "reasoning": {"x": 1}}], 'a dict under "reasoning"'),
        ([{"role": "user", "content": "a", "reasoning": "b"}], "a user message with reasoning"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"x": 1}]}], 'a tool call without a "name"'),
        ([{"role": "assistant", "content": None, "tool_calls": "f"}], '"tool_calls" that is not a list'),
    ],
)
def test_unsupported_messages(entries, message):
    with pytest.raises(BadRecord, match=message):
        messages.read(entries, "messages")
