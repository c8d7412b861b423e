"""Parse the messages of a chat: role, text, reasoning, tool calls and whether each contributes to
the loss.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv.data.convert import roles
from rwkv.data.convert.jsonl import BadRecord, check_encodable

REASONING = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "thought",
    "thoughts",
    "think",
    "chain_of_thought",
    "reasoning_trace",
    "思考",
    "思维链",
    "推理",
)
NUMBERS = ("id", "_id", "idx", "index", "uuid")  # number a record or message, and are not content
_ROLE, _CONTENT = ("role", "from", "speaker"), ("content", "value", "text", "message", "utterance")
_FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
_USED = {*REASONING, *_FLAGS, "tool_calls", "function_call", "tool_call_id"}
_SPANS = ("train_detail", "training_detail")
_THINKING = ("thinking", "reasoning", "think")
_TEXT = ("text", "input_text", "output_text")
_ORDER = (roles.SYSTEM, roles.USER, roles.CALL, roles.TOOL, roles.ASSISTANT)


@dataclass
class Message:
    """One turn.

    Attributes:
        role: roles.USER, ASSISTANT, SYSTEM or TOOL.
        content: text without reasoning and tool calls.
        name: the role's name in the data.
        reasoning: the assistant's reasoning before the answer.
        calls: tool calls: objects with "name" and "arguments", or text if the data has only text.
        train: whether it contributes to the loss, if the data says so; None: determined by the
            role.
        unused: other fields of the message, which were not converted.
    """

    role: str
    content: str
    name: str = ""
    reasoning: str = ""
    calls: list[Any] = field(default_factory=list)
    train: bool | None = None
    unused: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        """Whether it has neither text, reasoning nor tool calls."""
        return roles.blank(self.content) and roles.blank(self.reasoning) and not self.calls


@dataclass
class Conversation:
    """Messages in order.

    Attributes:
        schema: schema of the record, such as alpaca.
        tools: the tools that the assistant may call, as given in the record.
        remarks: notes for the user about the record.
        used: the fields of the record, in lower case, that were converted.
        unused: its other fields.
    """

    messages: list[Message]
    schema: str
    tools: list[Any] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    unused: Sequence[str] = ()

    @property
    def skipped(self) -> str:
        """Why there is nothing to train on; empty if there is."""
        if not self.messages:
            return "conversations without messages"
        for message in self.messages:
            if message.empty and message.role in (roles.USER, roles.ASSISTANT):
                return f"conversations with an empty {message.role} message"
        return ""


def read(entries: Any, key: str, train: bool | None = None) -> list[Message]:
    """Parse a list of {role, content} (OpenAI), {from, value} (ShareGPT) or {human, assistant}
    objects.

    Empty system messages are dropped.

    Args:
        key: the list's name, for error messages.
        train: default of Message.train.

    Raises:
        BadRecord: not such a list, an unknown role, content other than text, a weight other than 0
            and 1.
    """
    if isinstance(entries, str):
        entries = json_or_text(text := entries)
        if isinstance(entries, str) and text.lstrip()[:1] in ("[", "{"):
            raise BadRecord(f'"{key}" is a text that is not JSON, such as Python\'s notation; write it with json.dumps')
    if isinstance(entries, dict):
        entries = _transposed(entries)
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes):
        raise BadRecord(f'"{key}" is not a list of messages')
    found = []
    for number, entry in enumerate(entries, 1):
        for message in _messages(entry, f'message {number} of "{key}"'):
            if message.train is None:
                message.train = train
            if not (message.role == roles.SYSTEM and message.empty):
                found.append(message)
    return found


def _transposed(columns: dict) -> Any:
    """Messages from an object of equally long lists, as the datasets library stores a Sequence of
    objects; any other object unchanged.
    """
    lists = list(columns.values())
    if not lists or not all(isinstance(one, list) for one in lists) or len({len(one) for one in lists}) > 1:
        return columns
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def parse_call(value: Any, where: str) -> Any:
    """Normalise a tool call of OpenAI's or ShareGPT's form to {"name", "arguments"}; text that is
    not JSON stays text.

    Raises:
        BadRecord: the call has no name.
    """
    if isinstance(value, str):
        value = text if isinstance(value := json_or_text(text := value), str) else value
        if not isinstance(value, dict):
            return check_encodable(text.strip())
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise BadRecord(f'{where} has a tool call without a "name"; expected {{"name": "...", "arguments": {{...}}}}')
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = json_or_text(arguments)
    return {"name": value["name"], "arguments": {} if arguments is None else without_nulls(arguments)}


def without_nulls(value: Any) -> Any:
    """A JSON value without null members, which parquet adds to objects that lack a field."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def first_present(mapping: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """The first of the names that is present and not null, with its value; ("", None) if none
    is.
    """
    for name in names:
        if (value := mapping.get(name)) is not None:
            return name, value
    return "", None


def unused(fields: Mapping[str, Any], used: Collection[str]) -> list[str]:
    """The names of fields that have a value, are not in `used`, and do not only number a record."""
    return [
        key
        for key, value in fields.items()
        if key not in used and key not in NUMBERS and value not in (None, "", [], {})
    ]


def _messages(entry: Any, where: str) -> Iterator[Message]:
    if not isinstance(entry, dict):
        raise BadRecord(f"{where} is of type {type(entry).__name__}, not an object")
    entry = {str(key).casefold(): value for key, value in entry.items()}
    role_key, name = first_present(entry, _ROLE)
    if name is None and (pairs := _by_role(entry)):
        yield from (_message(role, text, {}, where) for role, text in pairs)
        return
    if not isinstance(name, str):
        raise BadRecord(f'{where} has no "role" (or "from")')
    present, content = first_present(entry, _CONTENT)
    message = _message(name, content, entry, where)
    message.unused = unused(entry, {role_key, present, *_USED})
    yield message


def _by_role(entry: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(role, text) pairs of an object whose keys are role names, such as {"human": …, "assistant":
    …}; empty if any key is not.
    """
    named = [
        (role, key, value)
        for key, value in entry.items()
        if value is not None and (role := roles.role_of(key)) is not None
    ]
    if len(named) < sum(value is not None for value in entry.values()):
        return []
    return [(key, value) for role, key, value in sorted(named, key=lambda item: _ORDER.index(item[0]))]


