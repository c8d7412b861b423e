"""Batched generation for a file of prompts: answers in the order of the prompts."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv.data.convert.jsonl import BadRecord, check_encodable, parse
from rwkv.data.progress_bar import progress_bar
from rwkv.errors import UserError
from rwkv.files import open_regular
from rwkv.sampling import Sampling
from rwkv.serve import messages
from rwkv.serve.engine import Engine
from rwkv.serve.requests import Event, Request
from rwkv.text_stream import STOP, Answer

_KINDS = ("prompt", "ask", "messages")
_ADDED = ("answer", "finish_reason", "base_answer", "base_finish_reason")


@dataclass(frozen=True)
class Prompt:
    """A record of the file: its tokens, whether it is a chat, and texts that end the answer."""

    record: dict[str, Any]
    tokens: list[int]
    chat: bool
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Answered:
    """A generated answer. reason: "stop", or "length" if it was cut off."""

    text: str
    reason: str


def read(path: str | Path, engine: Engine, model: str, think: str = "none") -> list[Prompt]:
    """Read and check all records of a .jsonl file: objects with a text under "prompt" (to be
    continued) or "ask" (a question), or "messages", also with "tools". Other keys are kept for the
    output.

    Raises:
        UserError: a line is invalid; the message has its number.
    """
    found = []
    with open_regular(path, "file of prompts") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                found.append(_parsed(parse(line.strip()), engine, model, think))
            except messages.BadMessages as error:
                raise UserError(f"{path}, line {number}: {error.where}: {error}") from None
            except BadRecord as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    if not found:
        raise UserError(f'{path}: no prompts; write one object per line, such as {{"ask": "What is RWKV?"}}')
    return found


def _parsed(record: Any, engine: Engine, model: str, think: str) -> Prompt:
    kinds = [key for key in _KINDS if isinstance(record, dict) and key in record]
    if len(kinds) != 1:
        raise BadRecord(
            f"expected an object with one of the keys {', '.join(_KINDS)}; it has {', '.join(kinds) or 'none'}"
        )
    if taken := [key for key in _ADDED if key in record]:
        raise BadRecord(f'it has "{taken[0]}", which the output adds; rename or remove it')
    kind, value = kinds[0], record[kinds[0]]
    if kind != "messages" and not isinstance(value, str):
        raise BadRecord(f'"{kind}" is of type {type(value).__name__}, not a string')
    check_encodable(json.dumps(record, ensure_ascii=False))
    chat = [{"role": "user", "content": value}] if kind == "ask" else value
    stop: tuple[str, ...] = () if kind == "prompt" else STOP
    if kind == "messages" and messages.has_tools(chat, record.get("tools")):
        parts, stop = messages.prompt_with_tools(chat, record.get("tools"), think), messages.TOOL_STOP
    else:
        parts = [value] if kind == "prompt" else messages.prompt(chat, think)
    eod = not engine.served[model].begins_tuned
    return Prompt(record, messages.tokens_of(engine.tokenizer, parts, eod), kind != "prompt", stop)


def answer(
    prompts: list[Prompt],
    engine: Engine,
    model: str,
    sampling: Sampling,
    max_tokens: int,
    seed: int = -1,
    think: str = "none",
) -> list[Answered]:
    """Generate the answers to all prompts, in their order.

    Args:
        seed: that of the first prompt; the others count up from it, so that an answer does not
            depend on the batch. -1: new seeds.

    Raises:
        UserError: generation failed.
    """
    texts = [Answer(think) if prompt.chat else None for prompt in prompts]
    written = [text.begin() if text else "" for text in texts]
    reasons, errors = [""] * len(prompts), list[str]()

    def emit(index: int, event: Event) -> None:
        text = texts[index]
        written[index] += text.add(event.text) if text else event.text
        if event.error:
            errors.append(f"prompt {index + 1}: {event.error}. Nothing was written")
        if event.finish:
            reasons[index] = event.finish
            bar.update(1)

    waiting = [
        Request(
            model=model,
            prompt=prompt.tokens,
            sampling=sampling,
            max_tokens=max_tokens,
            emit=functools.partial(emit, index),
            stop=prompt.stop,
            seed=None if seed < 0 else (seed + index) % (1 << 63),
        )
        for index, prompt in enumerate(prompts)
    ]
    waiting.reverse()
    with progress_bar(len(prompts), "answering", " answers") as bar:
        while not all(reasons):
            while waiting and engine.running + engine.waiting < engine.max_batch:
                engine.submit([waiting.pop()])
            engine.step()
            if errors:
                raise UserError(errors[0])
    return [Answered(text, reason) for text, reason in zip(written, reasons, strict=True)]


def write(path: Path, prompts: list[Prompt], answers: list[Answered], base: list[Answered] | None = None) -> None:
    """Write the record of each prompt with its "answer" and "finish_reason"; with answers of the
    base model also "base_answer" and "base_finish_reason".
    """
    with open(path, "w", encoding="utf-8") as file:
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            record = {**prompt.record, "answer": answer.text, "finish_reason": answer.reason}
            if base:
                record |= {"base_answer": base[index].text, "base_finish_reason": base[index].reason}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
