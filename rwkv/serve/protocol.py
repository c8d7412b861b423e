"""OpenAI's request and response objects: validation of a request, and the JSON of its answer."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv.data.tokenizer import LARGEST_ID, WorldTokenizer
from rwkv.sampling import Sampling
from rwkv.serve import messages
from rwkv.serve.requests import Token
from rwkv.serve.served import Served
from rwkv.text_stream import OPENING, STOP

MAX_CHOICES, MAX_PROMPTS, MAX_STOPS = 16, 64, 4
_MAX_TOP = {"chat": 20, "text": 5}  # most likely tokens, as in OpenAI's API
_COMPLETION_TOKENS = 16  # max_tokens of /v1/completions, if omitted


class ApiError(Exception):
    """An error to answer with: HTTP status, and OpenAI's error object."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Limits:
    """Limits and defaults of requests."""

    max_tokens: int = 1024
    max_prompt: int = 16384
    temperature: float = 1.0
    top_p: float = 0.85
    penalty_decay: float = 0.996
    think: str = "none"


@dataclass(frozen=True)
class Call:
    """A validated request.

    Attributes:
        kind: "chat" or "text".
        prompts: token ids of each prompt.
        uncounted: tokens at the beginning of each prompt that do not count in usage: EOD.
        n: choices for each prompt.
        logprobs: number of most likely tokens to report; None: no log-probabilities.
    """

    kind: str
    model: str
    prompts: list[list[int]]
    uncounted: int
    n: int
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]
    seed: int | None
    logprobs: int | None
    stream: bool
    include_usage: bool
    think: str = "none"
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts that count in usage."""
        return sum(len(prompt) - self.uncounted for prompt in self.prompts)


# Parameters without effect at these values; others are answered with an error that names them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
_IGNORED = ("user", "safety_identifier", "prompt_cache_key")  # name the end user
_COMMON = (
    "model", "stream", "stream_options", "temperature", "top_p", "presence_penalty", "frequency_penalty",
    "penalty_decay", "max_tokens", "stop", "seed", "logprobs", "n",
)  # fmt: skip
_OWN = {"chat": ("messages", "max_completion_tokens", "top_logprobs", "think"), "text": ("prompt",)}


def parse(kind: str, body: Any, served: dict[str, Served], tokenizer: WorldTokenizer, limits: Limits) -> Call:
    """Validate the body of a request to /v1/chat/completions ("chat") or /v1/completions ("text").

    Raises:
        ApiError: it is invalid, too long, or has a parameter that is not supported; names it.
    """
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    body = {key: value for key, value in body.items() if value is not None}  # null: as if omitted
    for name, value in body.items():
        if name in (*_COMMON, *_OWN[kind], *_IGNORED) or any(
            value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL.get(name, ())
        ):
            continue
        known = "is not supported by this server" if name in _NEUTRAL else "is not a parameter of this server"
        raise ApiError(f"{name[:100]} {known}; omit it", name[:100], code="unsupported_parameter")
    model = body.get("model")
    if not isinstance(model, str) or model not in served:
        named = f"the model {model[:100]!r} does not exist" if isinstance(model, str) else "model is missing"
        raise ApiError(f"{named}; models: {', '.join(served)}", "model", status=404, code="model_not_found")
    think = body.get("think", limits.think) if kind == "chat" else "none"
    if not isinstance(think, str) or think not in OPENING:
        raise ApiError(f"think must be one of {', '.join(OPENING)}", "think")
    eod = not served[model].begins_tuned
    prompts = _prompts(kind, body, think, tokenizer, eod)
    longest = max(map(len, prompts))
    if longest > limits.max_prompt:
        raise ApiError(
            f"the prompt has {longest} tokens, more than this server's limit of {limits.max_prompt}",
            _OWN[kind][0],
            code="context_length_exceeded",
        )
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise ApiError("stream_options can only have include_usage", "stream_options")
    return Call(
        kind,
        model,
        prompts,
        int(eod),
        n=_integer(body, "n", 1, 1, MAX_CHOICES),
        sampling=Sampling(
            _number(body, "temperature", limits.temperature, 0, 2),
            _top_p(body, limits.top_p),
            _number(body, "presence_penalty", 0, -2, 2),
            _number(body, "frequency_penalty", 0, -2, 2),
            _number(body, "penalty_decay", limits.penalty_decay, 0, 1),
        ),
        max_tokens=_max_tokens(kind, body, limits),
        stop=_stop(body) + (STOP if kind == "chat" else ()),
        seed=_integer(body, "seed", None, -(1 << 63), (1 << 63) - 1),
        logprobs=_logprobs(kind, body),
        stream=_boolean(body, "stream"),
        include_usage=_boolean(options, "include_usage"),
        think=think,
        id=f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
    )


def _prompts(kind: str, body: dict[str, Any], think: str, tokenizer: WorldTokenizer, eod: bool) -> list[list[int]]:
    """Token ids of the prompts."""
    name = _OWN[kind][0]
    if name not in body:
        raise ApiError(f"{name} is missing", name)
    try:
        texts = [messages.prompt(body[name], think)] if kind == "chat" else _texts(body[name])
    except messages.BadMessages as error:
        raise ApiError(f"{error.where}: {error}", error.where) from None
    found = []
    for text in texts:
        if isinstance(text, str):
            text = [text]
        own = all(isinstance(part, str) for part in text)
        found.append(messages.tokens_of(tokenizer, text, eod) if own else [*([tokenizer.eod] if eod else []), *text])
    return found


def _texts(value: Any) -> list[Any]:
    """The prompts of /v1/completions: strings or lists of token ids."""
    if isinstance(value, str) or _is_tokens(value):
        return [value]
    if isinstance(value, list) and 0 < len(value) <= MAX_PROMPTS:
        if all(isinstance(item, str) for item in value) or all(map(_is_tokens, value)):
            return value
        raise ApiError(f"prompt must be strings, or lists of token ids from 0 to {LARGEST_ID}", "prompt")
    raise ApiError(f"prompt must be a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these", "prompt")


def _is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item <= LARGEST_ID for item in value)
    )


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ApiError(f"{name} must be a number", name)
    if not low <= value <= high:
        raise ApiError(f"{name} must be from {low} to {high}; got {value}", name)
    return float(value)


def _top_p(body: dict[str, Any], default: float) -> float:
    top_p = _number(body, "top_p", default, 0, 1)
    return max(top_p, 1e-9)  # 0: only the most likely token


def _integer(body: dict[str, Any], name: str, default: Any, low: int, high: int) -> Any:
    value = body.get(name, default)
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise ApiError(f"{name} must be an integer from {low} to {high}", name)
    return value


def _boolean(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(f"{name} must be true or false", name)
    return value


def _max_tokens(kind: str, body: dict[str, Any], limits: Limits) -> int:
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    default = limits.max_tokens if kind == "chat" else min(_COMPLETION_TOKENS, limits.max_tokens)
    return _integer(body, name, default, 1, limits.max_tokens)


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(text, str) and text for text in stop):
        raise ApiError(f"stop must be a string, or a list of up to {MAX_STOPS} strings, none of them empty", "stop")
    return tuple(stop)


def _logprobs(kind: str, body: dict[str, Any]) -> int | None:
    if kind == "text":
        return _integer(body, "logprobs", None, 0, _MAX_TOP[kind])
    wanted = _boolean(body, "logprobs")
    if "top_logprobs" in body and not wanted:
        raise ApiError("top_logprobs needs logprobs: true", "top_logprobs")
    return _integer(body, "top_logprobs", 0, 0, _MAX_TOP[kind]) if wanted else None


def usage(call: Call, cached: int, generated: int) -> dict[str, Any]:
    """The usage object."""
    return {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": call.prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": min(cached, call.prompt_tokens)},
    }


def choice(call: Call, index: int, text: str, tokens: Sequence[Token], finish: str, tokenizer: WorldTokenizer) -> Any:
    """A choice of a whole answer."""
    logprobs = None if call.logprobs is None else _logprobs_object(call, tokens, tokenizer)
    content = {"message": {"role": "assistant", "content": text, "refusal": None}} if call.kind == "chat" else {}
    return {
        "index": index,
        **(content or {"text": text}),
        "logprobs": logprobs,
        "finish_reason": finish or None,
    }


def chunk_choice(
    call: Call, index: int, text: str, tokens: Sequence[Token], finish: str, first: bool, tokenizer: WorldTokenizer
) -> Any:
    """A choice of one event of a stream."""
    if call.kind == "text":
        return choice(call, index, text, tokens, finish, tokenizer)
    delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
    logprobs = _logprobs_object(call, tokens, tokenizer) if call.logprobs is not None and tokens else None
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish or None}


def response(call: Call, choices: list[Any], chunk: bool = False, **more: Any) -> dict[str, Any]:
    """The object of an answer, or of one event of a stream."""
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if call.kind == "chat" else "text_completion"
    return {"id": call.id, "object": kind, "created": call.created, "model": call.model, "choices": choices, **more}


def _logprobs_object(call: Call, tokens: Sequence[Token], tokenizer: WorldTokenizer) -> dict[str, Any]:
    if call.kind == "chat":
        return {"content": [_chat_token(token, tokenizer) for token in tokens], "refusal": None}
    return {
        "tokens": [_shown(token.bytes) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{_shown(tokenizer.decode_bytes([id])): value for id, value in token.top} for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _chat_token(token: Token, tokenizer: WorldTokenizer) -> dict[str, Any]:
    top = [_token_object(tokenizer.decode_bytes([id]), value) for id, value in token.top]
    return {**_token_object(token.bytes, token.logprob), "top_logprobs": top}


def _token_object(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _shown(data), "logprob": logprob, "bytes": list(data)}


def _shown(data: bytes) -> str:
    return data.decode("utf-8", "replace")
