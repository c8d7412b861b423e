"""Detect the schema of a conversation record by its keys (a list of messages, alpaca, MOSS, …) and
parse it.
"""

import re
from collections.abc import Mapping
from typing import Any

from rwkv.data.convert import messages, roles
from rwkv.data.convert.jsonl import BadRecord, check_encodable
from rwkv.data.convert.messages import Conversation, Message, first_present, json_or_text

MESSAGES = ("messages", "conversations")  # also as names for --jsonl_keys
_LISTS = ("conversation", "dialogue", "dialog", "dialogs", "chat")  # only if the value is a list
_ANY_LIST = (*MESSAGES, *_LISTS)
_QUESTIONS = (
    "instruction",
    "prompt",
    "query",
    "question",
    "problem",
    "user",
    "human",
    "q",
    "问题",
    "指令",
    "提问",
    "问",
)
_CONTEXTS = ("input", "context", "输入")
_ANSWERS = (
    "output",
    "response",
    "completion",
    "answer",
    "solution",
    "target",
    "assistant",
    "gpt",
    "bot",
    "a",
    "回答",
    "答案",
    "输出",
    "答",
)
_SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "meta_instruction")
_REASONING = (*messages.REASONING, "complex_cot", "cot", "rationale", "analysis")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_OTHER = ("text", "history", "tools", "functions", "chosen", "rejected", "kto_tag", "label", "plain_text", "prefix")

# Instruction schemas by their name for --format: the keys of question, context and answer.
PAIRS = {
    "alpaca": ("instruction", "input", "output"),  # BELLE's too
    "dolly": ("instruction", "context", "response"),
    "firefly": ("input", "", "target"),
    "prompt_completion": ("prompt", "", "completion"),
    "prompt_response": ("prompt", "", "response"),
    "query_response": ("query", "", "response"),
    "question_answer": ("question", "", "answer"),
}
PREFERENCE = "preference"  # see rwkv.data.convert.preference
FORMATS = ("auto", "text", "messages", "moss", PREFERENCE, *PAIRS)

_NAMES = (*MESSAGES, *_LISTS, *_QUESTIONS, *_CONTEXTS, *_ANSWERS, *_SYSTEM, *_REASONING, *_MEDIA, *_OTHER)
# the keys that are read, as they are usually spelled
FIELDS = tuple(
    dict.fromkeys(
        ["Complex_CoT", *(form for name in _NAMES for form in (name, name.capitalize(), name.title(), name.upper()))]
    )
)

_IGNORED = {"num_turns"}

_TURNS = re.compile(
    r"(?:\A|\n)[ \t]*(Human|User|Assistant|Bot|AI|用户|人类|问|助手|机器人|答)[ \t]*[:：]", re.IGNORECASE
)
_MOSS = re.compile(r"(?:<\|(Human|Inner Thoughts|Commands|Results|MOSS)\|>|\[(Human|MOSS)\])[ \t]*[:：]")
_MOSS_END = re.compile(r"<eo[a-z]>\s*\Z")


def conversation(record: Mapping[str, Any], kind: str = "auto") -> Conversation | None:
    """Parse the conversation in a record; None if there is none (only with `auto`). Keys ignore
    case, null means absent.

    Args:
        kind: one of FORMATS except text and preference; auto: detect by the keys.

    Raises:
        BadRecord: a conversation that cannot be trained on, or a record that does not match `kind`.
    """
    every = folded(record)
    fields = {key: value for key, value in every.items() if value is not None}
    if kind == "auto" and "chosen" in fields and "rejected" in fields:
        raise BadRecord(
            'a preference pair ("chosen" and "rejected", as for DPO) among other records; convert pairs separately,'
            " from a file that begins with one, or choose the fields to use with --format"
        )
    found = _messages(fields, kind) or _moss(fields, kind) or _pair(every, kind)
    if (
        found is None
        and kind in ("auto", "messages")
        and "text" not in fields
        and any(every.get(key, 0) in (None, []) for key in _ANY_LIST[:3])
    ):
        found = Conversation([], "messages")
    if found is None:
        if kind != "auto":
            raise BadRecord(
                f"--format {kind} expects {_expected(kind)}, but it has {', '.join(map(repr, list(record)[:8])) or 'nothing'}"
            )
        return None
    while found.messages and found.messages[-1].role == roles.USER and found.messages[-1].empty:
        found.messages.pop()  # an empty final question without an answer
    return completed(found, record, fields)


