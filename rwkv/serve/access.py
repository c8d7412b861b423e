"""Who may send a request, and what is logged about it: ASGI middleware."""

import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from rwkv.errors import printable
from rwkv.serve.protocol import ApiError

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


class Access:
    """Checks the Host header and the API key of each request, before its body is read.

    Args:
        api_key: required as `Authorization: Bearer KEY` below /v1; "": none.
        hosts: accepted names in the Host header; empty: any. A web page whose name is made to
            resolve to this machine (DNS rebinding) sends its own name.
        answer: ASGI app that answers an ApiError.
    """

    def __init__(self, app: App, api_key: str, hosts: Sequence[str], answer: Callable[[ApiError], App]):
        self._app, self._key, self._hosts, self._answer = app, api_key.encode(), tuple(hosts), answer

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))  # the first of each name
        error = self._rejection(scope["path"], headers)
        await (self._answer(error) if error else self._app)(scope, receive, send)

    def _rejection(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts and name not in self._hosts:
            return ApiError(
                f"the host {name[:100]!r} is not served here; use the address that the server printed, or set an API key",
                status=403,
            )
        if not self._key or not path.startswith("/v1"):
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return None
        return ApiError(
            "a valid API key is needed: Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class Log:
    """Prints a line for each request when it ends: time, method, path, status, seconds, and the
    note that the endpoint left in `scope["state"]["note"]`.
    """

    def __init__(self, app: App, write: Callable[[str], None]):
        self._app, self._write = app, write

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        scope.setdefault("state", {})

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            if scope["path"] != "/health":
                what = f"{scope['method']} {scope['path'][:100]} {status or 'no answer'}"
                note = scope["state"].get("note", "")
                seconds = time.monotonic() - begun
                self._write(printable(f"{time.strftime('%H:%M:%S')} {what} {note}{' ' if note else ''}{seconds:.2f} s"))
