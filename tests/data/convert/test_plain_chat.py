"""Answers in plain-text chats are marked, and the text is unchanged."""

import pytest

from rwkv.data.convert import plain_chat


def marked(text):
    """The text with ⟦ ⟧ around the parts that contribute to the loss."""
    found = plain_chat.segments(text)
    if found is None:
        return None
    assert "".join(part for part, _ in found) == text
    return "".join(f"⟦{part}⟧" if trained else part for part, trained in found)


@pytest.mark.parametrize(
    "text",
    [
        "User: 1?\n\nAssistant:⟦ 2\n\n⟧User: 3?\n\nAssistant:⟦ 4⟧",
        "System: s\n\nUser: 1?\n\nAssistant:⟦ 2\n\n⟧",
        "User: 1?\r\n\r\nAssistant:⟦ 2\r\n\r\n⟧User: 3",
        "\n\nHuman: 1?\n\nBot:⟦ 2⟧",
        "Question: 1?\n\nAnswer:⟦ 2⟧",
        "Q: 1?\n\nA:⟦ 2⟧",
        "Instruction: do\n\nInput: x\n\nResponse:⟦ y⟧",
        "Bob: hi\n\nAlice:⟦ yo\n\n⟧Bob: so",
        "用户：1？\n\n助手：⟦2\n\n⟧用户：3",
        "USER: 1?\n\nASSISTANT:⟦ 2⟧",
        "User: 1?\nAssistant:⟦ 2\n⟧User: 3?\nAssistant:⟦ 4⟧",  # without blank lines
        "### Instruction:\nq\n\n### Input:\ni\n\n### Response:⟦\na⟧",
        "### Human: 1?\n### Assistant:⟦ 2⟧",
        "**User:** 1?\n\n**Assistant:**⟦ 2\n\n⟧**User:** 3",
        "**User**: 1?\n\n**Assistant**:⟦ 2⟧",
        "<|user|>: 1?\n\n[Assistant]:⟦ 2⟧",
        "\u200bUser: 1?\n\n\u200bAssistant:⟦ 2⟧",
        "User: 1?\n\nAssistant:⟦ 2\n⟧User: 3?\nAssistant:⟦ 4⟧",  # both ways in one text
        # other labels are text
        "User: 1?\n\nAssistant:⟦ a\n\nb\n\nNote: c\n\nQuestion: d\n\nAnswer: e\n\n⟧User: f",
        "User: 1?\nAssistant: no\n\nAssistant:⟦ 2⟧",
        "User: 1?\n\nAssistant: \n\nUser: 2?\n\nAssistant:⟦ 3⟧",  # an empty answer is not an answer
        "Title\n\nUser: 1?\n\nAssistant:⟦ 2⟧",
        "User: 1?\n\nTool: 3\n\nAssistant:⟦ 2\n\n⟧Tool: 4\n\nAssistant:⟦ 5⟧",
    ],
)
def test_answers(text):
    assert marked(text.replace("⟦", "").replace("⟧", "")) == text


@pytest.mark.parametrize("text", ["A novel.\n\nIt goes on: so.", "User: a question alone", "http://a: b\n\n12:30", ""])
def test_text_without_answers(text):
    assert marked(text) is None
