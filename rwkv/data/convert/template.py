"""Render conversations with a chat template, and mark the assistant's parts, which contribute to
the loss.
"""

import json
import re
import secrets
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext

from rwkv.data.convert import roles
from rwkv.data.convert.jsonl import BadRecord, check_encodable
from rwkv.data.convert.messages import Conversation, Message
from rwkv.data.convert.sandbox import LimitExceeded, Sandbox, bounded
from rwkv.errors import UserError

_MARKS = re.compile(r"<\|im_(?:start|end)\|>")
_MAX_CHARACTERS = 1 << 26  # of a rendered conversation


class Template:
    """A chat template: `world`, `g1`, `chatml`, or a Jinja file that is rendered with `messages`, a
    list of {role, content}.

    As in transformers, `{% generation %} … {% endgeneration %}` encloses what the assistant says,
    including its end marker. A template that mentions `tools`, `tool_calls` or `reasoning_content`
    gets them as variables; otherwise they are inserted into the text. The filter `fold` removes
    blank lines.

    Raises:
        UserError: no such file, not Jinja, or no generation block.
    """

    def __init__(self, name: str, text: str | None = None):
        self._built_in = _BUILT_IN.get(name)
        self._name, self._text = name, "" if self._built_in else _read(name) if text is None else text
        self._variables: set[str] = {"reasoning_content"} if name == "g1" else set()
        if not self._built_in:
            self._compile(name, self._text)

    def _compile(self, name: str, text: str) -> None:
        # delimits generation blocks; random, so that no text contains it
        self._mark = secrets.token_hex(16)
        environment = Sandbox(extensions=[_Generation, "jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _tojson
        environment.filters["fold"] = lambda value: roles.fold(str(value))
        environment.extend(generation_mark=self._mark)
        try:
            with bounded():
                words = [(kind, value) for _, kind, value in environment.lex(text)]
                self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{name}, line {error.lineno}: not a Jinja template ({error.message}); correct it there"
            ) from error
        except Exception as error:  # Jinja evaluates constant expressions while compiling
            raise UserError(f"{name}: not a valid template ({_reason(error)}); correct it") from error
        if ("name", "generation") not in words:
            raise UserError(
                f"{name}: has no generation block; put {{% generation %}} and {{% endgeneration %}} around what contributes to the loss"
            )
        known = {value for kind, value in words if kind in ("name", "string")}
        self._variables = {
            field for field in ("tools", "tool_calls", "reasoning_content") if any(field in value for value in known)
        }

    def __getstate__(self) -> tuple[str, str]:
        return self._name, self._text

    def __setstate__(self, state: tuple[str, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]  # compiled templates cannot be pickled

    def segments(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The text of a conversation as consecutive (text, contributes to the loss) segments.

        Raises:
            BadRecord: the template rejects it, fails, or exceeds a limit.
        """
        messages = (
            _with_tools(conversation)
            if conversation.tools and "tools" not in self._variables
            else conversation.messages
        )
        given = [self._as_variables(message) for message in messages]
        if self._built_in:
            last = max((i for i, message in enumerate(messages) if message.role == roles.ASSISTANT), default=-1)
            return _joined(messages, [self._built_in(shown, i == last) for i, shown in enumerate(given)])
        try:
            with bounded():
                text = self._template.render(messages=given, tools=conversation.tools or None)
        except jinja2.TemplateError as error:
            raise BadRecord(f"the chat template rejects it ({_reason(error)})") from error
        except Exception as error:
            raise BadRecord(f"the chat template fails: {_reason(error)}") from error
        if len(text) > _MAX_CHARACTERS:
            raise BadRecord(f"the chat template renders it to {len(text):,} characters, more than {_MAX_CHARACTERS:,}")
        parts = check_encodable(text).split(self._mark)
        marked = [index for index, _ in enumerate(parts) if index % 2]
        flags = dict(zip(marked, self._trained(messages, len(marked)), strict=True))
        return [(part, flags.get(index, False)) for index, part in enumerate(parts) if part]

    def _trained(self, messages: list[Message], blocks: int) -> list[bool]:
        """Whether each generation block contributes to the loss."""
        if any(message.train for message in messages if message.role != roles.ASSISTANT):
            raise BadRecord(
                "a message of another role than assistant contributes to the loss, which only the templates world, g1 and chatml support"
            )
        flags = [message.train is not False for message in messages if message.role == roles.ASSISTANT]
        if all(flags):
            return [True] * blocks
        if len(flags) != blocks:
            raise BadRecord(
                f"a weight of 0 cannot be applied: the chat template has {blocks} generation blocks, but there are {len(flags)} assistant messages"
            )
        return flags

    def _as_variables(self, message: Message) -> dict[str, Any]:
        shown: dict[str, Any] = {"role": message.role, "name": message.name}
        content, calls, reasoning = message.content, message.calls, message.reasoning
        if reasoning and "reasoning_content" in self._variables:
            shown["reasoning_content"], reasoning = reasoning, ""
        if calls and "tool_calls" in self._variables:
            shown["tool_calls"] = [
                {"type": "function", "function": call} if isinstance(call, dict) else call for call in calls
            ]
            calls = []
        parts = [f"<think>{reasoning.strip()}</think>"] if reasoning else []
        parts += [content] if content.strip() else []
        parts += [f"<tool_call>\n{call if isinstance(call, str) else _json(call)}\n</tool_call>" for call in calls]
        shown["content"] = roles.newlines("\n".join(parts) if reasoning or calls else content)
        return shown


def _with_tools(conversation: Conversation) -> list[Message]:
    """The messages, with the tools appended to the system message."""
    lines = [check_encodable(tool) if isinstance(tool, str) else _json(tool) for tool in conversation.tools]
    text = "\n".join(["<tools>", *lines, "</tools>"])
    first, *rest = conversation.messages
    if first.role == roles.SYSTEM:
        return [Message(roles.SYSTEM, f"{first.content.rstrip()}\n{text}", first.name, train=first.train), *rest]
    return [Message(roles.SYSTEM, text), first, *rest]


def _world(message: dict[str, Any], last: bool) -> tuple[str, str, str]:
    """A turn in the World models' format: (before the message, message with its end marker, after).
    A blank line ends a turn.

    Args:
        last: whether it is the assistant's last message.
    """
    return f"{message['role'].capitalize()}:", f" {roles.fold(message['content'])}\n\n", ""


def _g1(message: dict[str, Any], last: bool) -> tuple[str, str, str]:
    """A turn in the format of the RWKV-7 G1 models (RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt), as
    `_world`.

    Answers begin with the thoughts that the data has. If the last answer has none, empty thoughts
    precede it; they do not contribute to the loss, because generation inserts them (--think fast).
    As in generation, earlier answers have no empty thoughts. The models know the roles system, user
    and assistant; results of tools are messages of the user.
    """
    role, content = message["role"], roles.fold(message["content"])
    if role == roles.TOOL:
        return "User:", f" <tool_response>\n{content}\n</tool_response>\n\n", ""
    thoughts = roles.fold(message.get("reasoning_content", ""))
    if role != roles.ASSISTANT or content.startswith("<think>") or not (thoughts or last):
        return _world(message, last)
    # the last ">" belongs to the next token, as in rwkv/text_stream.py
    opening = "Assistant: <think" if thoughts else "Assistant: <think>\n</think"
    return opening, (f">\n{thoughts}\n</think>" if thoughts else ">") + f"\n{content}\n\n", ""


def _chatml(message: dict[str, Any], last: bool) -> tuple[str, str, str]:
    """A turn in ChatML, as `_world`."""
    if found := _MARKS.search(message["content"]):
        raise BadRecord(f"a message contains {found[0]}, which separates messages in chatml")
    return f"<|im_start|>{message['role']}\n", f"{message['content'].strip()}<|im_end|>", "\n"


_BUILT_IN = {"world": _world, "g1": _g1, "chatml": _chatml}


def _joined(messages: list[Message], turns: list[tuple[str, str, str]]) -> list[tuple[str, bool]]:
    """Segments of the turns. An assistant message is always a separate segment, as generation
    tokenises it separately.
    """
    found, context = [], ""
    for message, (before, text, after) in zip(messages, turns, strict=True):
        context += before
        if message.role == roles.ASSISTANT or message.train:
            found += [(context, False), (text, message.train is not False)]
            context = after
        else:
            context += text + after
    return [*found, (context, False)] if context else found


def _read(name: str) -> str:
    path = Path(name)
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--chat_template {name}: cannot be read ({error}); use world, g1, chatml, or a Jinja file"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, jinja2.TemplateError | LimitExceeded) else f"{type(error).__name__}: {error}"
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text[:500])


def _json(value: Any) -> str:
    return check_encodable(json.dumps(value, ensure_ascii=False))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """transformers' filter; Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller):
        environment: Any = self.environment
        mark = environment.generation_mark
        return f"{mark}{caller()}{mark}"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message))
