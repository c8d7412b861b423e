"""Schema detection of instruction data and chats; unsupported records are rejected."""

import pytest

from rwkv.data.convert import schemas
from rwkv.data.convert.jsonl import BadRecord


def read(record, kind="auto"):
    found = schemas.conversation(record, kind)
    return found and (found.schema, [(message.role, message.content, message.reasoning) for message in found.messages])


def turns(*texts):
    return [(role, text, "") for role, text in zip(("user", "assistant") * len(texts), texts, strict=False)]


SCHEMAS = [
    ({"instruction": "q", "input": "", "output": "a"}, "alpaca", turns("q", "a")),
    ({"instruction": "q", "input": "c", "output": "a"}, "alpaca", turns("q\nc", "a")),
    ({"Instruction": "q", "Input": None, "Output": "a"}, "alpaca", turns("q", "a")),
    ({"instruction": "q", "output": "a", "history": [["1", "2"]]}, "alpaca", turns("1", "2", "q", "a")),
    # BELLE
    ({"instruction": "Human:一\nAssistant:二\nHuman:三\nAssistant:", "input": "", "output": "四"}, "alpaca", turns("一", "二", "三", "四")),
    ({"instruction": "用户：一\n助手：二\n用户：三\n助手：", "output": "四"}, "alpaca", turns("一", "二", "三", "四")),
    ({"kind": "NLI", "input": "q", "target": "a"}, "firefly", turns("q", "a")),
    ({"instruction": "q", "context": "c", "response": "a", "category": "qa"}, "dolly", turns("q\nc", "a")),
    ({"prompt": "q", "completion": "a"}, "prompt_completion", turns("q", "a")),
    ({"prompt": "q", "response": "a"}, "prompt_response", turns("q", "a")),
    ({"query": "q", "response": "a", "history": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}, "query_response", turns("1", "2", "q", "a")),
    ({"question": "q", "answer": "a"}, "question_answer", turns("q", "a")),
    # OpenOrca
    ({"system_prompt": "s", "question": "q", "response": "a"}, "question_response", [("system", "s", ""), *turns("q", "a")]),
    ({"Question": "q", "Complex_CoT": "r", "Response": "a"}, "question_response", [("user", "q", ""), ("assistant", "a", "r")]),
    ({"问题": "q", "回答": "a"}, "问题_回答", turns("q", "a")),
    ({"human": "q", "assistant": "a"}, "human_assistant", turns("q", "a")),
    ({"conversation": [{"human": "q", "assistant": "a"}]}, "messages", turns("q", "a")),
    ({"messages": '[{"role": "user", "content": "q"}]'}, "messages", turns("q")),  # a column of csv
    ({"conversations": [{"from": "human", "value": "q"}], "system": "s"}, "messages", [("system", "s", ""), *turns("q")]),
    ({"messages": None}, "messages", []),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "gpt", "content": "a"}, {"role": "user", "content": ""}]}, "messages", turns("q", "a")),
    ({"conversation": [], "id": 1}, "messages", []),
    ({"conversations": [], "question": "q", "answer": "a"}, "question_answer", turns("q", "a")),
    ({"instruction": "q", "output": None}, "alpaca", turns("q", "")),
]  # fmt: skip


@pytest.mark.parametrize(("record", "schema", "expected"), SCHEMAS)
def test_schema_by_keys(record, schema, expected):
    assert read(record) == (schema, expected)


