"""The API: answers to the real `openai` client and to raw HTTP."""

import contextlib
import http.client
import json
import re
import socket

import openai
import pytest

from rwkv.config import ConvertConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert.pipeline import convert
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.generate import Chat, Session
from rwkv.sampling import Sampling
from rwkv.serve import app, messages
from rwkv.serve.engine import Engine
from rwkv.serve.protocol import Limits
from tests.serve import models
from tests.waiting import LIMIT, wait_until

GREEDY = Sampling(temperature=0)
HELLO = "Hello, you there in the machine: how are you?"
ASK = [{"role": "user", "content": HELLO}]


@pytest.fixture(scope="module")
def log():
    return []


@pytest.fixture(scope="module")
def url(loaded, log):
    engine = Engine(loaded, WorldTokenizer(), max_batch=8, cache_bytes=1 << 22)
    settings = app.Settings(
        Limits(max_tokens=300, max_prompt=500), max_body=1 << 16, hosts=("127.0.0.1", "localhost"), write=log.append
    )
    with models.serving(engine, settings) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def send(url: str, method: str, path: str, body=None, **headers) -> tuple[int, dict, bytes]:
    """Status, headers and body of a raw request."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=LIMIT)
    with contextlib.closing(connection):
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if data else {}
        connection.request(method, path, data, given | {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def test_models(client, loaded):
    assert [model.id for model in client.models.list()] == ["base", "tuned"]
    assert client.models.retrieve("tuned").id == "tuned"
    with pytest.raises(openai.NotFoundError, match="'none' does not exist"):
        client.models.retrieve("none")


@pytest.mark.parametrize("think", ["none", "full"])
def test_chat_equals_local_chat(client, loaded, think):
    """The same text as `Chat` of the terminal: for both models, whole and streamed."""
    for name in loaded:
        expected = "".join(Chat(Session(loaded[name].model, WorldTokenizer()), think).ask(HELLO, GREEDY, 12))
        options = {"model": name, "messages": ASK, "temperature": 0, "max_tokens": 12, "extra_body": {"think": think}}
        whole = client.chat.completions.create(**options)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason == "length"
        assert (whole.object, whole.model, whole.choices[0].message.role) == ("chat.completion", name, "assistant")
        assert whole.usage.prompt_tokens == sum(len(WorldTokenizer().encode(x)) for x in messages.prompt(ASK, think))
        assert whole.usage.completion_tokens == 12
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
        assert len(chunks) > 6  # token by token
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 12
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens  # read before
        assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_completions_equal_local_session(client, loaded):
    session = Session(loaded["base"].model, WorldTokenizer())
    session.read("Once upon")
    expected = "".join(session.write(GREEDY, 16))
    found = client.completions.create(model="base", prompt="Once upon", temperature=0)  # 16 tokens by default
    assert (found.choices[0].text, found.object) == (expected, "text_completion")
    ids = WorldTokenizer().encode("Once upon")
    several = client.completions.create(model="base", prompt=[ids, ids], temperature=0, max_tokens=16)
    assert [choice.text for choice in several.choices] == [expected] * 2
    assert several.usage.total_tokens == 2 * (len(ids) + 16)
    chunks = client.completions.create(model="base", prompt="Once upon", temperature=0, max_tokens=16, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_seed_choices_and_penalties(client):
    def ask(**options):
        # Few candidates: of half of the vocabulary, one in 200 tokens depends on rounding, and thus
        # on the batch and on what other tests left in the cache.
        options = {"model": "base", "messages": ASK, "max_tokens": 8, "top_p": 0.005, **options}
        return [choice.message.content for choice in client.chat.completions.create(**options).choices]

    three = ask(seed=5, n=3)
    assert three == ask(seed=5, n=3)
    assert len(set(three)) == 3
    assert ask(seed=6) == three[1:2]  # choice j has the seed plus j
    assert ask(seed=5, top_p=0) == ask(temperature=0)
    greedy, repeated = ask(temperature=0), ask(temperature=0, frequency_penalty=-2, presence_penalty=-2)
    assert greedy != repeated


def test_stop(client):
    options = {"model": "base", "prompt": "Once", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[6:8]
    for stopped in ([stop], [chr(1) * 3, stop]):
        found = client.completions.create(**options, stop=stopped)
        assert found.choices[0].text == whole[: whole.index(stop)]
        assert found.choices[0].finish_reason == "stop"
        chunks = list(client.completions.create(**options, stop=stopped, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]


def test_logprobs(client):
    chat = client.chat.completions.create(
        model="base", messages=ASK, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace").strip() == (
        chat.choices[0].message.content
    )
    assert all(len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob for token in content)
    streamed = client.chat.completions.create(
        model="base", messages=ASK, max_tokens=5, temperature=0, logprobs=True, stream=True
    )
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    # rounding: the prompt was read, or its state found in the cache
    assert [token.logprob for part in parts if part for token in part.content] == pytest.approx(
        [token.logprob for token in content], abs=1e-4
    )
    text = client.completions.create(model="base", prompt="A", max_tokens=5, temperature=0, logprobs=3).choices[0]
    assert len(text.logprobs.tokens) == 5
    assert all(len(top) in (2, 3) for top in text.logprobs.top_logprobs)  # bytes that are no text look alike
    assert text.logprobs.text_offset[0] == 0


def test_messages_have_the_converters_tokens(tmp_path, write_jsonl):
    conversation = [
        {"role": "system", "content": "Be brief.\r\n\r\nVery."},
        {"role": "user", "content": "Hi\n\n\nthere "},
        {"role": "assistant", "content": " Hello!\n"},
        {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]},
        {"role": "assistant", "content": "再见"},
    ]
    flat = [*conversation[:3], {"role": "user", "content": "你好"}, conversation[4]]
    data = Dataset(convert(ConvertConfig(input=str(write_jsonl({"messages": flat})), workers=1)).pairs[0][0])
    tokenizer = WorldTokenizer()
    begin = messages.tokens_of(tokenizer, messages.prompt(conversation[:4]), eod=False)
    assert [*begin, *tokenizer.encode(" 再见\n\n"), 0] == data.document(0).tolist()


BAD = [
    ({"model": "none"}, 404, "model", "'none' does not exist; models: base, tuned"),
    ({"model": None}, 404, "model", "model is missing"),
    ({"messages": []}, 400, "messages", "at least one message"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "system, developer, user, assistant"),
    ({"messages": [*ASK, {"role": "assistant", "content": "x"}]}, 400, "messages[1].role", "the assistant's"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]", "only parts"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, 400, "messages[0].tool_calls", "not supp"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
    ({"temprature": 1}, 400, "temprature", "not a parameter"),
    ({"prompt": "x"}, 400, "prompt", "not a parameter"),
    ({"temperature": 2.5}, 400, "temperature", "from 0 to 2; got 2.5"),
    ({"temperature": True}, 400, "temperature", "must be a number"),
    ({"top_p": -1}, 400, "top_p", "from 0 to 1"),
    ({"n": 0}, 400, "n", "from 1 to 16"),
    ({"max_tokens": 301}, 400, "max_tokens", "from 1 to 300"),
    ({"max_completion_tokens": "5"}, 400, "max_completion_tokens", "an integer"),
    ({"stop": list("abcde")}, 400, "stop", "up to 4 strings"),
    ({"stop": ""}, 400, "stop", "none of them empty"),
    ({"seed": 1.5}, 400, "seed", "an integer"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    ({"stream": "yes"}, 400, "stream", "true or false"),
    ({"stream_options": {"x": 1}}, 400, "stream_options", "include_usage"),
    ({"think": "much"}, 400, "think", "none, fast, full"),
    ({"think": ["fast"]}, 400, "think", "none, fast, full"),
    (
        {"messages": [{"role": "user", "content": "a b " * 400}]},
        400,
        "messages",
        "more than this server's limit of 500",
    ),
]


@pytest.mark.parametrize(("change", "status", "param", "message"), BAD, ids=lambda value: str(value)[:30])
def test_invalid_requests_are_explained(url, change, status, param, message):
    found, headers, body = send(
        url, "POST", "/v1/chat/completions", {"model": "base", "messages": ASK, "max_tokens": 2, **change}
    )
    error = json.loads(body)["error"]
    assert (found, error["param"], error["type"]) == (status, param, "invalid_request_error"), error
    assert message in error["message"]
    assert headers["content-type"] == "application/json"


def test_neutral_values_are_accepted(client):
    found = client.chat.completions.create(
        model="base",
        messages=ASK,
        max_tokens=1,
        temperature=0,  # a sampled EOD would not count
        tools=[],
        response_format={"type": "text"},
        user="someone",
        logit_bias={},
        store=False,
        seed=None,
    )
    assert found.usage.completion_tokens == 1
    assert client.completions.create(model="base", prompt="x", echo=False, best_of=1, max_tokens=1).choices
    for options in ({"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"logprobs": 6}, {"prompt": [[]]}):
        with pytest.raises(openai.BadRequestError, match=next(iter(options))):
            client.completions.create(**{"model": "base", "prompt": "x", **options})


def test_http_errors(url):
    """Bodies that are too large or not JSON, other paths and methods, and requests of web pages."""
    chat = "/v1/chat/completions"
    cases = [
        (("POST", chat, b"{"), {}, 400, "not JSON"),
        (("POST", chat, b"[]"), {}, 400, "must be a JSON object"),
        (("POST", chat, b'{"a": NaN}'), {}, 400, "not JSON"),
        (("POST", chat, b" " * 70_000), {}, 413, "limit of 65536 bytes"),
        (("POST", chat, b"{}"), {"Content_Type": "text/plain"}, 415, "Content-Type: application/json"),
        (("GET", chat), {}, 405, "other methods"),
        (("GET", "/v1/none"), {}, 404, "no such endpoint"),
        (("GET", "/v1/models"), {"Host": "evil.example:8000"}, 403, "'evil.example' is not served here"),
    ]
    for arguments, headers, status, message in cases:
        found, sent, body = send(url, *arguments, **headers)
        assert (found, message in json.loads(body)["error"]["message"]) == (status, True), body
        assert "access-control-allow-origin" not in sent
    preflight = send(url, "OPTIONS", chat, Origin="https://example.com", Access_Control_Request_Method="POST")
    assert preflight[0] == 405  # a browser does not send the request


@pytest.mark.parametrize(
    "data",
    [
        b"no request\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nCookie: " + b"a" * 70_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
    ],
    ids=["no request", "two hosts", "large", "length", "chunk"],
)
def test_invalid_http(url, data):
    """Answered as other errors, and the connection is closed."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=LIMIT) as connection, connection.makefile("rb") as file:
        connection.sendall(data)
        head, _, body = file.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"application/json" in head
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("not a valid HTTP request")


