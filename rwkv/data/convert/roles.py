"""Chat roles: their names in datasets, and normalisation of the text of a turn."""

import functools
import re
import unicodedata

USER, ASSISTANT, SYSTEM, TOOL, CALL = "user", "assistant", "system", "tool", "function_call"

# Names as normalised by `plain`. CALL: a tool call of the assistant, which some datasets give a
# separate role.
_NAMES = {
    USER: "user human bob prompter person customer client student questioner asker inquirer query question q prompt instruction input"
    " 用户 用戶 使用者 人类 人類 人 问 問 问题 問題 提问 提問 提问者 客户 客戶 顾客 学生 指令 输入"
    " ユーザー ユーザ 人間 質問 사용자 인간 질문 usuario utilisateur utente benutzer nutzer пользователь человек вопрос"
    " usuário utilizador użytkownik kullanıcı người_dùng pengguna المستخدم उपयोगकर्ता",
    ASSISTANT: "assistant alice openai bing bard gemini claude copilot grok llama mistral vicuna qwen chatglm deepseek kimi moss rwkv"
    " model language_model llm ai bot chatbot robot agent chat_assistant ai_assistant answer a response reply output completion"
    " 助手 助理 智能助手 人工智能助手 ai助手 ai_助手 小助手 人工智能 机器人 機器人 聊天机器人 模型 答 答案 回答 回复 回覆 答复 客服 输出"
    " アシスタント ボット 어시스턴트 챗봇 답변 답 asistente assistente assistent ассистент помощник ответ бот"
    " asystent asistan asisten trợ_lý المساعد सहायक ia ki ии",
    SYSTEM: "system developer system_prompt sys 系统 系統 系统提示 系统提示词 系统消息 系统指令 システム 시스템 sistema système systeme система",
    TOOL: "tool function observation ipython tool_response tool_responses tool_result tool_results tool_output function_response"
    " function_result function_output 工具 函数 函數 观察 觀察 观察结果 工具结果 工具返回 工具响应",
    CALL: "function_call tool_call tool_calls function_calls 工具调用 函数调用",
}
_SHOWN = {
    USER: "user, human, 用户",
    ASSISTANT: "assistant, gpt, bot, 助手",
    SYSTEM: "system, 系统",
    TOOL: "tool, observation",
    CALL: "function_call",
}


@functools.lru_cache(1024)
def role_of(name: str) -> str | None:
    """The role of a name (USER, ASSISTANT, SYSTEM, TOOL or CALL), ignoring case and punctuation;
    None if unknown.
    """
    name = plain(name)
    return ASSISTANT if re.match(r"(chat)?gpt", name) else _ROLES.get(name)


def known() -> str:
    """The most common role names, for messages."""
    return "; ".join(_SHOWN.values())


def plain(name: str) -> str:
    """Normalise a role name: `<|User|>:`, `[Human]` and `Function-Call` give user, human and
    function_call.
    """
    name = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_-]+", "_", name.strip("<>|[](){}【】「」:*# \t\r\n\u200b\ufeff"))


_ROLES = {plain(name): role for role, names in _NAMES.items() for name in names.split()}


def fold(text: str) -> str:
    """Normalise the text of a turn for World models: CRLF becomes LF, blank lines are removed, the
    ends are stripped.

    A blank line ends a turn, so a turn cannot contain one, not even in code. Upstream's chat
    templates do the same.
    """
    text = newlines(text)
    return (re.sub(r"\n{2,}", "\n", text) if "\n\n" in text else text).strip()


def blank(text: str) -> bool:
    """Whether a text has only white space and invisible characters, such as zero-width spaces."""
    return _BLANK.fullmatch(text) is not None


_BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")


def newlines(text: str) -> str:
    """The text with CRLF and CR as LF."""
    return re.sub(r"\r\n?", "\n", text) if "\r" in text else text