def folded(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record by their keys in lower case."""
    return {str(key).casefold(): value for key, value in record.items()}


def completed(found: Conversation, record: Mapping[str, Any], fields: Mapping[str, Any]) -> Conversation:
    """The conversation with the record's system message, tools and unused fields.

    Args:
        fields: of the record, without nulls, by keys in lower case.

    Raises:
        BadRecord: the record has images or other media, or is an undesirable answer of KTO.
    """
    if media := next((key for key in _MEDIA if fields.get(key)), None):
        raise BadRecord(f'it has "{media}"; only text can be trained on')
    desirable = str(fields.get("kto_tag", fields.get("label"))).casefold()  # csv has only texts
    if desirable == "true":
        found.used |= {"kto_tag", "label"}
    if desirable == "false":
        raise BadRecord("it is marked as an undesirable answer (KTO's label false); remove such records")
    key, tools = first_present(fields, ("tools", "functions"))
    found.used.add(key)
    if isinstance(tools, str):
        tools = json_or_text(tools)
    if tools:
        found.tools = messages.without_nulls(tools) if isinstance(tools, list) else [tools]
    found = _with_system(found, fields)
    omitted = [name for name in getattr(record, "omitted", ()) if name.casefold() not in messages.NUMBERS]
    found.unused = [*messages.unused(fields, found.used | _IGNORED), *omitted]
    return found


def _expected(kind: str) -> str:
    if kind in PAIRS:
        question, context, answer = PAIRS[kind]
        return f'"{question}" and "{answer}"' + (f' (and perhaps "{context}")' if context else "")
    return (
        'a list under "messages" or "conversations"'
        if kind == "messages"
        else '"chat" with "turn_1", …, or "plain_text"'
    )


def _messages(fields: Mapping[str, Any], kind: str) -> Conversation | None:
    if kind not in ("auto", "messages"):
        return None
    key = next((key for key in MESSAGES if key in fields), None) or next(
        (key for key in _LISTS if isinstance(fields.get(key), list)), None
    )
    if key is None or fields[key] == []:
        return None
    found = Conversation(messages.read(fields[key], key), "messages", used={key})
    if kind == "auto":
        others = [
            other
            for other in ("text", *(key for pair in PAIRS.values() for key in (pair[0], pair[2])))
            if other in fields
        ]
        if others:
            found.used.update(others)
            found.remarks.append(f'records with "{key}" and also "{others[0]}", of which "{key}" was converted')
    return found


def _pair(fields: Mapping[str, Any], kind: str) -> Conversation | None:
    """A question and an answer under separate keys, with optional context, history and reasoning.
    null is an empty text.
    """
    if kind in PAIRS:
        question, context, answer = PAIRS[kind]
        if question not in fields or answer not in fields:
            return None
        return _asked_and_answered(fields, question, context, answer, kind)
    if kind != "auto":
        return None
    questions, contexts, answers = (_present(fields, names) for names in (_QUESTIONS, _CONTEXTS, _ANSWERS))
    if not questions:
        questions, contexts = contexts, []
    if not questions or not answers or all(fields[key] is None for key in (*questions, *answers)):
        return None
    for several, what in ((questions, "question"), (answers, "answer")):
        if len(several) > 1:
            raise BadRecord(
                f"it has {' and '.join(map(repr, several))}, and only one of them can be the {what}; name the one to use with --format"
                f" ({', '.join(PAIRS)}), or rename the others"
            )
    name = next((name for name, pair in PAIRS.items() if (pair[0], pair[2]) == (questions[0], answers[0])), "")
    if fields.get("text") is not None:
        raise BadRecord(
            f'it has "text" and also {questions[0]!r} and {answers[0]!r}; pass --format text to train on the text, or'
            f" {f'--format {name}' if name else 'remove the text'} to train on the answers"
        )
    context = contexts[0] if contexts else ""
    return _asked_and_answered(fields, questions[0], context, answers[0], name or f"{questions[0]}_{answers[0]}")


def _present(fields: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """The names that are present and not null; if all are null, the first that is present."""
    present = [name for name in names if name in fields]
    return [name for name in present if fields[name] is not None] or present[:1]


def _asked_and_answered(
    fields: Mapping[str, Any], question: str, context: str, answer: str, schema: str
) -> Conversation:
    reasoning, _ = first_present(fields, _REASONING)
    used = {question, context, answer, reasoning, "history"}
    return Conversation(_turns(fields, question, context, answer), schema, used=used)


def _turns(fields: Mapping[str, Any], question: str, context: str, answer: str) -> list[Message]:
    found = question_turns(fields, question, context)
    if isinstance(fields[answer], list) and any(isinstance(entry, str) for entry in fields[answer]):
        raise BadRecord(f'"{answer}" is a list of {len(fields[answer])} texts; keep one answer, as a text')
    if isinstance(fields[answer], list):
        return found + messages.read(fields[answer], answer)
    key, _ = first_present(fields, _REASONING)
    entry = {"role": "assistant", "content": string_of(fields, answer)} | ({"reasoning": fields[key]} if key else {})
    return found + messages.read([entry], answer)


def question_keys(fields: Mapping[str, Any]) -> tuple[str, str]:
    """The keys of a question and of its context; "" for what is missing."""
    questions, contexts = (_present(fields, names) for names in (_QUESTIONS, _CONTEXTS))
    return (questions or contexts or [""])[0], (contexts or [""])[0] if questions else ""


def question_turns(fields: Mapping[str, Any], question: str, context: str) -> list[Message]:
    """The turns before an answer: those of the history, then the question with its context."""
    found = [message for pair in _history(fields) for message in pair]
    # TRL's conversational prompts: only the completion is trained on
    if isinstance(fields[question], list):
        found += messages.read(fields[question], question, train=False)
    else:
        parts = [string_of(fields, key) for key in (question, context) if key]
        asked = "\n".join(part.strip() for part in parts if part.strip())
        found += _asked(asked) or [Message(roles.USER, asked)]
    return found


def _asked(text: str) -> list[Message]:
    """The turns inside a question that ends with "Assistant:" (BELLE's multi-turn data, prepared
    prompts); empty for others.
    """
    marks = list(_TURNS.finditer(text))
    if (
        len(marks) < 2
        or marks[0].start()
        or roles.role_of(marks[-1][1]) != roles.ASSISTANT
        or text[marks[-1].end() :].strip()
    ):
        return []
    ends = [mark.start() for mark in marks[1:]]
    return [
        Message(roles.role_of(mark[1]) or "", text[mark.end() : end], mark[1])
        for mark, end in zip(marks, ends, strict=False)
    ]


def _history(fields: Mapping[str, Any]) -> list[list[Message]]:
    """Earlier turns: [question, answer] pairs, or messages."""
    history = fields.get("history")
    if isinstance(history, str):
        history = json_or_text(history)
    if not history:
        return []
    if not isinstance(history, list):
        raise BadRecord('"history" is not a list of [question, answer] pairs')
    if all(isinstance(pair, list) for pair in history):
        if any(len(pair) != 2 or not all(isinstance(text, str) for text in pair) for pair in history):
            raise BadRecord('"history" is not a list of [question, answer] pairs')
        return [
            [Message(roles.USER, check_encodable(asked)), Message(roles.ASSISTANT, check_encodable(said))]
            for asked, said in history
        ]
    return [messages.read(history, "history")]


def _moss(fields: Mapping[str, Any], kind: str) -> Conversation | None:
    """MOSS: "chat" with turn_1, turn_2, …, each with tagged texts, or all of them in
    "plain_text".
    """
    if kind not in ("auto", "moss"):
        return None
    chat, text = fields.get("chat"), fields.get("plain_text")
    if isinstance(chat, dict) and chat and all(re.fullmatch(r"turn_\d+", str(key)) for key in chat):
        turns = [chat[key] for key in sorted(chat, key=lambda key: int(key[5:])) if chat[key] is not None]
        if not all(isinstance(turn, dict) for turn in turns):
            raise BadRecord('"chat" has a turn that is not an object')
        parts = [(str(name), string_of(turn, name)) for turn in turns for name in turn if turn[name] is not None]
        parts = [(name, _MOSS.sub("", part, count=1) if _MOSS.match(part.lstrip()) else part) for name, part in parts]
    elif isinstance(text, str) and (marks := list(_MOSS.finditer(text))):
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        parts = [(mark[1] or mark[2], text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
        if before := text[: marks[0].start()].strip():
            parts.insert(0, ("system", before))
    else:
        return None
    found: list[Message] = []
    thoughts = ""
    for name, part in parts:
        part = check_encodable(_MOSS_END.sub("", part.rstrip()).strip())
        kind_of = name.casefold().replace("_", " ")
        is_empty = part.casefold() in ("", "none")
        if kind_of == "inner thoughts":
            thoughts = "" if is_empty else part
        elif kind_of == "commands":
            if not is_empty:
                found.append(Message(roles.ASSISTANT, "", name, thoughts, [part]))
                thoughts = ""
        elif kind_of in ("tool responses", "results"):
            if not is_empty:
                found.append(Message(roles.TOOL, part, name))
        elif role := roles.role_of(name):
            found.append(Message(role, part, name, thoughts if role == roles.ASSISTANT else ""))
            thoughts = ""
        else:
            raise BadRecord(f"a turn of MOSS data has the unknown part {name[:40]!r}")
    return Conversation(found, "moss", used={"chat", "plain_text"})


def _with_system(found: Conversation, fields: Mapping[str, Any]) -> Conversation:
    key, system = first_present(fields, (*_SYSTEM, "prefix") if found.schema == "moss" else _SYSTEM)
    found.used.add(key)
    if not key or not found.messages or not (system := string_of(fields, key)).strip():
        return found
    first = found.messages[0]
    if first.role != roles.SYSTEM:
        found.messages.insert(0, Message(roles.SYSTEM, check_encodable(system), key))
    elif roles.fold(first.content) != roles.fold(system):
        raise BadRecord(f'it has a system message and another text under "{key}"; keep one of them')
    return found


def string_of(fields: Mapping[str, Any], key: str) -> str:
    """The text under a key, "" if it is absent. Raises BadRecord for another type."""
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f'"{key}" is of type {type(value).__name__}, not a string')
    return check_encodable(value)
