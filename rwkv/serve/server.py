"""The HTTP server: its socket, signals, start and end."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import h11
import orjson
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rwkv.errors import UserError
from rwkv.serve import app, output
from rwkv.serve.access import LOOPBACK
from rwkv.serve.protocol import ApiError
from rwkv.serve.worker import Worker

_CLOSING_SECONDS = 30  # for cancelled requests to be answered: a step of a large model on a CPU takes seconds
# Longer than clients keep idle connections (httpx: 5 s): one that the server closes just as the
# client uses it again loses the request.
_KEEP_ALIVE_SECONDS = 65
_MAX_HEADERS = 1 << 16  # bytes of a request's headers


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0: any free port.

    Raises:
        UserError: the port is in use or not permitted, or there is no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: no such address ({error}); use 127.0.0.1, or 0.0.0.0 for all") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)
    except OSError as error:
        found.close()
        what = {
            errno.EADDRINUSE: "is in use by another program; stop it, or use another --port",
            errno.EACCES: "is not permitted; use a --port from 1024",
            errno.EADDRNOTAVAIL: "is not an address of this machine; use --host 127.0.0.1, or 0.0.0.0 for all",
        }
        raise UserError(f"{host}:{port} {what.get(error.errno or 0, f'cannot be used ({error})')}") from None
    return found


def url(listening: socket.socket) -> str:
    """The URL of a listening socket, on this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_local(listening: socket.socket) -> bool:
    """Whether only programs of this machine can connect."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


class _Http(H11Protocol):
    """uvicorn's HTTP, which answers requests that are not valid HTTP in the form of all errors."""

    def send_400_response(self, msg: str) -> None:
        """Answer, and close the connection."""
        error = ApiError(f"not a valid HTTP request, or headers of more than {_MAX_HEADERS} bytes")
        body = orjson.dumps(error.body)
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        begin = h11.Response(status_code=error.status, headers=headers, reason="Bad Request")
        with contextlib.suppress(h11.LocalProtocolError):  # another answer has begun
            for event in (begin, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, which on the first SIGINT or SIGTERM answers the requests that are running, for at
    most `seconds`; on a second one it ends the process.
    """

    def __init__(self, worker: Worker, settings: app.Settings, seconds: float, started: Callable[[], None]):
        config = uvicorn.Config(
            app.create(worker, settings),
            log_level="critical",
            access_log=False,
            server_header=False,
            lifespan="off",
            loop="asyncio",
            http=_Http,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(seconds + _CLOSING_SECONDS)),
            h11_max_incomplete_event_size=_MAX_HEADERS,
        )
        super().__init__(config)
        self._started, self._worker, self._seconds = started, worker, seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is running, and cancel what has not ended after `seconds`."""
        asyncio.get_running_loop().call_later(self._seconds, self._worker.engine.close)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which afterwards would end the process by the signal."""
        if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        if self.should_exit:
            output.say("ended by a second signal", sys.stderr)
            os._exit(128 + sig)
        self.should_exit = True
        output.say("finishing the requests that are running; press Ctrl-C again to end now", sys.stderr)


def accepted_hosts(listening: socket.socket, host: str, api_key: str) -> tuple[str, ...]:
    """Names that a Host header may have: those of this machine, if only it can connect; empty: any
    name. With an API key too: web pages do not know it, and reverse proxies may keep their name.
    """
    return (*LOOPBACK, host.lower()) if is_local(listening) and not api_key else ()


def run(listening: socket.socket, worker: Worker, settings: app.Settings, seconds: float = 10) -> None:
    """Serve until SIGINT or SIGTERM; then finish or cancel what is running."""
    names = ", ".join(worker.engine.served)

    def started() -> None:
        output.say(f"serving {names} at {url(listening)} (API: {url(listening)}/v1); Ctrl-C ends")

    worker.start()
    try:
        Server(worker, settings, seconds, started).run([listening])
    finally:
        worker.close()
