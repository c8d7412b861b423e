"""The chat page in a headless Chromium: two models side by side, in English and Chinese."""

import os
from pathlib import Path
from urllib.parse import urlencode

import pytest

from rwkv.data.tokenizer import WorldTokenizer
from rwkv.generate import Chat, Session
from rwkv.sampling import Sampling
from rwkv.serve import app, served
from rwkv.serve.engine import Engine
from tests.serve import browser, models
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not browser.CHROMIUM, reason="Chromium is not installed")
ATTACK = "<img src=x onerror='document.title=1'>\n</textarea>"


@pytest.fixture(scope="module")
def loaded(make_model):
    return {
        name: served.Served(name, make_model(seed, version="7", **models.WORLD).eval())
        for seed, name in enumerate(("base", "tuned"))
    }


@pytest.fixture
def page(tmp_path):
    opened = []

    def open_page(url: str, language: str = "en-US", width: int = 1000) -> browser.Browser:
        opened.append(browser.Browser(tmp_path / f"profile{len(opened)}", language, width, 700))
        opened[-1].open(url)
        return opened[-1]

    yield open_page
    for one in opened:
        if folder := os.environ.get("RWKV_SCREENSHOTS"):  # to look at
            one.screenshot(Path(folder) / f"page{opened.index(one)}-{os.getpid()}.png")
        one.close()


def column(number: int, what: str) -> str:
    return f"[...document.querySelectorAll('section')[{number}].querySelectorAll('{what}')].map(x => x.textContent)"


def test_answers_side_by_side(page, loaded):
    """Both models answer, with the text that they generate; nothing that is typed or generated is
    markup; the next message continues both conversations.
    """
    with models.serving(Engine(loaded, WorldTokenizer(), cache_bytes=1 << 22)) as url:
        shown = page(f"{url}/?{urlencode({'ask': ATTACK, 'temperature': 0, 'max_tokens': 12})}")
        shown.wait_for("document.body.dataset.answered == 1")
        chats = [Chat(Session(one.model, WorldTokenizer())) for one in loaded.values()]
        expected = [["".join(chat.ask(ATTACK, Sampling(0), 12))] for chat in chats]
        assert expected[0] != expected[1]
        assert [shown.evaluate(column(i, ".assistant")) for i in (0, 1)] == expected
        assert shown.evaluate(column(0, ".user")) == [ATTACK]
        assert shown.evaluate("document.querySelectorAll('img').length") == 0
        assert shown.evaluate("document.title") == "RWKV chat"
        assert "12 tokens" in shown.evaluate(column(1, ".note"))[0]
        shown.evaluate("byId('message').value = 'And then?'; send(); 0")
        shown.wait_for("document.body.dataset.answered == 2")
        for i, chat in enumerate(chats):
            expected[i].append("".join(chat.ask("And then?", Sampling(0), 12)))
        assert [shown.evaluate(column(i, ".assistant")) for i in (0, 1)] == expected
        assert shown.evaluate("[byId('temperature').value, byId('max_tokens').value, byId('key_label').hidden]") == [
            "0",
            "12",
            True,
        ]
        assert shown.evaluate("performance.getEntriesByType('resource').every(x => x.name.startsWith(location.origin))")


def test_chinese_phone_key_and_stop(page, loaded):
    engine = Engine(loaded, WorldTokenizer())
    settings = app.Settings(app.Limits(max_tokens=100_000), api_key="secret", write=lambda line: None)
    with models.serving(engine, settings) as url:
        shown = page(url, "zh-CN", 390)
        error = "a valid API key is needed: Authorization: Bearer KEY"
        shown.wait_for(f"{column(0, '.error')}[0] === {error!r}")
        assert shown.evaluate("[document.documentElement.lang, byId('send').textContent]") == ["zh-CN", "发送"]
        assert shown.evaluate("byId('key_label').offsetHeight") > 0
        shown.evaluate("byId('key').value = 'secret'; byId('key').onchange(); 0")
        shown.wait_for("document.querySelectorAll('option').length == 4")
        assert shown.evaluate(column(0, ".error")) == []
        assert shown.evaluate("document.documentElement.scrollWidth") == 390  # no horizontal scrolling
        # temperature 0: no EOD by chance, which would end an answer
        shown.evaluate("byId('max_tokens').value = 100000; byId('temperature').value = 0; 0")
        shown.evaluate("byId('message').value = '你好'; send(); 0")
        shown.wait_for(f"{column(0, '.assistant')}[0].length > 5 && {column(1, '.assistant')}[0].length > 5")
        assert engine.running == 2
        shown.evaluate("byId('send').click()")
        shown.wait_for("document.body.dataset.answered == 1")
        assert shown.evaluate(column(1, ".note")) == ["已停止"]
        wait_until(engine.idle)
