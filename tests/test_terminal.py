"""The chat in a pseudo-terminal, with a fake model, and from a pipe."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from rwkv.generate import Sampling
from rwkv.terminal import Conversation
from tests.waiting import LIMIT

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys, time, torch
from rwkv import terminal
from rwkv.generate import Sampling, Session
from rwkv.terminal import Conversation
terminal._EXIT_SECONDS = float("inf")  # on a slow machine the second Ctrl-C may come late
class ByteTokenizer:
    eod = 0
    def encode(self, text): return [byte + 1 for byte in text.encode()]
    def decode_bytes(self, ids): return bytes(i - 1 for i in ids if i)
class Echo(torch.nn.Module):  # answers with the message in capitals; to "long", without end
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(1, 1)
    def hidden(self, tokens, state):
        return torch.zeros(1, 1, 1), (state or ()) + tuple(tokens[0].tolist())
    def head(self, hidden):
        text = ByteTokenizer().decode_bytes(session.state).decode(errors="replace")
        question, _, answer = text[text.rindex("User: ") + 6 :].partition("\\n\\nAssistant:") if "User: " in text else ("", "", "")
        want = " " + (question.upper() if "long" not in question else "very " * 10**4)
        time.sleep(0.01 if "long" in question else 0)
        logits = torch.zeros(257)
        logits[(ByteTokenizer().encode(want[len(answer)]) if len(answer) < len(want) else [0])[0]] = 9
        return logits
class TracedSession(Session):
    def __init__(self, *a):
        global session
        session = self
        self.state = None
        super().__init__(*a)
exec(sys.argv[2])
print("ready", file=sys.stderr)
Conversation(lambda: TracedSession(Echo(), ByteTokenizer()), Sampling(temperature=0), int(sys.argv[1])).run()
print("ended", file=sys.stderr)
"""


class Terminal:
    """A chat process in a pseudo-terminal: type input and wait for output."""

    def __init__(self, max_tokens: int, before: str):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execve(sys.executable, [sys.executable, "-c", PROGRAM, str(max_tokens), before], environment)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until the text appears: between readline's prompt and its wait for a key,
        CPython handles one only at the next key.
        """
        for _ in range(30):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.wait(text, seconds=10)  # a second one too early would end the chat
                return
        raise AssertionError(f"{text!r} did not appear in {self.shown!r}")

    def wait(self, text: str, seconds: float = LIMIT) -> str:
        """Output since the last wait, up to and including the text."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} did not appear in {self.shown!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.fd, 4096).decode(errors="replace").replace("\r", "")
                except OSError:  # the process has ended
                    assert text in self.shown, f"{text!r} did not appear in {self.shown!r}"
        before, self.shown = self.shown.split(text, 1)
        return before


@pytest.fixture
def terminal():
    started = []

    def start(max_tokens: int = 1000, before: str = "") -> Terminal:
        started.append(Terminal(max_tokens, before))
        started[-1].wait("User: ")
        return started[-1]

    yield start
    for chat in started:
        os.close(chat.fd)
        os.waitpid(chat.pid, 0)


def test_chat_line_editing_history_and_commands(terminal):
    chat = terminal()
    chat.type("hxllo\x1b[D\x1b[D\x1b[D\x7fe\n")  # three to the left, delete, e
    chat.wait("Assistant: HELLO\n")
    chat.wait("User: ")
    chat.type("\x1b[A\n")  # the last line again
    chat.wait("Assistant: HELLO\n")
    chat.wait("User: ")
    chat.type("/retry\n")
    chat.wait("Assistant: HELLO\n")
    chat.wait("User: ")
    for command, expected in (
        ("/help", "/temperature X"),
        ("/temperature 0.0", "[temperature 0]"),
        ("/temperature hot", "[/temperature: expected a number of at least 0, such as 0.8; got hot]"),
        ("/nonsense x", "[unknown command /nonsense: /help lists the commands"),
        ("/reset", "[new conversation]"),
        ("/retry", "[/retry: there is no message yet]"),
    ):
        chat.type(f"{command}\n")
        chat.wait(expected)
        chat.wait("User: ")
    chat.type(" /x\n")
    chat.wait("Assistant: /X\n")
    chat.wait("User: ")
    # bracketed paste: https://invisible-island.net/xterm/ctlseqs/ctlseqs.html
    chat.type("\x1b[200~one\ntwo\x1b[201~\n")
    chat.wait("Assistant: ONE\nTWO\n")
    chat.wait("User: ")
    chat.type("/exit\n")
    chat.wait("ended")


