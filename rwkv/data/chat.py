"""Chat records to text by a Jinja template, with what the assistant says marked: that is what counts in the loss."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from rwkv.data.jsonl import BadRecord, encodable
from rwkv.data.roles import fold
from rwkv.errors import UserError

KEYS = ("messages", "conversations")
FIELDS = (*KEYS, "system")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant"}

# World models answer after "Assistant:", and a blank line ends what anyone says.
WORLD = (
    "{% for message in messages %}"
    '{% if message.role == "assistant" %}Assistant:{% generation %} {{ message.content | fold }}\n\n{% endgeneration %}'
    '{% else %}{{ message.role | capitalize }}: {{ message.content | fold }}{{ "\n\n" }}{% endif %}'
    "{% endfor %}"
)
CHATML = (
    "{% for message in messages %}"
    '<|im_start|>{{ message.role }}{{ "\n" }}'
    '{% if message.role == "assistant" %}{% generation %}{{ message.content | trim }}<|im_end|>{% endgeneration %}'
    '{% else %}{{ message.content | trim }}<|im_end|>{% endif %}{{ "\n" }}'
    "{% endfor %}"
)


class Template:
    """A chat template: `world`, `chatml`, or a Jinja file that gets `messages`, a list of {role, content}.

    As in transformers, `{% generation %} … {% endgeneration %}` stands around what the assistant says, its end included.

    Raises:
        UserError: no such file, not Jinja, or no generation block in it.
    """

    def __init__(self, name: str):
        # A separator that no text can hold by chance; it never reaches the output.
        self._mark = secrets.token_hex(16)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            extensions=[_Generation, "jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True
        )  # as transformers has it
        environment.globals["raise_exception"] = _raise
        environment.filters["fold"] = fold
        environment.extend(generation_mark=self._mark)
        if built_in := {"world": WORLD, "chatml": CHATML}.get(name):
            text = built_in
        else:
            try:
                text = Path(name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--chat_template {name}: cannot be read ({error}); give world, chatml, or a Jinja file") from error
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}, line {error.lineno}: not a Jinja template ({error.message})") from error
        if ("name", "generation") not in ((kind, value) for _, kind, value in environment.lex(text)):
            raise UserError(
                f"{name}: marks nothing as the assistant's; put {{% generation %}} and {{% endgeneration %}} around what counts in the loss"
            )

    def segments(self, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
        """The text of a conversation in pieces, each with whether it counts in the loss. Raises BadRecord where the template refuses it."""
        try:
            text = self._template.render(messages=messages)
        except (jinja2.TemplateError, TypeError) as error:
            raise BadRecord(f"the chat template refuses it ({error})") from error
        parts = text.split(self._mark)
        return [(part, bool(i % 2)) for i, part in enumerate(parts) if part]


def messages_of(record: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """The messages of an OpenAI-style (role, content) or ShareGPT-style (from, value) record; None if it is no chat.

    Raises:
        BadRecord: messages that are no list of such objects, or no text.
    """
    key = next((key for key in KEYS if record.get(key) is not None), None)
    if key is None:
        return None
    if not isinstance(record[key], list) or not record[key]:
        raise BadRecord(f'"{key}" is not a list of messages')
    messages = [_message(message, f'message {number} of "{key}"') for number, message in enumerate(record[key], 1)]
    if isinstance(system := record.get("system"), str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": encodable(system)})
    return messages


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRecord(f"{where} is a {type(message).__name__}, not an object")
    role, content = (next((message[name] for name in names if name in message), None) for names in (("role", "from"), ("content", "value")))
    if not isinstance(role, str):
        raise BadRecord(f'{where} has no "role" (or "from")')
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise BadRecord(f'{where} has no text under "content" (or "value")')
    return {**message, "role": _ROLES.get(role, role), "content": encodable(content)}


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
    raise jinja2.TemplateError(message)
