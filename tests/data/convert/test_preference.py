"""Preference records of every form become pairs of documents with the answers in the loss mask; bad
ones are rejected or counted.
"""

import json

import pytest

from rwkv.config import ConvertConfig
from rwkv.data import provenance
from rwkv.data.binidx import Dataset
from rwkv.data.convert import preference, shards
from rwkv.data.convert.jsonl import BadRecord
from rwkv.data.convert.pipeline import convert, texts
from rwkv.data.inspection import format_report, inspect, verify
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError


def said(role, content):
    return {"role": role, "content": content}


Q, A, B = said("user", "q"), said("assistant", "a"), said("assistant", "b")
EARLIER = [said("user", "1"), said("assistant", "2")]
SHAREGPT = {side: {"from": "gpt", "value": text} for side, text in (("chosen", "a"), ("rejected", "b"))}
# with the text before both answers
FORMS = {
    "texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "User: q\n\nAssistant:"),
    "messages": ({"prompt": [Q], "chosen": [A], "rejected": [B]}, "User: q\n\nAssistant:"),
    "implicit prompt": ({"chosen": [Q, A], "rejected": [Q, B]}, "User: q\n\nAssistant:"),
    "prompt repeated in the answers": ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, "User: q\n\nAssistant:"),
    "several turns": (
        {"chosen": [*EARLIER, Q, A], "rejected": [*EARLIER, Q, B]},
        "User: 1\n\nAssistant: 2\n\nUser: q\n\nAssistant:",
    ),
    "several turns in the prompt": (
        {"prompt": [*EARLIER, Q], "chosen": [A], "rejected": [B]},
        "User: 1\n\nAssistant: 2\n\nUser: q\n\nAssistant:",
    ),
    "transcripts": (
        {
            "chosen": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: q\n\nAssistant: b",
        },
        "User: 1\n\nAssistant: 2\n\nUser: q\n\nAssistant:",
    ),
    "JSON in a column of csv": (
        {"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])},
        "User: q\n\nAssistant:",
    ),
    "instruction with input": (
        {"instruction": "q", "input": "c", "chosen": "a", "rejected": "b"},
        "User: q\nc\n\nAssistant:",
    ),
    "one message each": ({"conversations": [{"from": "human", "value": "q"}], **SHAREGPT}, "User: q\n\nAssistant:"),
    "system": (
        {"system": "s", "Prompt": "q", "Chosen": "a", "Rejected": "b"},
        "System: s\n\nUser: q\n\nAssistant:",
    ),
}


def converted(write_jsonl, records, **flags):
    source = write_jsonl(*records)
    done = convert(ConvertConfig(input=str(source), workers=1, force=True, **flags))
    return done, Dataset(done.pairs[0][0])


def document(data, i):
    """(what does not contribute to the loss, what does) of a document without its end."""
    ids, (begin, end) = data.document(i).tolist(), data.span(i)
    mask = data.mask[begin:end].tolist()
    cut = mask.index(1)
    assert mask == [0] * cut + [1] * (len(mask) - cut)
    assert ids[-1] == 0
    return tuple(map(WorldTokenizer().decode, (ids[:cut], ids[cut:-1])))


@pytest.mark.parametrize("form", FORMS)
def test_forms(write_jsonl, form):
    record, prompt = FORMS[form]
    _, data = converted(write_jsonl, [record])
    assert [document(data, i) for i in range(len(data))] == [(prompt, " a\n\n"), (prompt, " b\n\n")]
    assert provenance.paired(data)


def test_templates_and_order(write_jsonl):
    records = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(3)]
    _, data = converted(write_jsonl, records, chat_template="g1")
    found = [document(data, i) for i in range(6)]
    assert found[4:] == [("User: q2\n\nAssistant: <think>\n</think", f">\n{side}2\n\n") for side in ("a", "b")]
    _, data = converted(write_jsonl, [{"messages": [Q, A]}])
    assert not provenance.paired(data)


