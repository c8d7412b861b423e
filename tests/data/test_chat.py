"""Chats become the text that a model is asked with, and the mask is on what the assistant says."""

import json
from pathlib import Path

import numpy as np
import pytest

from rwkv.config import ConvertConfig
from rwkv.data.binidx import Dataset
from rwkv.data.chat import Template, messages_of
from rwkv.data.convert import convert
from rwkv.data.jsonl import BadRecord
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.generate import question

OPENAI = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1+1? "}, {"role": "assistant", "content": "2"}]
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Yo\n\nman"},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "好"},
    ]
}


def test_world_by_hand():
    segments = Template("world").segments
    assert segments(messages_of(OPENAI)) == [("System: Be brief.\n\nUser: 1+1?\n\nAssistant:", False), (" 2\n\n", True)]
    assert segments(messages_of(SHAREGPT)) == [
        ("User: Hi\n\nAssistant:", False), (" Yo\nman\n\n", True), ("User: Bye\n\nAssistant:", False), (" 好\n\n", True)
    ]  # fmt: skip


def test_a_chat_begins_as_generation_asks():
    assert Template("world").segments(messages_of({"messages": OPENAI["messages"][1:]}))[0][0] == question(" 1+1? ")


def test_chatml_by_hand():
    assert Template("chatml").segments(messages_of(OPENAI)) == [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", False),
        ("2<|im_end|>", True),
        ("\n", False),
    ]


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}\n  {% if m.role == 'assistant' %}\nA {%- generation %}{{ m.content }}|{% endgeneration %}\n"
        "  {% else %}\nQ{{ m.content }}\n  {% endif %}\n{% endfor %}"
    )
    assert Template(str(path)).segments(messages_of(OPENAI)) == [("QBe brief.\nQ 1+1? \nA", False), ("2|", True)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "cannot be read"),
        ("{% for m in messages %}", r"line 1: not a Jinja template"),
        ("{{ messages }}", "marks nothing as the assistant's; put {% generation %}"),
    ],
)
def test_a_template_that_cannot_serve_is_refused(tmp_path, text, complaint):
    path = tmp_path / "t.jinja"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"t.jinja.*{complaint}"):
        Template(str(path))


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": "hi"}, '"messages" is not a list of messages'),
        ({"messages": []}, '"messages" is not a list of messages'),
        ({"messages": ["hi"]}, 'message 1 of "messages" is a str, not an object'),
        ({"conversations": [{"value": "a"}]}, 'message 1 of "conversations" has no "role" \\(or "from"\\)'),
        ({"messages": [{"role": "user", "content": None}]}, 'message 1 of "messages" has no text under "content"'),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has no text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_messages_that_are_none_are_named(record, complaint):
    with pytest.raises(BadRecord, match=complaint):
        messages_of(record)


def test_what_is_no_chat_is_said_to_be_none_and_parts_of_text_are_joined():
    assert messages_of({"text": "a"}) is None
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages_of({"messages": [{"role": "user", "content": parts}], "system": "S"}) == [
        {"role": "system", "content": "S"}, {"role": "user", "content": "ab"}
    ]  # fmt: skip


def test_a_template_may_refuse_a_conversation(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}")
    with pytest.raises(BadRecord, match="the chat template refuses it \\(roles must alternate\\)"):
        Template(str(path)).segments(messages_of(OPENAI))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_mask_lies_beside_the_tokens(tmp_path, write_jsonl, workers):
    text = write_jsonl(OPENAI, {"text": "plain"}, SHAREGPT, name="c.jsonl")
    done = convert(ConvertConfig(input=str(text), workers=workers))
    assert done.masked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "c_text_document.bin", "c_text_document.idx", "c_text_mask.bin"]
    data, mask = Dataset(done.pairs[0][0]), np.fromfile(tmp_path / "c_text_mask.bin", np.uint8)
    assert len(mask) == len(data.tokens)
    tokenizer = WorldTokenizer()
    starts = np.cumsum([0, *data.sizes])
    shown = []
    for i in range(3):
        ids, counts = data.document(i), mask[starts[i] : starts[i + 1]]
        shown.append((tokenizer.decode(ids[counts == 1]), tokenizer.decode(ids[counts == 0])))
        assert (ids[-1], counts[-1]) == (0, 1)  # the end of the document is the assistant's end
    assert shown == [
        (" 2\n\n", "System: Be brief.\n\nUser: 1+1?\n\nAssistant:"),
        ("plain", ""),
        (" Yo\nman\n\n 好\n\n", "User: Hi\n\nAssistant:User: Bye\n\nAssistant:"),
    ]


def test_chats_in_other_files_and_under_their_own_key(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([OPENAI]), tmp_path / "p.parquet")
    (tmp_path / "j.json").write_text(json.dumps([OPENAI]))
    (tmp_path / "l.jsonl").write_text(json.dumps(OPENAI))
    made = []
    for name in ("p.parquet", "j.json", "l.jsonl"):
        prefix = convert(ConvertConfig(input=str(tmp_path / name), jsonl_keys="messages", workers=1)).pairs[0][0]
        assert prefix.endswith("_messages_document")
        made.append((Path(f"{prefix}.bin").read_bytes(), Path(prefix.replace("_document", "_mask.bin")).read_bytes()))
    assert made[0] == made[1] == made[2]


def test_a_chat_among_texts_is_named_as_bad_unless_a_template_is_asked_for(tmp_path, write_jsonl):
    text = write_jsonl({"text": "a"}, OPENAI)
    with pytest.raises(UserError, match=r"line 2: no \"text\" \(it has 'messages'\)"):
        convert(ConvertConfig(input=str(text), workers=1))
    assert convert(ConvertConfig(input=str(text), workers=1, chat_template="world")).masked


def test_a_mask_is_not_replaced_unless_forced(tmp_path, write_jsonl):
    text = write_jsonl(OPENAI)
    (tmp_path / "text_text_mask.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"text_text_mask.bin exist already"):
        convert(ConvertConfig(input=str(text), workers=1))
    assert (tmp_path / "text_text_mask.bin").read_bytes() == b"mine"
