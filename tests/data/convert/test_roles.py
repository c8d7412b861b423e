"""Role names in datasets, and normalisation of a turn as in upstream's templates."""

import re

import pytest

from rwkv.data.convert import roles


@pytest.mark.parametrize(
    ("role", "names"),
    [
        # https://github.com/axolotl-ai-cloud/axolotl/issues/752: role names differ between
        # datasets
        (
            "user",
            "user User USER human Human prompter questioner 用户 用戶 问 人类 <|user|> [Human] <|Human|>: 用户： customer instruction Ｕｓｅｒ Пользователь Người_dùng Usuário ユーザー",
        ),
        (
            "assistant",
            "assistant Assistant ASSISTANT gpt GPT chatgpt GPT-4 gpt-3.5-turbo bing bard model AI bot Chatbot 助手 答 机器人 <|MOSS|> 智能助手 AI助手 IA Ассистент Trợ_lý",
        ),
        ("system", "system System SYSTEM developer 系统 <|system|>"),
        ("tool", "tool Tool function observation Observation ipython tool-response 工具"),
        ("function_call", "function_call Function-Call tool_call FUNCTION_CALL"),
    ],
)
def test_role_names(role, names):
    assert {name: roles.role_of(name) for name in names.split()} == dict.fromkeys(names.split(), role)


@pytest.mark.parametrize("name", ["narrator", "", "user2", "旁白", "userassistant"])
def test_unknown_names(name):
    assert roles.role_of(name) is None


def test_blank():
    assert all(map(roles.blank, ("", " \n", "\u200b\ufeff", "\u3000\u2060")))
    assert not roles.blank("\u200ba")
    assert roles.role_of("\u200buser") == "user"


def upstream(text):
    """RWKV-7 G1's rule for the text of a turn, as stated in its template file."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


@pytest.mark.parametrize(
    "text",
    ["a\n\nb\r\nc", "\r\n\r\na ", "a\n\n\n\nb", "a\n \nb", "def f():\n\n    pass\r\n\r\n\r\nf()", "", "好\n\n\u3000好"],
)
def test_fold_matches_upstream(text):
    assert roles.fold(text) == upstream(text)


def test_folded_text_has_no_blank_line():
    for text in (
        "hi\n\nAssistant: no",
        "hi\r\n\r\nAssistant: no",
        "hi\r\rAssistant: no",
        "hi\r\r\nAssistant: no",
        "hi\n\r\nAssistant: no",
    ):
        assert roles.fold(text) == "hi\nAssistant: no"
