"""report.html of real runs, in headless Chromium too: what it shows, that nothing from outside is
markup or loaded, and its size.
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest

from rwkv.cli import parse
from rwkv.config import LoRAConfig, StateConfig, TrainConfig
from rwkv.data.decoding import Example
from rwkv.errors import UserError
from rwkv.train.callbacks import report_page, sampling
from rwkv.train.callbacks.curve import Curve
from rwkv.train.callbacks.page import charts
from rwkv.train.callbacks.page.document import Facts, render
from rwkv.train.callbacks.page.texts import both, pair
from rwkv.train.fit import fit
from tests.train.small_runs import SMALL, TUNE, lines, poisoned
from tests.waiting import LIMIT

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;\"'"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A completed run on hostile text, in a folder with a hostile name."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "text.txt").write_text((HOSTILE + " hello\n") * 30)
    flags = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    flags |= {
        "data_type": "utf-8",
        "data_file": str(folder / "text.txt"),
        "val_split": 0.2,
        "val_every": 2,
        "ctx_len": 32,
    }
    made = TrainConfig(**flags, sample_every=6, keep_best=True, proj_dir=str(folder / "<b>run"))
    with mock.patch.object(sampling, "TOKENS", 10):
        fit(made)
    return made


@pytest.fixture(scope="module")
def page(config):
    return (config.folder / "report.html").read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', page, re.DOTALL)[1])


class Reader(HTMLParser):
    """Collects tags, attributes and the text of a page outside scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self._skipped = [], [], "", 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._skipped += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skipped -= tag in ("script", "style")

    def handle_data(self, data):
        self.text += "" if self._skipped else data


