"""Interactive chat in a terminal: line editing, history, commands; Ctrl-C stops the answer, not the
chat.
"""

import contextlib
import io
import math
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType

import torch

from rwkv.generate import Chat, Sampling, Session

HELP = """/help               this list
/exit, /quit        end the chat (also Ctrl-D)
/retry              answer the last message again
/reset              start a new conversation
/temperature X      0: always the most likely token; higher: more varied
Ctrl-C stops an answer; pressed twice at the prompt, it ends the chat. Pasted lines are one message.
To send a message that begins with /, put a space before it."""
_EXIT_SECONDS = 5  # within which a second Ctrl-C ends the chat
_PASTE_SECONDS = 0.05  # within which further lines belong to the same paste


def cut_note(max_tokens: int) -> str:
    """The note after an answer that was cut off at --max_tokens."""
    return f"[cut off at --max_tokens {max_tokens}]"


class Conversation:
    """A chat that reads messages from stdin and prints answers to stdout; notes go to stderr."""

    def __init__(
        self,
        begin: Callable[[], Session],
        sampling: Sampling,
        max_tokens: int,
        generator: torch.Generator | None = None,
        think: str = "none",
    ):
        self.begin, self.sampling, self.max_tokens, self.generator = begin, sampling, max_tokens, generator
        self.think = think
        self.chat = Chat(begin(), think)
        # the last message, and the session's state before it
        self.last: tuple[str, tuple] | None = None
        self.interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Run the chat until /exit or the end of stdin."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # see decodable
        if self.interactive:
            _edit_lines()
            _say("Chat. /help lists the commands, Ctrl-C stops an answer, /exit or Ctrl-D ends.")
        while True:
            try:
                while (message := self.read()) is not None and self.handle(message):
                    pass
                return
            except KeyboardInterrupt:  # just before or after an answer
                if not self.interactive:
                    raise
                print(flush=True)

    def handle(self, message: str) -> bool:
        """Answer a message, or execute a command; False if it ends the chat."""
        if message.startswith("/"):
            return self.execute(*message.split(maxsplit=1))
        if message.strip():
            session = self.chat.session
            self.last = message, (session.state, session.logits)
            self.answer(message)
        return True

    def read(self) -> str | None:
        """The next message; None at the end of the chat."""
        if not self.interactive:
            line = sys.stdin.readline()
            return decodable(line.rstrip("\n")) if line else None
        interrupted = -math.inf
        while True:
            try:
                lines = [input("User: ")]
                while select.select([sys.stdin], [], [], _PASTE_SECONDS)[0]:
                    lines.append(input())
                return decodable("\n".join(lines))
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                if time.monotonic() - interrupted < _EXIT_SECONDS:
                    return None
                interrupted = time.monotonic()
                _say("[Ctrl-C again, or /exit, ends the chat]")

    def execute(self, command: str, argument: str = "") -> bool:
        """Execute a command; False if it ends the chat."""
        argument = argument.strip()
        if command in ("/exit", "/quit"):
            return False
        if command == "/help":
            _say(HELP)
        elif command == "/reset":
            self.chat, self.last = Chat(self.begin(), self.think), None
            _say("[new conversation]")
        elif command == "/retry":
            if self.last is None:
                _say("[/retry: there is no message yet]")
            else:
                message, (self.chat.session.state, self.chat.session.logits) = self.last
                self.answer(message)
        elif command == "/temperature":
            self.temperature(argument)
        else:
            _say(
                f"[unknown command {command}: /help lists the commands; to send it as a message, put a space before it]"
            )
        return True

    def temperature(self, text: str) -> None:
        """Set the temperature; without `text`, print it."""
        try:
            value = float(text) if text else self.sampling.temperature
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            _say(f"[/temperature: expected a number of at least 0, such as 0.8; got {text}]")
            return
        self.sampling = replace(self.sampling, temperature=value)
        _say(f"[temperature {value:g}]")

    def answer(self, message: str) -> None:
        """Print the answer as it is generated, until it is complete or Ctrl-C.

        A second Ctrl-C does not wait for the model to read the message, and forgets it.
        """
        session = self.chat.session
        before = session.state, session.logits
        print("Assistant:", end=" ", flush=True)
        try:
            with _echo_disabled(self.interactive) as stopped:
                for text in self.chat.ask(message, self.sampling, self.max_tokens, self.generator, stopped):
                    print(text, end="", flush=True)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            session.state, session.logits = before
            print(flush=True)
            _say("[stopped; this message is forgotten]")
            return
        print(flush=True)
        if stopped():
            _say("[stopped]")
        elif session.ended == "length":
            _say(cut_note(self.max_tokens))


@contextlib.contextmanager
def _echo_disabled(interactive: bool) -> Iterator[Callable[[], bool]]:
    """Disable the terminal's echo while an answer is printed. Yields a function: whether Ctrl-C was
    pressed.
    """
    pressed: list[int] = []
    if not interactive:
        yield lambda: False
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)  # runs the code below, which restores the terminal

    handlers = {signal.SIGINT: stop, signal.SIGTERM: end, signal.SIGHUP: end}
    before = {number: signal.getsignal(number) for number in handlers}
    modes = termios.tcgetattr(sys.stdin)

    def restore() -> None:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, [*modes[:3], modes[3] & ~termios.ECHO, *modes[4:]])
        yield lambda: bool(pressed)
    finally:
        try:
            restore()
        except BaseException:  # Ctrl-C, or another signal, in the middle
            restore()
            raise


def _edit_lines() -> None:
    """Enable line editing, history and bracketed paste, if Python has GNU readline."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # Python disables it


def decodable(typed: str) -> str:
    """A message or argument, with invalid UTF-8 replaced by U+FFFD."""
    return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
