"""OpenAI's chat messages as prompts in the World models' chat format, with the same tokens as the
converter's for the same conversation.
"""

from collections.abc import Sequence
from typing import Any

from rwkv.data.convert import messages as converted
from rwkv.data.convert import roles
from rwkv.data.convert.jsonl import BadRecord
from rwkv.data.convert.template import Template
from rwkv.text_stream import OPENING, STOP

_ROLES = {"system": roles.SYSTEM, "developer": roles.SYSTEM, "user": roles.USER, "assistant": roles.ASSISTANT}


class BadMessages(ValueError):
    """Invalid messages. `where` is the path in the request, such as messages[1].content."""

    def __init__(self, message: str, where: str):
        super().__init__(message)
        self.where = where


def prompt(messages: Any, think: str = "none") -> list[str]:
    """The prompt for the next answer, in parts that are tokenised one by one: an answer is a
    separate part, as in generation.

    Args:
        messages: a list of {"role": …, "content": …}. The content is a text or a list of parts
            {"type": "text", "text": …}.
        think: how the answer begins, as rwkv.text_stream.OPENING.

    Raises:
        BadMessages: not such messages, or the last one is the assistant's.
    """
    if not isinstance(messages, list) or not messages:
        raise BadMessages('expected a list of at least one message {"role": "user", "content": "..."}', "messages")
    parts, context, role = [], "", ""
    for i, message in enumerate(messages):
        role, text = _parsed(message, f"messages[{i}]")
        if role == roles.ASSISTANT:
            parts += [f"{context}Assistant:", f" {text}\n\n" if text else "\n\n"]
            context = ""
        else:
            context += f"{role.capitalize()}: {text}\n\n"
    if role == roles.ASSISTANT:
        raise BadMessages(
            "the last message is the assistant's; continuing it is not supported: end with a user's message, or use"
            " /v1/completions",
            f"messages[{len(messages) - 1}].role",
        )
    return list(filter(None, [*parts, f"{context}Assistant:", OPENING[think]]))


TOOL_STOP = (*STOP, "\n\nTool:")
"""Stop sequences of an answer that may call a tool: the next turn is the tool's result."""


def has_tools(messages: Any, tools: Any) -> bool:
    """Whether a chat has tools, calls of tools or their results, or thoughts in a field."""
    return bool(tools) or (
        isinstance(messages, list)
        and any(
            isinstance(message, dict)
            and (
                message.get("role") == roles.TOOL
                or any(message.get(key) for key in ("tool_calls", *converted.REASONING))
            )
            for message in messages
        )
    )


def prompt_with_tools(messages: Any, tools: Any, think: str = "none") -> list[str]:
    """As `prompt`, with the messages and tools that the converter accepts, in its format world, or
    g1 with `think`.

    Raises:
        BadRecord: invalid, as in a dataset, or the last message is the assistant's.
    """
    found = converted.read(messages, "messages")
    if tools and not isinstance(tools, list):
        raise BadRecord('"tools" is not a list')
    if not found or found[-1].role == roles.ASSISTANT:
        raise BadRecord("the last message is the assistant's; end with a user's message, or the result of a tool")
    answer = converted.Message(roles.ASSISTANT, "-")  # to be generated
    chat = converted.Conversation([*found, answer], "messages", converted.without_nulls(tools or []))
    *parts, context, _ = (text for text, _ in Template("world" if think == "none" else "g1").segments(chat))
    return list(filter(None, [*parts, context.removesuffix(OPENING["fast"]), OPENING[think]]))


def _parsed(message: Any, where: str) -> tuple[str, str]:
    """(role, text) of a message."""
    if not isinstance(message, dict):
        raise BadMessages('expected an object {"role": ..., "content": ...}', where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadMessages(f"role must be one of {', '.join(_ROLES)}", f"{where}.role")
    for key, value in message.items():
        if key not in ("role", "content", "name") and value not in (None, [], {}):
            raise BadMessages(f"{key[:100]} is not supported", f"{where}.{key[:100]}")
    return _ROLES[role], roles.fold(_text(message.get("content"), f"{where}.content"))


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        raise BadMessages("expected a text", where)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadMessages('only parts {"type": "text", "text": "..."} are supported', f"{where}[{i}]")
        texts.append(part["text"])
    return "".join(texts)


def tokens_of(tokenizer: Any, parts: Sequence[str], eod: bool = True) -> list[int]:
    """Token ids of a prompt.

    Args:
        eod: begin with EOD, like training documents after another.
    """
    ids = [tokenizer.eod] if eod else []
    for part in parts:
        ids += tokenizer.encode(part)
    return ids or [tokenizer.eod]