def test_moss():
    turn = {
        "Human": "<|Human|>: q<eoh>\n",
        "Inner Thoughts": "<|Inner Thoughts|>: look it up<eot>\n",
        "Commands": '<|Commands|>: Search("q")<eoc>\n',
        "Tool Responses": "<|Results|>: found<eor>\n",
        "MOSS": "<|MOSS|>: a<eom>\n",
    }
    plain = turn | {
        "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
        "Commands": "<|Commands|>: None<eoc>\n",
        "Tool Responses": "<|Results|>: None<eor>\n",
    }
    found = schemas.conversation({"meta_instruction": "s", "num_turns": 2, "chat": {"turn_2": plain, "turn_1": turn}})
    shown = [(message.role, message.content, message.reasoning, message.calls) for message in found.messages]
    assert (found.schema, shown) == (
        "moss",
        [
            ("system", "s", "", []),
            ("user", "q", "", []),
            ("assistant", "", "look it up", ['Search("q")']),
            ("tool", "found", "", []),
            ("assistant", "a", "", []),
            ("user", "q", "", []),
            ("assistant", "a", "", []),
        ],
    )
    assert read({"plain_text": "[Human]: q <eoh> [MOSS]: a <eoa> [Human]: 2<eoh> [MOSS]: b<eoa> ", "prefix": "s"}) == (
        "moss",
        [("system", "s", ""), *turns("q", "a", "2", "b")],
    )


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"text": "a"},
        {"text": "a", "title": "b"},
        {"text": "a", "prompt": None, "response": None},  # columns of a mixed table
        {"input": "a"},
        {"output": "a"},
        {"question": None, "answer": None},
        {"chat": "a"},
        {"messages": [], "text": "a"},
    ],
)
def test_not_a_conversation(record):
    assert schemas.conversation(record) is None


def test_conversational_prompt_trains_completion_only():
    record = {
        "prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    assert [message.train for message in schemas.conversation(record).messages] == [False, False, None]


def test_tools_are_kept():
    tools = [{"type": "function", "function": {"name": "f", "description": None}}]
    chat = [{"role": "user", "content": "q"}]
    for given in (tools, '[{"type": "function", "function": {"name": "f"}}]'):
        assert schemas.conversation({"messages": chat, "tools": given}).tools == [
            {"type": "function", "function": {"name": "f"}}
        ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "a preference pair .* among other records"),
        ({"chosen": [], "rejected": []}, "a preference pair"),
        ({"question": "q", "answer": ["good", "bad"]}, '"answer" is a list of 2 texts; keep one answer'),
        ({"prompt": "q", "completion": "a", "label": "False"}, "undesirable"),  # a column of csv
        ({"prompt": "q", "completion": "a", "label": False}, "undesirable"),
        ({"messages": [{"role": "user", "content": "q"}], "images": ["a.png"]}, 'it has "images"; only text'),
        (
            {"question": "q", "answer": "a", "response": "b"},
            "it has 'response' and 'answer', and only one of them can be the answer; .* --format",
        ),
        ({"instruction": "q", "question": "p", "answer": "a"}, "only one of them can be the question"),
        ({"text": "t", "instruction": "q", "output": "a"}, "pass --format text .*, or --format alpaca"),
        ({"instruction": "q", "output": 3}, '"output" is of type int'),
        ({"instruction": "q", "output": "a", "history": [["1"]]}, '"history" is not a list of'),
        (
            {"messages": [{"role": "system", "content": "s"}], "system": "other"},
            'a system message and another text under "system"',
        ),
        ({"messages": [{"role": "user", "content": "q"}], "system": ["s"]}, '"system" is of type list'),
        ({"conversations": "hi"}, '"conversations" is not a list of messages'),
    ],
)
def test_unsupported_records(record, message):
    with pytest.raises(BadRecord, match=message):
        schemas.conversation(record)


def test_unused_fields():
    chat = [{"role": "user", "content": "q"}]
    for record, expected in (
        ({"messages": chat, "id": 1, "Reasoning": "r", "context": "c", "tags": []}, ["reasoning", "context"]),
        ({"instruction": "q", "output": "a", "history": [], "thinking": "t", "label": True}, []),
        ({"instruction": "q", "output": "a", "label": 0}, ["label"]),
        ({"messages": chat, "system": "s", "tools": [{"name": "f"}], "prompt": "q"}, []),  # prompt is in a remark
    ):
        assert schemas.conversation(record).unused == expected


def test_explicit_format():
    both = {"text": "t", "question": "q", "answer": "a", "response": "b", "chosen": 1, "rejected": 2}
    assert read(both, "question_answer") == ("question_answer", turns("q", "a"))
    with pytest.raises(BadRecord, match='--format alpaca expects "instruction" and "output".*, but it has \'text\''):
        schemas.conversation({"text": "t"}, "alpaca")
    with pytest.raises(BadRecord, match="--format messages expects a list"):
        schemas.conversation({"text": "t"}, "messages")


def test_messages_preferred_to_text():
    found = schemas.conversation({"text": "t", "messages": [{"role": "user", "content": "q"}]})
    assert found.remarks == ['records with "messages" and also "text", of which "messages" was converted']
