"""Encoding of chats and instruction data: tokens, loss mask, skipped and rejected records,
statistics.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from rwkv.config import ConvertConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert import sandbox
from rwkv.data.convert.pipeline import convert, texts
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}


def run(path, **flags):
    return convert(ConvertConfig(**{"input": str(path), "workers": 1, "force": True, **flags}))


def marked(result):
    """The documents, with ⟦ ⟧ around the tokens that contribute to the loss and ∎ for the
    end-of-document token.
    """
    data = Dataset(result.pairs[0][0])
    mask = np.ones(len(data.tokens), np.uint8) if data.mask is None else data.mask
    found = []
    for i in range(len(data)):
        begin, end = data.span(i)
        shown, inside = "", False
        for token, trained in zip(data.tokens[begin:end].tolist(), mask[begin:end].tolist(), strict=True):
            if trained != inside:
                shown, inside = shown + ("⟦" if trained else "⟧"), trained
            shown += WorldTokenizer().decode([token]) if token else "∎"
        found.append(shown + "⟧" * inside)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_chats_and_text_with_mask(tmp_path, write_jsonl, workers):
    path = write_jsonl(CHAT, {"text": "plain"}, {"instruction": "q", "input": "", "output": "a"}, name="c.jsonl")
    result = run(path, workers=workers)
    assert result.masked
    assert marked(result) == ["User: 1+1?\n\nAssistant:⟦ 2\n\n∎⟧", "⟦plain∎⟧", "User: q\n\nAssistant:⟦ a\n\n∎⟧"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"c.jsonl", "c_text_document.bin", "c_text_document.idx", "c_text_document.json", "c_text_mask.bin"}
    assert result.report == [
        "records:  alpaca 1, messages 1, text 1",
        "roles:    assistant 2, user 2",
        f"loss:     {Dataset(result.pairs[0][0]).mask.sum()} of {result.pairs[0][2]} tokens (32%) contribute to the loss; 0 of 3 documents have none",
    ]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # https://github.com/axolotl-ai-cloud/axolotl/issues/752: role names differ between data
        # sets, so that no answer was found
        (
            {"messages": [{"role": "User", "content": "1+1?"}, {"role": "Assistant", "content": "2"}]},
            "User: 1+1?\n\nAssistant:⟦ 2\n\n∎⟧",
        ),
        (
            {"messages": [{"role": "用户", "content": "一"}, {"role": "助手", "content": "二"}]},
            "User: 一\n\nAssistant:⟦ 二\n\n∎⟧",
        ),
        (
            {"conversations": [{"from": "prompter", "value": "1"}, {"from": "AI", "value": "2"}]},
            "User: 1\n\nAssistant:⟦ 2\n\n∎⟧",
        ),
        # https://github.com/jingyaogong/minimind/issues/737: reasoning was dropped
        (
            {
                "messages": [
                    {"role": "user", "content": "1+1?"},
                    {"role": "assistant", "reasoning_content": "one and one", "content": "2"},
                ]
            },
            "User: 1+1?\n\nAssistant:⟦ <think>one and one</think>\n2\n\n∎⟧",
        ),
        # https://github.com/JL-er/RWKV-PEFT/issues/55: a blank line inside a turn looks like its
        # end
        (
            {"messages": [{"role": "user", "content": "a\n\nb\r\nc"}, {"role": "assistant", "content": "d\n\n\ne\n"}]},
            "User: a\nb\nc\n\nAssistant:⟦ d\ne\n\n∎⟧",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "User: a\n\nAssistant: b\n\n∎",
        ),
        ({"text": "x", **CHAT}, "User: 1+1?\n\nAssistant:⟦ 2\n\n∎⟧"),
        ({"kind": "NLI", "input": "q", "target": "a"}, "User: q\n\nAssistant:⟦ a\n\n∎⟧"),
    ],
)
def test_user_reported_records(write_jsonl, record, expected):
    assert marked(run(write_jsonl(record))) == [expected]


def test_all_file_formats_and_keys(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist([CHAT]), tmp_path / "p.parquet")
    (tmp_path / "j.json").write_text(json.dumps([CHAT]))
    (tmp_path / "l.jsonl").write_text(json.dumps(CHAT))
    (tmp_path / "c.csv").write_text('messages\n"' + json.dumps(CHAT["messages"]).replace('"', '""') + '"\n')
    outputs = set()
    for name in ("p.parquet", "j.json", "l.jsonl", "c.csv"):
        prefix = run(tmp_path / name, jsonl_keys="messages").pairs[0][0]
        assert prefix.endswith("_messages_document")
        outputs.add((Path(f"{prefix}.bin").read_bytes(), Path(prefix.replace("_document", "_mask.bin")).read_bytes()))
    assert len(outputs) == 1
    parquet.write_table(
        pyarrow.Table.from_pylist([{"instruction": "q", "input": None, "output": "a", "id": 1}]), tmp_path / "a.parquet"
    )
    (tmp_path / "b.csv").write_text("id,Instruction,Output\n1,q,a\n")
    for name in ("a.parquet", "b.csv"):
        assert marked(run(tmp_path / name)) == ["User: q\n\nAssistant:⟦ a\n\n∎⟧"]


def test_blank_records_skipped_and_counted(write_jsonl):
    empty = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": " \n"}]}
    path = write_jsonl(
        CHAT,
        {"conversations": []},
        {"text": "  \n"},
        {"text": ""},
        empty,
        {"text": "\u3000"},
        {"instruction": "q", "output": ""},
    )
    result = run(path)
    assert result.pairs[0][1] == 1
    assert result.report[-3:] == [
        "note: skipped blank texts: 3",
        "note: skipped conversations with an empty assistant message: 2",
        "note: skipped conversations without messages: 1",
    ]
    assert [text for text, _ in texts(ConvertConfig(input=str(path)))[0]] == ["User: 1+1?\n\nAssistant: 2\n\n"]
    with pytest.raises(UserError, match=r"contains no document\. .* Skipped blank texts: 1"):
        run(write_jsonl({"text": " "}, name="b.jsonl"))


def test_warning_for_documents_without_answer(write_jsonl):
    # https://github.com/axolotl-ai-cloud/axolotl/issues/1761: with all labels masked the loss is
    # NaN, or nothing is learned
    question = {"messages": CHAT["messages"][:1]}
    result = run(write_jsonl(question, question))
    assert result.report[-1].startswith("warning: 2 of 2 documents contain no token that contributes to the loss")
    assert result.report[-1].endswith("no message has the role assistant (found: user 2)")
    report = run(write_jsonl(question, *[CHAT] * 200)).report
    assert "1 of 201 documents have none" in report[2]
    assert len(report) == 3


def test_unknown_role(write_jsonl):
    bad = {"messages": [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}]}
    path = write_jsonl(CHAT, bad)
    with pytest.raises(
        UserError,
        match=r"line 2: message 2 of \"messages\" has the unknown role 'narrator'; known are user, human, 用户",
    ):
        run(path)
    result = run(path, on_error="skip")
    assert (result.rejects, result.pairs[0][1]) == (1, 1)


def test_unconvertible_record_error_or_skip(tmp_path, write_jsonl):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ 1 / (messages | length - 1) }}{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    )
    path = tmp_path / "x.jsonl"
    bad = [
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"a": 1, "a": 2}',
        '{"messages": 3}',
    ]
    path.write_text("\n".join([json.dumps(CHAT), *bad]))
    for number, message in enumerate(("ZeroDivisionError", "the key 'a' occurs twice", '"messages" is not a list'), 2):
        single = tmp_path / f"{number}.jsonl"
        single.write_text("\n" * (number - 1) + bad[number - 2])
        with pytest.raises(UserError, match=f"{number}.jsonl, line {number}: .*{message}"):
            run(single, chat_template=str(template))
    result = run(path, chat_template=str(template), on_error="skip")
    assert (result.rejects, result.pairs[0][1]) == (3, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_template_timeout_rejects_one_record(tmp_path, write_jsonl, monkeypatch, workers):
    # The other records take milliseconds, or as long as a garbage collection in between.
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    path = write_jsonl(CHAT, {"messages": [{"role": "user", "content": "loop"}]}, CHAT)
    result = run(path, chat_template=str(template), on_error="skip", workers=workers)
    assert (result.rejects, result.pairs[0][1]) == (1, 2)
    assert "line 2" in result.rejects_file.read_text()
    assert "did not finish within 1 seconds" in result.rejects_file.read_text()


def test_duplicate_key(tmp_path):
    path = tmp_path / "x.jsonl"
    for line in (
        '{"text": "a", "text": "b"}',
        '{"text" : "a", "text" : "b"}',
        '{"messages": [{"role": "user", "role": "bot", "content": "a"}]}',
        '{"text": "a", "x": {"k": 1, "k": 2}}',
    ):
        path.write_text(f'{{"text": "ok"}}\n{line}\n')
        with pytest.raises(UserError, match="line 2: the key '.*' occurs twice in one object"):
            run(path)
    array = tmp_path / "x.json"
    array.write_text('[{"text": "ok"}, {"text": "a", "text": "b"}, {"text": "ok"}]')
    with pytest.raises(UserError, match="element 2: the key 'text' occurs twice"):
        run(array)
    assert (result := run(array, on_error="skip")).rejects == 1
    assert result.pairs[0][1] == 2
    (tmp_path / "x.csv").write_text("text,id,text\na,1,b\n")
    with pytest.raises(UserError, match="two columns are named 'text'"):
        run(tmp_path / "x.csv")
    path.write_text(json.dumps({"text": 'a "text": b, \\"text\\": c', "x": [{"k": 1}, {"k": 2}]}))
    assert run(path).pairs[0][1] == 1


def test_chat_among_texts(write_jsonl):
    path = write_jsonl({"text": "a"}, CHAT)
    with pytest.raises(UserError, match=r"line 2: no \"text\" \(it has 'messages'\).*pass --chat_template world"):
        run(path)
    assert run(path, chat_template="world").masked


def test_texts_and_chats_in_separate_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "in/b.txt").write_text("b")
    (tmp_path / "in/c.json").write_text(json.dumps([{"id": 1, "question": "q", "answer": "c"}]))
    assert marked(run(tmp_path / "in")) == ["⟦a∎⟧", "⟦b∎⟧", "User: q\n\nAssistant:⟦ c\n\n∎⟧"]


def test_unused_fields_reported_for_all_formats(tmp_path):
    rows = [{"id": "1", "source": "web", "instruction": "q", "output": "a"}] * 2
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.csv").write_text("id,source,instruction,output\n" + "1,web,q,a\n" * 2)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.json", "x.csv", "x.parquet"):
        for workers in (1, 2):
            report = run(tmp_path / name, workers=workers).report
            assert "note: fields of records that were not converted: source 2" in report, name


def test_records_without_a_value(write_jsonl):
    done = run(write_jsonl({"instruction": None, "output": None}, {"instruction": "q", "output": "a"}))
    assert marked(done) == ["User: q\n\nAssistant:⟦ a\n\n∎⟧"]
    assert "note: skipped records without a value: 1" in done.report


def test_invisible_texts_are_blank(write_jsonl):
    assert marked(run(write_jsonl({"text": "\u200b\ufeff"}, {"text": "a"}))) == ["⟦a∎⟧"]
    answer = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\u200b"}]}
    assert "note: skipped conversations with an empty assistant message: 1" in run(write_jsonl(answer, CHAT)).report


def test_jsonl_keys_do_not_split_pairs(write_jsonl):
    path = write_jsonl({"instruction": "q", "input": "", "output": "a"})
    for keys in ("instruction,output", "instruction"):
        with pytest.raises(
            UserError, match=r"would separate questions from answers, but the records are conversations \(alpaca\)"
        ):
            run(path, jsonl_keys=keys)
    assert len(run(path, jsonl_keys="instruction,output", format="text").pairs) == 2
    assert marked(run(path, jsonl_keys="output")) == ["⟦a∎⟧"]
    with pytest.raises(UserError, match="--format text and --chat_template"):
        run(path, format="text", chat_template="world")


def test_mask_answers_of_plain_text(write_jsonl):
    turns = {"text": "User: 1?\n\nAssistant: 2\n\nUser: 3\n\nAssistant: 4"}
    result = run(write_jsonl(turns, {"text": "A novel."}), mask="answers")
    assert marked(result) == ["User: 1?\n\nAssistant:⟦ 2\n\n⟧User: 3\n\nAssistant:⟦ 4∎⟧", "⟦A novel.∎⟧"]
    assert (
        "note: documents without turns such as User: and Assistant:, which contribute to the loss as a whole: 1"
        in result.report
    )
    assert marked(run(write_jsonl(turns))) == [f"⟦{turns['text']}∎⟧"]  # the default
    with pytest.raises(UserError, match="--mask answers: no document of .* has turns"):
        run(write_jsonl({"text": "A novel."}), mask="answers")


def test_no_mask(tmp_path, write_jsonl):
    result = run(write_jsonl(CHAT), mask="none")
    assert marked(result) == ["⟦User: 1+1?\n\nAssistant: 2\n\n∎⟧"]
    assert not list(tmp_path.glob("*mask*"))


def test_ftfy_before_fold(write_jsonl):
    record = {"messages": [{"role": "user", "content": "donâ€™t\u2028\u2028a"}, {"role": "assistant", "content": "2"}]}
    assert marked(run(write_jsonl(record), ftfy=True)) == ["User: don't\na\n\nAssistant:⟦ 2\n\n∎⟧"]


def test_existing_mask_needs_force(tmp_path, write_jsonl):
    path = write_jsonl(CHAT)
    (tmp_path / "text_text_mask.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"text_text_mask.bin already exist"):
        run(path, force=False)
    assert (tmp_path / "text_text_mask.bin").read_bytes() == b"mine"