def test_shows_the_run(page, config):
    found, data, metrics = Reader(page), data_of(page), lines(config.folder)
    by_name = {line["name"][0]: line for line in data["charts"]["loss"]["lines"]}
    assert by_name["loss of a step"]["x"] == [line["step"] for line in metrics]
    assert by_name["loss of a step"]["y"] == pytest.approx([line["loss"] for line in metrics], rel=1e-4)
    expected = [(line["step"], line["val_loss"]) for line in metrics if line.get("val_loss")]
    assert by_name["validation loss"]["x"] == [step for step, _ in expected]
    assert by_name["validation loss"]["y"] == pytest.approx([loss for _, loss in expected], rel=1e-4)
    assert data["charts"]["loss"]["best"][0] == min(expected, key=lambda pair: pair[1])[0]
    assert data["charts"]["speed"]["lines"][0]["y"] == pytest.approx([x["tokens_per_s"] for x in metrics], rel=1e-3)
    assert len(data["charts"]["memory"]["lines"][0]["y"]) == 12
    assert data["refresh"] == 0
    assert "complete" in found.text
    assert "step 12 of 12" in found.text
    samples = [json.loads(line) for line in (config.folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 9  # before the first step, at step 6 and at the end
    assert all(line["prompt"] in found.text and line["text"].strip() in found.text for line in samples)
    assert json.loads((config.folder / "run.json").read_text())["data"]["sha256"] in found.text
    assert found.text.count("hello") > 1  # examples of the data


def test_texts_from_outside_are_not_markup(page):
    found = Reader(page)
    assert "img" not in found.tags
    assert found.tags.count("script") == 2
    assert HOSTILE[:20] in found.text
    assert "<b>run" in found.text


def test_loads_nothing(page):
    attributes = Reader(page).attributes
    assert not [x for x in attributes if x[1] in ("src", "href", "srcset", "action", "data", "background")]
    assert "link" not in Reader(page).tags
    assert not re.findall(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)", page)


def browse(path, language):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    profile = path.parent / f"profile-{language}"
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom"
    command = [
        CHROMIUM,
        *flags.split(),
        f"--user-data-dir={profile}",
        "--window-size=800,900",
        f"{path.as_uri()}#{language}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("language", "shown"), [("en", "moving mean"), ("zh", "每步 loss")])
def test_in_chromium(config, tmp_path, language, shown):
    """The script runs: charts are drawn, in the language of the address."""
    copy = tmp_path / "report.html"
    shutil.copy(config.folder / "report.html", copy)
    if language == "en":  # a longer run, so that there is a moving mean
        copy.write_text(render(facts(500)), encoding="utf-8")
    dom = browse(copy, language)
    assert f'<html lang="{language}">' in dom
    figures = re.findall(r"<figure.*?</figure>", dom, re.DOTALL)
    assert len(figures) == 5
    assert all("<path" in figure and " d=" in figure for figure in figures)
    assert "NaN" not in "".join(figures)
    assert shown in dom
    assert "<title>owned" not in dom


def facts(steps, **changes):
    curve = Curve()
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 2 + 9 / step, "lr": 1e-3, "tokens": step, "tokens_per_s": 100.0, "grad_norm": 1.0}
        line |= {"peak_mib": {"forward": 300}} | ({"val_loss": 3 + 1 / step} if step % 10 == 0 else {})
        curve.add(line, 0)
    example = Example([("asked ", False), ("answer", True), ("", True)], 600, 4, 2, 3)
    return Facts(
        **{
            "title": "run", "subtitle": "", "status": "running", "step": steps, "first": 0, "last": steps, "curve": curve,
            "predicted": {"weights": 10**9, "process": 10**8}, "phases": [("forward", 10**9, 3 * 10**8)], "available": 0,
            "data": [("documents", "3")], "examples": [example], "samples": [], "command": "make lora", "manifest": {},
            "size": [("model", "L2")], "refresh": 30, "time": 0.0, "updated": "now", **changes,
        }
    )  # fmt: skip


def test_size_does_not_grow_with_the_run():
    pages = [render(facts(steps)) for steps in (2_000, 20_000)]
    assert len(pages[1]) < 1.2 * len(pages[0]) < 200_000
    data = data_of(pages[1])
    assert all(len(line["x"]) <= charts.POINTS for chart in data["charts"].values() for line in chart["lines"])


def test_masked_tokens_are_marked():
    html = render(facts(3))
    assert '<s>asked </s><u>answer<em class="c">∎</em>\n</u> <em>… ' in html
    assert "597 more tokens" in html


def test_first_large_losses_are_cut_off():
    chart = data_of(render(facts(500)))["charts"]["loss"]
    assert chart["range"][1] < 4
    assert "cut off: up to 11" in chart["note"][0]


def test_every_text_is_translated():
    for name in ("running", "Loss", "heap"):
        assert pair(name)[1]
    assert both("Loss") == "Loss"
    assert 'class="zh"' in both("running")
    with pytest.raises(KeyError):
        both("not translated")


def test_command_repeats_the_run(config, page):
    command = report_page.repeat(config)
    words = shlex.split(command)
    flags = words[next(i for i, word in enumerate(words) if word.endswith("pretrain.py")) + 1 :]
    assert vars(parse(TrainConfig, "", flags)) == vars(config) | {"cuda_graph": "auto"}
    tuned = LoRAConfig(**TUNE, load_model="a b.pth", data_file="d", lora_r=4, version="4", sample_ask="What?|$HOME")
    words = shlex.split(report_page.repeat(tuned))
    flags = words[next(i for i, word in enumerate(words) if word.endswith("lora.py")) + 1 :]
    assert vars(parse(LoRAConfig, "", flags)) == vars(tuned) | {"version": ""}
    words = shlex.split(report_page.repeat(StateConfig(load_model="base.pth", data_file="d")))
    assert [Path(words[-5]).name, *words[-4:]] == ["state.py", "--load_model", "base.pth", "--data_file", "d"]


def test_written_during_the_run_and_after_an_error(make_base, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        report_page, "render", lambda facts: written.append((facts.status, facts.step)) or render(facts)
    )
    monkeypatch.setattr(report_page, "_SECONDS", 0)
    monkeypatch.setattr(report_page, "_FACTOR", 0)
    with pytest.raises(UserError, match="the loss is nan"):
        fit(TrainConfig(**poisoned(make_base, tmp_path), proj_dir=str(tmp_path / "run")))
    assert written[:2] == [("running", 0), ("running", 1)]
    assert written[-1][0] == "failed"
    text = Reader((tmp_path / "run/report.html").read_text()).text
    assert "Lower --lr_init, or raise the precision" in text


def test_an_error_of_the_page_does_not_end_the_run(make_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_page, "render", lambda facts: 1 / 0)
    flags = SMALL | {"max_steps": 2, "data_file": make_data(200), "proj_dir": str(tmp_path / "run")}
    assert fit(TrainConfig(**flags)).steps == 2
    assert "warning: report.html cannot be written" in capsys.readouterr().out


def test_own_page_replaced_and_foreign_one_kept(make_data, tmp_path):
    flags = SMALL | {"max_steps": 1, "data_file": make_data(200), "proj_dir": str(tmp_path / "run"), "overwrite": True}
    fit(TrainConfig(**flags))
    (tmp_path / "run/run.json").unlink()
    fit(TrainConfig(**flags))
    (tmp_path / "run/report.html").write_text("<h1>mine</h1>")
    with pytest.raises(UserError, match="report.html: this run would overwrite it"):
        fit(TrainConfig(**flags))
    assert (tmp_path / "run/report.html").read_text() == "<h1>mine</h1>"


def test_completed_run_shows_earlier_steps(config, tmp_path):
    copied = dataclasses.replace(config, proj_dir=str(shutil.copytree(config.folder, tmp_path / "run")))
    before = data_of((copied.folder / "report.html").read_text())["charts"]
    fit(copied)
    again = (copied.folder / "report.html").read_text()
    assert data_of(again)["charts"]["loss"] == before["loss"]
    assert "step 12 of 12" in Reader(again).text
    assert fit(dataclasses.replace(copied, epoch_count=4)).steps == 16
    assert "step 16 of 16" in Reader((copied.folder / "report.html").read_text()).text
