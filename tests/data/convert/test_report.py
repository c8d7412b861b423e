"""The report of a conversion."""

from collections import Counter

from rwkv.data.convert import report


def test_report_lines_and_warnings():
    counts = Counter(
        {
            ("schema", "messages"): 3,
            ("schema", "text"): 1,
            ("role", "assistant"): 4,
            ("name", "assistant", "助手"): 3,
            ("name", "assistant", "a\x1b[31m"): 1,
            ("role", "user"): 4,
            ("name", "user", "user"): 4,
            ("trained", ""): 10,
            ("untrained", ""): 1,
            ("plain", ""): 1,
            ("skipped", "blank texts"): 2,
            ("remark", "something"): 1,
            ("unused", "records", "id\x1b"): 3,
            ("unused", "messages", "mask"): 1,
        }
    )
    assert report.lines(counts, 4, 40, True) == [
        "records:  messages 3, text 1",
        "roles:    assistant 4 (助手, a\\x1b[31m), user 4",
        "loss:     10 of 40 tokens (25%) contribute to the loss; 1 of 4 documents have none",
        "note: documents without turns such as User: and Assistant:, which contribute to the loss as a whole: 1",
        "note: something: 1",
        "note: fields of records that were not converted: id\\x1b 3",
        "note: fields of messages that were not converted: mask 1",
        "note: skipped blank texts: 2",
        "warning: 1 of 4 documents contain no token that contributes to the loss; nothing is learned from them: they have no answer, or only"
        " answers with weight 0",
    ]


def test_plain_text_has_no_report():
    assert report.lines(Counter({("schema", "text"): 3}), 3, 30, False) == []


def test_summaries_add_up():
    first, second = (
        Counter({("schema", "text"): 1, ("role", "user"): 2, ("trained", ""): 3}),
        Counter({("schema", "moss"): 4, ("role", "user"): 5}),
    )
    assert report.add_summaries([report.summary(first), report.summary(second), None]) == report.summary(first + second)
