"""Parse preference records, as for DPO: a prompt with a chosen and a rejected answer.

As in TRL's datasets the prompt and the answers are texts or lists of messages. Without a prompt,
both answers are whole conversations, whose common beginning is the prompt.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rwkv.data.convert import messages, plain_chat, roles, schemas
from rwkv.data.convert.jsonl import BadRecord, check_encodable
from rwkv.data.convert.messages import Conversation, Message

KEYS = ("chosen", "rejected")
_EXPECTED = 'a preference pair has "prompt", "chosen" and "rejected", or whole conversations under the last two'


def matches(record: Mapping[str, Any]) -> bool:
    """Whether a record has both answers."""
    fields = schemas.folded(record)
    return all(fields.get(key) is not None for key in KEYS)


def conversations(record: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    """The conversations with the chosen and with the rejected answer. Of both, only messages of the
    assistant after their common beginning contribute to the loss.

    Raises:
        BadRecord: an answer or the prompt is missing or of the wrong type, the prompt contradicts
            the answers, or an answer has no message of the assistant.
    """
    every = schemas.folded(record)
    fields = {key: value for key, value in every.items() if value is not None}
    if missing := next((key for key in KEYS if key not in every), None):
        raise BadRecord(f'no "{missing}" (it has {", ".join(map(repr, list(record)[:5])) or "nothing"}); {_EXPECTED}')
    prompt, used = _prompt(fields)
    answers = [_answer(fields, key, bool(prompt)) for key in KEYS]
    if all(answer and answer[0].role in (roles.USER, roles.SYSTEM) for answer in answers):
        if prompt and not _contains(answers[0][: _shared(*answers)], prompt[-1]):
            raise BadRecord(
                'the "chosen" and "rejected" conversations do not begin with the prompt; remove the prompt, or keep only the answers'
            )
        prompt = []
    elif not prompt:
        raise BadRecord(f"no prompt; {_EXPECTED}")
    whole = [[*map(replace, prompt), *answer] for answer in answers]
    shared = _shared(*whole)
    differ = any(len(turns) > shared for turns in whole)
    for key, turns in zip(KEYS, whole, strict=True):
        if differ and not any(turn.role == roles.ASSISTANT and turn.train is not False for turn in turns[shared:]):
            raise BadRecord(f'"{key}" has no answer of the assistant after the beginning that both have in common')
        if differ and turns[shared].role != roles.ASSISTANT:
            raise BadRecord(
                f"the conversations differ in a message of the {turns[shared].role} before their answers, so they are not answers to the same prompt"
            )
        for turn in turns[:shared]:
            turn.train = False
    chosen, rejected = (
        schemas.completed(Conversation(turns, schemas.PREFERENCE, used={*KEYS, *used}), record, fields)
        for turns in whole
    )
    return chosen, rejected


def _prompt(fields: Mapping[str, Any]) -> tuple[list[Message], set[str]]:
    """The messages of the prompt, empty if there is none, and the fields that it comes from."""
    question, context = schemas.question_keys(fields)
    if question:
        return schemas.question_turns(fields, question, context), {question, context, "history"}
    key = next((key for key in schemas.MESSAGES if key in fields), "")
    return (messages.read(fields[key], key), {key}) if key else ([], set())


def _answer(fields: Mapping[str, Any], key: str, prompted: bool) -> list[Message]:
    """The messages under "chosen" or "rejected": an answer, or a whole conversation."""
    value = fields.get(key)
    if isinstance(value, str):
        value = messages.json_or_text(value)  # a column of csv
    if isinstance(value, dict):  # LLaMA-Factory's: one message
        value = [value]
    if isinstance(value, list):
        return messages.read(value, key)
    text = schemas.string_of(fields, key)
    if not prompted and (turns := plain_chat.turns(text)):  # Anthropic's HH
        return [Message(role, check_encodable(content)) for role, content in turns]
    return [Message(roles.ASSISTANT, text, "assistant")]


def _shared(one: list[Message], other: list[Message]) -> int:
    """The number of messages that two conversations begin with in common."""
    pairs = list(zip(one, other, strict=False))
    return next((i for i, pair in enumerate(pairs) if _compared(pair[0]) != _compared(pair[1])), len(pairs))


def _compared(message: Message) -> tuple[Any, ...]:
    return message.role, roles.fold(message.content), message.reasoning, message.calls


def _contains(turns: list[Message], message: Message) -> bool:
    return any(_compared(turn) == _compared(message) for turn in turns)
