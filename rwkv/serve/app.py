"""The HTTP API: routes, reading of bodies, whole and streamed answers. Errors are OpenAI's error
objects.
"""

import asyncio
import base64
import contextlib
import functools
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from rwkv.serve import output, protocol, requests
from rwkv.serve.access import Access, Log
from rwkv.serve.engine import Engine
from rwkv.serve.protocol import ApiError, Call, Limits
from rwkv.serve.requests import Event, Token
from rwkv.serve.worker import Worker
from rwkv.text_stream import Answer

_PAGE = Path(__file__).with_name("chat.html")
_BODY_SECONDS = 60  # in which a body must have arrived


@dataclass(frozen=True)
class Settings:
    """Settings of the HTTP server.

    Attributes:
        limits: limits and defaults of requests.
        max_body: bytes of a request's body.
        api_key: as rwkv.serve.access.Access; also `hosts`.
        origins: origins of other web pages that may send requests (CORS).
        write: prints a line of the access log.
    """

    limits: Limits = field(default_factory=Limits)
    max_body: int = 1 << 20
    api_key: str = ""
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    write: Callable[[str], None] = output.say


def create(worker: Worker, settings: Settings) -> Starlette:
    """The ASGI application. The worker must be running."""
    api = _Api(worker, settings)
    middleware = [
        Middleware(Log, settings.write),
        *([Middleware(CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"],
                      allow_headers=["Authorization", "Content-Type"])] if settings.origins else []),
        Middleware(Access, settings.api_key, settings.hosts, _error_response),
    ]  # fmt: skip
    return Starlette(
        routes=[
            Route("/", api.page),
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/models/{name}", api.model),
            Route("/v1/chat/completions", functools.partial(api.generate, "chat"), methods=["POST"]),
            Route("/v1/completions", functools.partial(api.generate, "text"), methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={
            ApiError: lambda request, error: _error_response(error),
            HTTPException: _http_error,
            Exception: _internal_error,
        },
    )


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


def _error_response(error: ApiError) -> Response:
    return _json(error.body, error.status, error.headers)


def _internal_error(request: Request, error: Exception) -> Response:
    output.say_traceback(error)
    message = "internal error; the output of the server has the details"
    return _error_response(ApiError(message, status=500, kind="server_error"))


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path[:100]}"
    what = {404: f"{path}: no such endpoint", 405: f"{path}: this endpoint has other methods"}
    found = ApiError(
        what.get(error.status_code, error.detail), status=error.status_code, headers=dict(error.headers or {})
    )
    return _error_response(found)


class _Api:
    def __init__(self, worker: Worker, settings: Settings):
        self.worker, self.engine, self.settings = worker, worker.engine, settings
        self._page = _PAGE.read_bytes()
        self._policy = _content_policy(self._page.decode())

    async def page(self, request: Request) -> Response:
        """The chat page."""
        headers = {"Content-Security-Policy": self._policy, "Cache-Control": "no-cache"}
        return Response(self._page, media_type="text/html; charset=utf-8", headers=headers)

    async def health(self, request: Request) -> Response:
        """Whether requests are processed, and how many there are."""
        alive = self.worker.alive
        return _json(
            {
                "status": "ok" if alive else "stopped",
                "running": self.engine.running,
                "waiting": self.engine.waiting,
                "models": list(self.engine.served),
            },
            200 if alive else 503,
        )

    async def models(self, request: Request) -> Response:
        """All models."""
        return _json({"object": "list", "data": [self._model(name) for name in self.engine.served]})

    async def model(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["name"]
        if name not in self.engine.served:
            raise ApiError(f"the model {name[:100]!r} does not exist", "model", status=404, code="model_not_found")
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "local"}

    async def generate(self, kind: str, request: Request) -> Response:
        """An answer (see protocol.parse), whole or as a stream."""
        body = await _body(request, self.settings.max_body)
        # tokenising a long prompt takes time, in which other requests are answered
        call = await asyncio.to_thread(
            protocol.parse, kind, body, self.engine.served, self.engine.tokenizer, self.settings.limits
        )
        run = _Run(call, self.engine, request.scope["state"], self._retry_after())
        if call.stream:
            return _Stream(run)
        disconnected = asyncio.ensure_future(_disconnected(request))
        answer = asyncio.ensure_future(run.whole())
        try:
            await asyncio.wait({disconnected, answer}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=499)  # the client has disconnected
            return _json(answer.result())
        finally:
            for task in (disconnected, answer):
                task.cancel()
            run.cancel()

    def _retry_after(self) -> int:
        """Seconds after which a place in a full queue is likely to be free."""
        engine = self.engine
        return max(1, min(60, round(engine.mean_seconds * (engine.waiting + 1) / engine.max_batch)))


class _Stream(StreamingResponse):
    def __init__(self, run: "_Run"):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(run.stream(), headers=headers, media_type="text/event-stream")
        self._run = run

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # the client may have disconnected
            self._run.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, limit: int) -> Any:
    """The JSON value of a body.

    Raises:
        ApiError: another content type, too large, too slow, or not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # web pages of other origins cannot send this without CORS
        raise ApiError("the body must be JSON: Content-Type: application/json", status=415)
    too_large = ApiError(f"the body is larger than this server's limit of {limit} bytes", status=413)
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    data = bytearray()

    async def read() -> None:
        async for part in request.stream():
            data.extend(part)
            if len(data) > limit:
                raise too_large

    try:
        await asyncio.wait_for(read(), _BODY_SECONDS)
        return orjson.loads(data)
    except asyncio.TimeoutError:
        raise ApiError(f"the body did not arrive within {_BODY_SECONDS} s", status=408) from None
    except ClientDisconnect:
        raise ApiError("the client disconnected", status=400) from None
    except orjson.JSONDecodeError as error:
        raise ApiError(f"the body is not JSON: {error}") from None


class _Run:
    """The sequences of one call, and their events.

    Raises:
        ApiError: the queue is full, or the server is shutting down.
    """

    def __init__(self, call: Call, engine: Engine, state: dict[str, Any], retry_after: int):
        self.call, self.engine, self._state = call, engine, state
        limit = engine.max_batch + engine.max_queue
        if len(call.prompts) * call.n > limit:
            raise ApiError(f"this server generates at most {limit} choices at a time", "n")
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

        def emit(index: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self.requests = [
            requests.Request(
                model=call.model,
                prompt=prompt,
                sampling=call.sampling,
                max_tokens=call.max_tokens,
                emit=functools.partial(emit, i * call.n + j),
                stop=call.stop,
                seed=None if call.seed is None else (call.seed + j) % (1 << 63),
                logprobs=call.logprobs,
            )
            for i, prompt in enumerate(call.prompts)
            for j in range(call.n)
        ]
        self._open = set(range(len(self.requests)))
        self._answers = [Answer(call.think) if call.kind == "chat" else None for _ in self.requests]
        try:
            engine.submit(self.requests)
        except requests.Full:
            raise ApiError(
                f"the queue is full; try again in {retry_after} s",
                status=429,
                code="queue_full",
                kind="rate_limit_error",
                headers={"Retry-After": str(retry_after)},
            ) from None
        except requests.Closed:
            raise _shutting_down() from None
        self._note()

    def cancel(self) -> None:
        """End the sequences that have not ended."""
        for index in self._open:
            self.engine.cancel(self.requests[index])
        self._note()

    def _note(self) -> None:
        generated = sum(request.generated for request in self.requests)
        cut = ", cancelled" if self._open else ""
        self._state["note"] = f"{self.call.model} {self.call.prompt_tokens}+{generated} tokens{cut}"

    async def events(self) -> AsyncIterator[tuple[int, str, tuple[Token, ...], str]]:
        """(index of the choice, text, tokens, finish) as they are generated.

        Raises:
            ApiError: generation failed.
        """
        while self._open:
            index, event = await self._events.get()
            if event.finish:
                self._open.discard(index)
            if event.finish == "error":
                raise ApiError(event.error, status=500, kind="server_error")
            if event.finish == "cancelled":
                raise _shutting_down()
            answer = self._answers[index]
            yield index, answer.add(event.text) if answer else event.text, event.tokens, event.finish

    def usage(self) -> dict[str, Any]:
        """The usage object."""
        prompts = self.requests[:: self.call.n]  # a prompt counts once
        cached = sum(max(0, request.cached - self.call.uncounted) for request in prompts)
        return protocol.usage(self.call, cached, sum(request.generated for request in self.requests))

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        texts = [answer.begin() if answer else "" for answer in self._answers]
        tokens: list[list[Token]] = [[] for _ in self.requests]
        reasons = [""] * len(self.requests)
        async for index, text, found, finish in self.events():
            texts[index] += text
            tokens[index] += found
            reasons[index] = finish
        tokenizer = self.engine.tokenizer
        choices = [
            protocol.choice(self.call, i, text, tokens[i], reasons[i], tokenizer) for i, text in enumerate(texts)
        ]
        return protocol.response(self.call, choices, usage=self.usage())

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        call, tokenizer = self.call, self.engine.tokenizer
        more = {"usage": None} if call.include_usage else {}

        def event(index: int, text: str, tokens: Sequence[Token], finish: str, first: bool = False) -> bytes:
            choice = protocol.chunk_choice(call, index, text, tokens, finish, first, tokenizer)
            return _event(protocol.response(call, [choice], chunk=True, **more))

        try:
            for index, answer in enumerate(self._answers):
                if answer:
                    yield event(index, answer.begin(), (), "", first=True)
            async for index, text, tokens, finish in self.events():
                if text or finish or tokens:
                    yield event(index, text, tokens, finish)
            if call.include_usage:
                yield _event(protocol.response(call, [], chunk=True, usage=self.usage()))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)


def _shutting_down() -> ApiError:
    return ApiError("the server is shutting down", status=503, kind="server_error")


def _event(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _content_policy(page: str) -> str:
    """A content security policy that allows only the page's own script and style, and requests to
    this server.
    """
    allowed = {}
    for tag in ("script", "style"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside]
        allowed[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
