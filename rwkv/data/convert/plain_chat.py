"""Find the answers in plain text that is formatted as a chat: `User: …`, blank line, `Assistant:
…`.
"""

import re

from rwkv.data.convert import roles

# also ### User:, **User:**, **User**:, [User]: and <|user|>:
_LABEL = re.compile(
    r"^[ \t\ufeff\u200b]*(?:#{1,6}[ \t]*|\*\*|[<\[【]\|?)?([^\W_][^\n:：]{0,24}?)(?:\*\*|\|?[>\]】])?[ \t]*[:：](?:\*\*)?",
    re.MULTILINE,
)
_KINDS = {  # labels that are used together; all other known role names belong to the first kind
    "chat": "system tool observation",
    "questions": "question answer 问题 問題 答案 回答 质問 質問 вопрос ответ",
    "letters": "q a 问 問 答",
    "instructions": "instruction input response output 指令 输入 输出",
    "names": "bob alice",  # RWKV-4-Raven
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def segments(text: str) -> list[tuple[str, bool]] | None:
    """The text as consecutive (text, is an answer) segments; None if it has no assistant turn.

    A turn begins at the start or after a blank line (or after any line break, if no answer follows
    a blank line) with a label such as `User:`, `Assistant:`, `Human:`, `Question:`,
    `### Instruction:`, `**User:**`, `用户：`. The first label of each side determines which labels
    are recognised, so that a line such as `Answer:` inside an answer is not a turn. An answer
    extends from its colon to the next turn.
    """
    if not (marks := _marks(text)):
        return None
    found, done = [], 0
    for (role, _, begin), (_, end, _) in zip(marks, [*marks[1:], ("", len(text), 0)], strict=True):
        if role == roles.ASSISTANT and text[begin:end].strip():
            found += [(text[done:begin], False), (text[begin:end], True)]
            done = end
    return [part for part in [*found, (text[done:], False)] if part[0]]


def turns(text: str) -> list[tuple[str, str]] | None:
    """(role, content) of the turns of a text that begins with one (see `segments`); None for
    others.
    """
    marks = _marks(text)
    if not marks or text[: marks[0][1]].strip():
        return None
    ends = [*(start for _, start, _ in marks[1:]), len(text)]
    return [(role, text[begin:end].strip()) for (role, _, begin), end in zip(marks, ends, strict=True)]


def _marks(text: str) -> list[tuple[str, int, int]]:
    """(role, start of the turn, start of its content) of every turn; empty if the assistant has
    none.
    """
    for blank_line in (True, False):
        marks = _turns(text, blank_line)
        if any(role == roles.ASSISTANT for role, _, _ in marks) and not (blank_line and _hides_turns(text, marks)):
            return marks
    return []


def _hides_turns(text: str, marks: list[tuple[str, int, int]]) -> bool:
    """Whether an answer contains a turn of the user and then one of the assistant after single line
    breaks: the text separates its turns in both ways.
    """
    every = _turns(text, False)
    for (role, _, begin), (_, end, _) in zip(marks, [*marks[1:], ("", len(text), 0)], strict=True):
        inside = [other for other, start, _ in every if begin < start < end]
        if role == roles.ASSISTANT and roles.USER in inside and roles.ASSISTANT in inside[inside.index(roles.USER) :]:
            return True
    return False


def _turns(text: str, blank_line: bool) -> list[tuple[str, int, int]]:
    """(role, start of the turn, start of its content) of every turn."""
    found: list[tuple[str, int, int]] = []
    sides: dict[str, str] = {}  # the label of each role
    kind = ""
    for match in _LABEL.finditer(text):
        before = text[: match.start()] if match.start() < 8 else text[match.start() - 8 : match.start()]
        if before.strip() == "" and match.start() == len(before):
            pass  # the start of the text
        elif blank_line and not re.search(r"\n[ \t\r]*\n\Z", before):
            continue
        name = roles.plain(match[1])
        role = roles.role_of(name)
        if role is None or role == roles.CALL:
            continue
        if role in (roles.USER, roles.ASSISTANT):
            label_kind = _KIND.get(name, "chat")
            kind = kind or label_kind
            if label_kind != kind or (sides.setdefault(role, name) != name and kind != "instructions"):
                continue
        elif name not in _KIND or (role == roles.SYSTEM and found):
            continue
        found.append((role, match.start(), match.end()))
    return found
