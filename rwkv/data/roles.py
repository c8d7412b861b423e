"""Who says what in a chat: the names that data sets give to roles, and the whitespace rule of a turn."""

import re
import unicodedata

USER, ASSISTANT, SYSTEM, TOOL, CALL = "user", "assistant", "system", "tool", "call"

# Names as `_plain` leaves them. CALL is what an assistant sends to a tool, in data sets that make it a role of its own.
_NAMES = {
    USER: "user human prompter person people customer client student questioner asker inquirer query question q prompt instruction input"
    " 用户 用戶 使用者 人类 人類 人 问 問 问题 問題 提问 提問 提问者 客户 客戶 顾客 学生 玩家 我 指令 输入"
    " ユーザー ユーザ 人間 質問 사용자 인간 질문 usuario utilisateur utente benutzer nutzer пользователь человек вопрос",
    ASSISTANT: "assistant gpt chatgpt gpt3 gpt3.5 gpt4 gpt4o openai bing bard gemini claude llama qwen deepseek moss rwkv model llm lm ai bot"
    " chatbot robot agent chat_assistant ai_assistant answer a response reply output completion"
    " 助手 助理 智能助手 人工智能助手 人工智能 机器人 機器人 聊天机器人 模型 答 答案 回答 回复 回覆 答复 客服 输出"
    " アシスタント ボット 回答者 어시스턴트 챗봇 답변 답 asistente assistente assistent ассистент помощник ответ бот",
    SYSTEM: "system developer system_prompt sys instructions 系统 系統 系统提示 系统提示词 システム 시스템 sistema système systeme система",
    TOOL: "tool function observation ipython tool_response tool_responses tool_result tool_results tool_output function_response"
    " function_result function_output execution environment 工具 函数 函數 观察 觀察 观察结果 工具结果 工具返回",
    CALL: "function_call tool_call tool_calls function_calls action 工具调用 函数调用 工具呼叫",
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}


def role_of(name: str) -> str | None:
    """The role that a name stands for (USER, ASSISTANT, SYSTEM, TOOL, CALL), whatever its case and punctuation; None if it is unknown."""
    return _ROLES.get(_plain(name))


def known() -> str:
    """The roles with some of their names, for a message."""
    shown = {role: ", ".join(names.split()[:4]) for role, names in _NAMES.items()}
    chinese = {USER: ", 用户", ASSISTANT: ", gpt, ai, bot, 助手", SYSTEM: ", 系统", TOOL: "", CALL: ""}
    return "; ".join(dict.fromkeys(f"{shown[role]}{chinese[role]}" for role in _NAMES))


def fold(text: str) -> str:
    """The text of one turn as World models are trained on it: line breaks are LF, several in a row become one, none at the ends.

    A blank line ends a turn, so that none can be inside. Upstream's templates do the same to questions and system prompts.
    """
    return re.sub(r"\n{2,}", "\n", re.sub(r"\r\n?", "\n", text)).strip()


def _plain(name: str) -> str:
    """`<|User|>:`, `[Human]`, `Function-Call`, `ＡＩ` as user, human, function_call, ai."""
    name = unicodedata.normalize("NFKC", name).casefold().strip()
    return re.sub(r"[\s_-]+", "_", name.strip("<>|[](){}【】「」:*# \t\n"))