def test_ctrl_c(terminal):
    chat = terminal(10**6)
    chat.type("long\n")
    chat.wait("very very")
    chat.type("next")  # typed ahead: not echoed into the answer
    chat.wait("very very")
    chat.type("\x03")
    assert "next" not in chat.wait("[stopped]")
    chat.wait("User: ")
    chat.type("hello\n")
    chat.wait("HELLO\n")
    chat.wait("User: ")
    chat.type("half a line")
    chat.wait("half a line")
    chat.interrupt("[Ctrl-C again, or /exit, ends the chat]")
    chat.wait("User: ")
    chat.interrupt("ended")


def test_second_ctrl_c_keeps_the_chat(terminal):
    chat = terminal(10**6)
    chat.type("hello\n")
    chat.wait("HELLO\n")
    chat.wait("User: ")
    chat.type("long\n")
    chat.wait("very")
    os.kill(chat.pid, signal.SIGSTOP)  # so that the second signal arrives while the first is handled
    os.kill(chat.pid, signal.SIGINT)
    os.kill(chat.pid, signal.SIGCONT)
    chat.interrupt("[stopped")
    chat.wait("User: ")
    chat.type("again\n")
    chat.wait("AGAIN\n")


# Statements that press Ctrl-C in the chat at a moment that a test cannot hit from outside.
PRESSED = {
    "before the answer": """
real = Conversation.answer
def answer(self, message):
    if message == "hello": signal.raise_signal(signal.SIGINT)
    real(self, message)
Conversation.answer = answer
""",
    "after the answer": """
real = terminal._say
def say(text):
    if "cut off" in text: signal.raise_signal(signal.SIGINT)
    real(text)
terminal._say = say
""",
    "while the terminal is restored": """
real, calls = termios.tcsetattr, []
def tcsetattr(*arguments):
    calls.append(1)
    if len(calls) == 2:  # the second one raises KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    real(*arguments)
termios.tcsetattr = tcsetattr
""",
}


@pytest.mark.parametrize("moment", PRESSED)
def test_ctrl_c_between_prompt_and_answer(terminal, moment):
    """It neither ends the chat nor leaves the terminal without echo."""
    chat = terminal(4, "import signal, termios\n" + PRESSED[moment])
    chat.type("hello\n")
    chat.wait("User: ")
    chat.type("abc\n")
    chat.wait("Assistant: ABC\n")
    chat.wait("User: ")
    chat.type("/exit\n")
    chat.wait("ended")
    assert termios.tcgetattr(chat.fd)[3] & termios.ECHO


def test_truncated_answer_is_marked(terminal):
    chat = terminal(4)
    chat.type("hello\n")
    chat.wait("Assistant: HEL\n[cut off at --max_tokens 4]")


def test_piped_input_prints_answers_only():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "100", ""],
        input=b"hello\n\n/reset\nyou\xff\n/exit\nnot read\n",  # one byte is not UTF-8
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"},
        check=True,
    )
    assert result.stdout.decode() == "Assistant: HELLO\nAssistant: YOU\ufffd\n"


def test_reset_keeps_think():
    conversation = Conversation(object, Sampling(), 5, think="full")
    for command in ((), ("/reset",)):
        assert not command or conversation.execute(*command)
        assert conversation.chat.think == "full"