def test_counts_and_skipped_pairs(write_jsonl):
    records = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 5},
        {"prompt": "q", "chosen": "same", "rejected": "same "},
        {"prompt": "q", "chosen": "a", "rejected": ""},
        {"prompt": "q", "chosen": None, "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ]
    done, data = converted(write_jsonl, records)
    assert len(data) == 2
    report = "\n".join(done.report)
    assert "records:  preference 2" in report
    assert "note: skipped pairs whose answers are identical: 1" in report
    assert "note: skipped conversations with an empty assistant message: 2" in report
    assert "note: skipped conversations with an empty user message: 1" in report
    assert "note: fields of records that were not converted: score_chosen 2" in report


BAD = [
    (
        {"chosen": [Q, A], "rejected": [{"role": "user", "content": "another question"}, A]},
        "the conversations differ in a message of the user before their answers",
    ),
    ({"prompt": "q", "chosen": "a"}, "no \"rejected\" (it has 'prompt', 'chosen'); a preference pair has \"prompt\""),
    ({"chosen": "a", "rejected": "b"}, "no prompt; a preference pair has"),
    ({"chosen": [A], "rejected": [B]}, "no prompt; a preference pair has"),
    ({"prompt": "q", "chosen": ["a"], "rejected": "b"}, 'message 1 of "chosen" is of type str, not an object'),
    ({"prompt": "q", "chosen": 5, "rejected": "b"}, '"chosen" is of type int, not a string'),
    ({"prompt": "other", "chosen": [Q, A], "rejected": [Q, B]}, "conversations do not begin with the prompt"),
    ({"chosen": [Q, A], "rejected": [Q]}, '"rejected" has no answer of the assistant'),
    ({"chosen": [Q, A], "rejected": [Q, A, said("user", "r"), B]}, '"chosen" has no answer of the assistant'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x.png"]}, 'it has "images"'),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records(write_jsonl, record, message):
    with pytest.raises(BadRecord) as error:
        preference.conversations(record)
    assert message in str(error.value)
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match=r"text\.jsonl, line 2: "):
        converted(write_jsonl, [good, record])
    done, data = converted(write_jsonl, [good, record, good], on_error="skip")
    assert (len(data), done.rejects) == (4, 1)


def test_other_records_and_flags(write_jsonl):
    pair, chat = {"prompt": "q", "chosen": "a", "rejected": "b"}, {"messages": [Q, A]}
    with pytest.raises(UserError, match=r'line 2: no "chosen"'):
        converted(write_jsonl, [pair, chat])
    with pytest.raises(UserError, match="line 2: a preference pair .* among other records"):
        converted(write_jsonl, [chat, pair])
    with pytest.raises(UserError, match="--mask none: DPO compares"):
        converted(write_jsonl, [pair], mask="none")
    with pytest.raises(UserError, match="--jsonl_keys chosen: the records are preference pairs"):
        converted(write_jsonl, [pair], jsonl_keys="chosen")
    _, data = converted(write_jsonl, [pair], jsonl_keys="chosen", format="text")
    assert not provenance.paired(data)
    _, data = converted(write_jsonl, [pair], format="preference")
    assert provenance.paired(data)


def test_shards_and_inspection(write_jsonl, tmp_path):
    source = write_jsonl(*({"prompt": f"q{i}", "chosen": "a" * 40, "rejected": f"b{i}"} for i in range(9)))
    flags = {"input": str(source), "output_prefix": str(tmp_path / "p"), "workers": 1}
    for i in range(2):
        convert(ConvertConfig(**flags, shard=f"{i}/2"))
    shards.merge(str(tmp_path / "p"), force=False)
    data = Dataset(tmp_path / "p_text_document")
    found = inspect(data, ctx_len=64, micro_bsz=2, samples=1)
    verify(data, *texts(ConvertConfig(**flags)), found)
    assert (found.paired, found.fitting, found.steps, found.verified) == (True, 9, 5, 18)
    assert found.problems == []
    report = format_report(found)
    assert "pairs:      9, with answers of " in report
    assert "chosen:     'User: q0" in report
    assert "rejected:   'User: q0\\n\\nAssistant: b0" in report
    assert "9 pairs fit --ctx_len 64" in report
    found = inspect(data, ctx_len=8, micro_bsz=2, samples=1)
    assert found.problems == ["no pair fits --ctx_len 8; use a larger one"]
    (tmp_path / "p_text_mask.bin").write_bytes(bytes(len(data.tokens)))
    found = inspect(Dataset(tmp_path / "p_text_document"), ctx_len=64, micro_bsz=2)
    assert "18 documents have no answer in the loss mask; convert again" in found.problems