def test_internal_error(url, monkeypatch, capfd):
    monkeypatch.setattr(Engine, "submit", lambda *arguments: 1 / 0)
    status, _, body = send(url, "POST", "/v1/completions", {"model": "base", "prompt": "x"})
    monkeypatch.undo()
    assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_health_and_log(url, log):
    status, _, body = send(url, "GET", "/health")
    assert (status, json.loads(body)["status"], json.loads(body)["models"]) == (200, "ok", ["base", "tuned"])
    before = len(log)
    body = {"model": "tuned", "prompt": "Hi\x1b[2J", "max_tokens": 3, "temperature": 0}  # no EOD by chance
    send(url, "POST", "/v1/completions", body)
    send(url, "GET", "/%1b[2J")
    # Lines are written after the answers: those of earlier requests may be among them.
    answered = r"\d\d:\d\d:\d\d POST /v1/completions 200 tuned \d+\+3 tokens \d+\.\d\d s"
    wait_until(lambda: any(re.fullmatch(answered, line) for line in log[before:]))
    wait_until(lambda: any("GET /" in line and " 404" in line for line in log[before:]))
    assert "\x1b" not in "".join(log)
    assert "/health" not in "".join(log)


def test_api_key_and_origins(loaded):
    engine = Engine(loaded, WorldTokenizer())
    settings = app.Settings(api_key="sécret", origins=("https://example.com",), write=lambda line: None)
    with models.serving(engine, settings) as url:
        assert send(url, "GET", "/health", Host="proxy.example")[0] == 200
        for key in (None, "Bearer wrong", "Bearer ", "sécret", "Basic sécret"):
            headers = {"Authorization": key.encode()} if key else {}
            status, sent, body = send(url, "GET", "/v1/models", **headers)
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
            assert sent["www-authenticate"] == "Bearer"
        assert send(url, "GET", "/v1/models", Authorization="Bearer sécret".encode())[0] == 200
        assert [send(url, "GET", path)[0] for path in ("/health", "/")] == [200, 200]
        allowed, other = (
            send(url, "OPTIONS", "/v1/models", Origin=origin, Access_Control_Request_Method="GET")[1].get(
                "access-control-allow-origin"
            )
            for origin in ("https://example.com", "https://other.example")
        )
        assert (allowed, other) == ("https://example.com", None)


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_cancels(loaded, stream):
    engine = Engine(loaded, WorldTokenizer())
    lines = []
    settings = app.Settings(Limits(max_tokens=100_000), write=lines.append)
    with models.serving(engine, settings) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=LIMIT)
        # temperature 0: no EOD by chance
        body = {"model": "base", "prompt": "x", "max_tokens": 100_000, "temperature": 0, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        if stream:
            connection.getresponse().read(100)
        wait_until(lambda: engine.running == 1)
        connection.sock.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: engine.running == 0 and lines)
    assert "cancelled" in lines[0]
