"""The server as a program: start-up, signals, many clients."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path

import openai
import pytest

from rwkv.config import ServeConfig
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.generate import Chat, Session
from rwkv.sampling import Sampling
from rwkv.serve.app import Settings
from rwkv.serve.engine import Engine
from tests.serve import models
from tests.waiting import LIMIT, wait_until

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("tokens", "seconds"), [(200, LIMIT), (10**8, 1)], ids=["short", "long"])
def test_signal_ends_the_server(start, make_model, tmp_path, number, tokens, seconds):
    """A short request is finished, a long one is cancelled after --shutdown_seconds; status 0."""
    base = models.base(make_model, tmp_path, "7", models.WORLD)
    process = start("serve.py", "--model", base, "--port", 0, "--shutdown_seconds", seconds, "--max_tokens", 10**8)
    output = Path(process._files[1].name)
    wait_until(lambda: "Ctrl-C ends" in output.read_text(), process)
    url = re.search(r"serving base at (http://127\.0\.0\.1:\d+) ", output.read_text())[1]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        options = {"model": "base", "prompt": "x", "stream": True, "temperature": 0}
        answer = iter(client.completions.create(**options, max_tokens=tokens))
        next(answer)
        process.send_signal(number)
        if seconds == LIMIT:
            assert list(answer)[-1].choices[0].finish_reason == "length"
        else:
            with pytest.raises(openai.APIError, match="shutting down"):
                list(answer)
    result = process.result()
    assert (result.returncode, result.stderr) == (
        0,
        "finishing the requests that are running; press Ctrl-C again to end now\n",
    )


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_output_that_cannot_be_written(loaded, monkeypatch, output):
    """The log and tracebacks are lost, but neither requests nor connections are."""
    reader, writer = os.pipe()
    os.close(reader)
    if output == "full disk":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    engine = Engine(loaded, WorldTokenizer())
    body = json.dumps({"model": "base", "prompt": "x", "max_tokens": 2, "temperature": 0, "stream": True})
    answers = []
    with contextlib.suppress(OSError), open(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        with models.serving(engine, Settings()) as url:
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=LIMIT)
            connection.connect()
            first = connection.sock
            for fails in (False, True, False):
                with monkeypatch.context() as failing:
                    if fails:
                        failing.setattr(engine, "_run", lambda *arguments: 1 / 0)
                    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                    answers.append(connection.getresponse().read().decode())
            assert connection.sock is first  # one connection for all
            connection.close()
    for answer, end in zip(answers, ("[DONE]", "the output of the server has the details", "[DONE]"), strict=True):
        assert end in answer


def test_startup_errors(make_base, tmp_path, root):
    base = str(make_base())  # of another vocabulary
    main = runpy.run_path(str(root / "scripts/serve.py"))["main"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ({"port": 0}, "not the World vocabulary of 65536; use a World model"),
            ({"port": port}, f"127.0.0.1:{port} is in use by another program; stop it, or use another --port"),
            ({"host": "192.0.2.1"}, "is not an address of this machine"),  # reserved for documentation
            ({"port": 70000}, "from 0 to 65535"),
            ({"max_batch": 0}, "--max_batch 0: it must be at least 1"),
            ({"lora": f"base={base}"}, "two models are named base"),
            ({"port": 0, "lora": str(tmp_path / "none.pth")}, "none.pth: no such checkpoint"),
        ]
        for flags, message in cases:
            with pytest.raises(UserError, match=re.escape(message)):
                main(ServeConfig(model=base, accelerator="cpu", **flags))


def test_load(loaded):
    """64 clients, of whom each asks twice: every request is answered, or rejected with status
    429 and the time to wait; the answers are those of an idle server.
    """
    engine = Engine(loaded, WorldTokenizer(), max_batch=16, max_queue=24, cache_bytes=1 << 20)
    rejected, step = threading.Event(), engine.step
    engine.step = lambda: rejected.wait(LIMIT) and step()  # so that the queue fills, however fast the engine is
    with models.serving(engine) as url:
        rejections = []

        async def client(all_clients: openai.AsyncOpenAI, number: int) -> list:
            answers = []
            for turn in range(2):
                options = {
                    "model": ("base", "tuned")[number % 2],
                    "messages": [{"role": "user", "content": f"Question {number % 4}"}],
                    "max_tokens": 6 + turn,
                    "temperature": 0,
                }
                try:
                    if number % 3:
                        found = await all_clients.chat.completions.create(**options)
                        answers.append((turn, found.choices[0].message.content))
                    else:
                        chunks = await all_clients.chat.completions.create(**options, stream=True)
                        answers.append((turn, "".join([c.choices[0].delta.content or "" async for c in chunks])))
                except openai.RateLimitError as error:
                    rejected.set()
                    rejections.append((error.code, int(error.response.headers["retry-after"])))
                    answers.append(None)
            return answers

        async def everyone():
            # each coroutine has its own connection while it waits
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as own:
                return await asyncio.gather(*(client(own, number) for number in range(64)))

        found = asyncio.run(everyone())
        wait_until(engine.idle)  # the last answer is sent before its sequence leaves the batch
    answers: dict = {}
    for number, turns in enumerate(found):
        assert len(turns) == 2
        for turn, text in filter(None, turns):
            answers.setdefault((number % 2, number % 4, turn), set()).add(text)
    assert all(len(texts) == 1 for texts in answers.values())
    assert 0 < len(rejections) <= 2 * 64 - 40  # at least those that found a place at first were answered
    assert {code for code, _ in rejections} == {"queue_full"}
    assert all(1 <= seconds <= 60 for _, seconds in rejections)
    expected = Chat(Session(loaded["base"].model, WorldTokenizer())).ask("Question 0", GREEDY, 6)
    assert answers[0, 0, 0] == {"".join(expected)}