def _message(name: str, content: Any, entry: Mapping[str, Any], where: str) -> Message:
    role = roles.role_of(name)
    if role is None:
        raise BadRecord(f"{where} has the unknown role {name[:40]!r}; known are {roles.known()}; rename it in the data")
    message = Message(role, "", name, train=_train(entry, role, where))
    text, message.reasoning = _text(content, where)
    key, reasoning = first_present(entry, REASONING)
    if key and not isinstance(reasoning, str):
        raise BadRecord(f'{where} has a {type(reasoning).__name__} under "{key}", not a string')
    if reasoning and reasoning.strip():
        if text and text.lstrip().startswith("<think>"):
            if reasoning.strip() not in text:
                raise BadRecord(
                    f'{where} has reasoning in its text (<think>) and other reasoning under "{key}"; keep one of them'
                )
        else:
            message.reasoning = (
                f"{message.reasoning}\n{reasoning}".strip() if message.reasoning else check_encodable(reasoning)
            )
    message.calls = _calls(entry, where)
    if (
        roles.plain(name) == "function"
        and isinstance(called := json_or_text(text or ""), dict)
        and set(called) == {"name", "arguments"}
    ):
        role = roles.CALL  # "function" is a call in LLaMA-Factory, a result in OpenAI's format
    if role == roles.CALL:
        message.role, calls = roles.ASSISTANT, json_or_text(text or "")
        message.calls += [
            parse_call(item, where) for item in (calls if isinstance(calls, list) else [text or ""]) if item
        ]
        text = ""
    if text is None and not (message.calls or message.reasoning):
        raise BadRecord(f'{where} has no text under "content" (or "value")')
    message.content = text or ""
    if message.role != roles.ASSISTANT and (message.reasoning or message.calls):
        raise BadRecord(
            f"{where} is a {role} message with {'tool calls' if message.calls else 'reasoning'}, which only an assistant's can have"
        )
    return message


def _text(content: Any, where: str) -> tuple[str | None, str]:
    """(text, reasoning) of a message's content, a string or a list of parts; text None if there is
    none.
    """
    if content is None or isinstance(content, str):
        return content and check_encodable(content), ""
    if not isinstance(content, list):
        raise BadRecord(f"{where} has no text: its content is of type {type(content).__name__}")
    texts: list[str] = []
    reasoning: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, dict) and kind in _THINKING:
            _, text = first_present(part, (*_THINKING, "text", "content"))
            target = reasoning
        else:
            text = part.get("text") if isinstance(part, dict) and kind in (*_TEXT, None) else None
            target = texts
        if not isinstance(text, str):
            raise BadRecord(f"{where} has no text in a part of type {str(kind)[:40]!r}; only text can be trained on")
        target.append(text)
    return check_encodable("".join(texts)) if texts else None, check_encodable("\n".join(reasoning))


def _calls(entry: Mapping[str, Any], where: str) -> list[Any]:
    found = []
    calls = entry.get("tool_calls")
    if isinstance(calls, str) and calls.strip():
        calls = json_or_text(calls)
    if calls:
        if not isinstance(calls, list):
            raise BadRecord(f'{where} has "tool_calls" that is not a list')
        found += [parse_call(item, where) for item in calls]
    if entry.get("function_call"):
        found.append(parse_call(entry["function_call"], where))
    return found


def _train(entry: Mapping[str, Any], role: str, where: str) -> bool | None:
    if spans := next((key for key in _SPANS if entry.get(key)), None):
        raise BadRecord(
            f'{where} has "{spans}", a loss mask inside a message, which is not supported; split the message, or remove it'
        )
    found = None
    for key in _FLAGS:
        value = entry.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise BadRecord(f'{where} has "{key}": {repr(value)[:40]}; only 0 and 1 (false and true) are supported')
        if value == 0:
            return False
        # OpenAI's format has "weight": 1 also on messages of other roles, where it means nothing.
        if role in (roles.ASSISTANT, roles.CALL) or key != "weight":
            found = True
    return found


def json_or_text(text: str) -> Any:
    """The object or array that a JSON text contains; the text itself if it is not such JSON."""
    try:
        return json.loads(text) if text.strip()[:1] in ("{", "[") else text
    except (ValueError, RecursionError):
        return text
