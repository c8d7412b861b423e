"""Render report.html from the facts of a run. Every text from outside is escaped."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rwkv.data.decoding import Example
from rwkv.train.callbacks.curve import Curve
from rwkv.train.callbacks.page.charts import charts
from rwkv.train.callbacks.page.texts import both, pair

GENERATOR = '<meta name="generator" content="rwkv-training">'  # identifies pages of this program
_COLOURS = ("blue", "violet", "green", "amber", "red", "dim")  # classes of the style sheet
_SAMPLES = 8  # of a prompt that are shown


@dataclass
class Facts:
    """What the page shows.

    Attributes:
        status: running, complete, stopped and saved, stopped early or failed.
        message: why it ended, in English; may be empty.
        step, first, last: completed steps, the step before the first and the last one, all counted
            from epoch 0.
        predicted: parts of the predicted memory per device, in bytes.
        phases: (name, predicted, measured) bytes of the phases of the last step.
        available: bytes that the run may use on each device; 0 if unknown.
        data: (name, value) pairs about the data; names are those of page.texts.
        examples: samples as the model sees them.
        samples: lines of samples.jsonl.
        command: repeats the run.
        manifest: of the run.
        size: about the model, (name, value) pairs.
        unit: of the loss.
        refresh: seconds after which the page reloads itself; 0: never.
        time, updated: when it was written, in seconds since 1970 and as text.
    """

    title: str
    subtitle: str
    status: str
    step: int
    first: int
    last: int
    curve: Curve
    predicted: dict[str, int]
    phases: list[tuple[str, int, int]]
    available: int
    data: list[tuple[str, str]]
    examples: list[Example]
    samples: list[dict[str, Any]]
    command: str
    manifest: dict[str, Any]
    size: list[tuple[str, str]]
    refresh: int
    time: float
    updated: str
    message: str = ""
    unit: str = "nats per token"


def render(facts: Facts) -> str:
    """The page as HTML. Its size does not depend on the number of steps."""
    memory = {"predicted": float(sum(facts.predicted.values())), "available": float(facts.available)}
    data = {
        "charts": charts(facts.curve, memory),
        "step": pair("step"),
        "copied": pair("copied"),
        "refresh": facts.refresh,
        "time": round(facts.time),
    }
    script = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    body = "\n".join(
        [_header(facts), _tiles(facts), _charts(facts), _memory(facts), _samples(facts), _data(facts), _origin(facts)]
    )
    footer = both("This page is one file: it loads nothing and works offline.")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(facts.title)}</title>\n<style>{_file('page.css')}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>{both('updated')} {escape(facts.updated)} · {footer}</footer>\n</main>\n"
        f'<script type="application/json" id="page">{script}</script>\n<script>{_file("page.js")}</script>\n</body>\n</html>\n'
    )


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _header(facts: Facts) -> str:
    kind = {"running": "", "complete": "done", "stopped early": "done", "failed": "failed"}.get(facts.status, "stopped")
    total, done = facts.last - facts.first, facts.step - facts.first
    share = min(1.0, done / total) if total else 1.0
    steps = both(f"step {done:,} of {total:,}", f"第 {done:,} / {total:,} 步")
    error = "error" if facts.status == "failed" else "note"
    message = f'<p class="{error}">{escape(facts.message)}</p>' if facts.message else ""
    stale = both("The page is not being updated any more: the process has probably ended.")
    return (
        f'<header><h1>{escape(facts.title)}</h1><span class="pill {kind}">{both(facts.status)}</span>'
        '<nav><button class="to-en">EN</button><button class="to-zh">中文</button></nav>'
        f'<div class="sub">{escape(facts.subtitle)} · {steps}</div></header>'
        f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
        f'<p class="error" id="stale" hidden>{stale}</p>{message}'
    )


def _tiles(facts: Facts) -> str:
    curve, tiles = facts.curve, []

    def tile(name: str, value: str, more: str = "") -> None:
        tiles.append(
            f'<div class="tile"><span class="l">{both(name)}</span><b>{value}</b><span class="l">{more}</span></div>'
        )

    if len(curve.loss):
        first = f"{both('loss of the first step')} {curve.first_loss:.3f}"
        tile("loss, mean of the last 10%", f"{curve.loss.tail(0.1):.3f}", first)
    if "reward_accuracy" in curve.preferences:
        tile("accuracy, mean of the last 10%", f"{curve.preferences['reward_accuracy'].tail(0.1):.0%}")
    if curve.best:
        tile("lowest validation loss", f"{curve.best[1]:.3f}", _at(curve.best[0]))
    if len(curve.speed):
        tile("tokens per second", f"{curve.speed.tail(0.5):,.0f}")
    if curve.tokens:
        tile("tokens trained on", _count(curve.tokens))
    if len(curve.memory):
        predicted = sum(facts.predicted.values())
        tile("peak memory", _gb(max(curve.memory.highs)), f"{both('predicted')} {_gb(predicted)}")
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _charts(facts: Facts) -> str:
    def chart(name: str, title: str, height: int, unit: str = "") -> str:
        unit = f' <span class="note">{unit}</span>' if unit else ""
        return f'<section><h2>{both(title)}{unit}</h2><figure data-chart="{name}" data-height="{height}"></figure></section>'

    small = [
        chart("speed", "Throughput", 170, both("tokens per second")),
        chart("memory", "Memory per device", 170, "GB"),
        chart("rate", "Learning rate", 170),
    ]
    if len(facts.curve.norm):
        small.append(chart("norm", "Gradient norm", 170))
    if facts.curve.preferences:
        small.insert(0, chart("reward_margin", "Reward margin", 170))
        small.insert(1, chart("reward_accuracy", "Accuracy", 170, both("share of pairs with a positive margin")))
    return chart("loss", "Loss", 300, both(facts.unit)) + f'<div class="charts">{"".join(small)}</div>'


def _memory(facts: Facts) -> str:
    """The predicted parts as one bar, and the phases."""
    total = max(1, sum(facts.predicted.values()))
    parts = sorted(facts.predicted.items(), key=lambda item: -item[1])
    shown = [(name, size) for name, size in parts[:5] if size > 0]
    if rest := sum(size for _, size in parts[5:]):
        shown.append(("other", rest))
    bar, names = "", ""
    for (name, size), colour in zip(shown, _COLOURS, strict=False):
        bar += f'<i class="c-{colour}" style="width:{100 * size / total:.2f}%"></i>'
        names += f'<span><i class="c-{colour}"></i>{both(name)} {_gb(size)}</span>'
    rows = f'<tr><th>{both("phase")}</th><th class="num">{both("predicted")}</th><th class="num">{both("measured")}</th></tr>'
    for name, predicted, measured in facts.phases:
        found = _gb(measured) if measured else "–"
        rows += f'<tr><td>{both(name)}</td><td class="num">{_gb(predicted)}</td><td class="num">{found}</td></tr>'
    return (
        f'<section><h2>{both("Memory per device")}: {both("predicted")} {_gb(total)}</h2><div class="stack">{bar}</div>'
        f"<figcaption>{names}</figcaption><h3>{both('measured')}</h3><table>{rows}</table></section>"
    )


def _samples(facts: Facts) -> str:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in facts.samples:
        by_prompt.setdefault(str(line.get("prompt", "")), []).append(line)
    if not by_prompt:
        return ""
    html = f'<section><h2>{both("Samples")} <span class="note">{both("greedy, always with the most likely token")}</span></h2>'
    for prompt, lines in by_prompt.items():
        rows = ""
        for line in _spread(lines, _SAMPLES):
            step = both("before training") if line["step"] == facts.first else _at(line["step"])
            text = (
                escape(line["text"].strip())
                if line["text"].strip()
                else f"<em>({both('the model writes nothing')})</em>"
            )
            rows += f'<tr><th>{step}</th><td class="text">{text}</td></tr>'
        if reference := str(lines[-1].get("reference", "")):
            rows += (
                f'<tr class="ref"><th>{both("in the data")}</th><td class="text">{escape(reference.strip())}</td></tr>'
            )
        html += f'<h3>{both("prompt")}</h3><div class="prompt text">{escape(prompt)}</div><table class="sampled">{rows}</table>'
    return html + "</section>"


def _data(facts: Facts) -> str:
    html = f"<section><h2>{both('Data')}</h2><table>{_rows(facts.data)}</table>"
    if facts.examples:
        legend = f'<em class="c">{both("contributes to the loss")}</em> <em>{both("context only")}</em> <em>∎ {both("end of document")}</em>'
        html += f'<h3>{both("Examples as the model sees them")}</h3><div class="example" style="border:0;padding:0">{legend}</div>'
    for number, example in enumerate(facts.examples, 1):
        about = both(
            f"sample {number}: {example.tokens:,} tokens, {example.counted:,} of them contribute to the loss; {example.padding:,} tokens of padding",
            f"样例 {number}：{example.tokens:,} 个 token，其中 {example.counted:,} 个计入 loss；另有 {example.padding:,} 个填充 token",
        )
        html += f'<p class="note">{about}</p><div class="example text">{_example(example)}</div>'
    return html + "</section>"


def _example(example: Example) -> str:
    html, opened = "", ""
    for text, in_loss in example.pieces:
        tag = "u" if in_loss else "s"
        if tag != opened:
            html += (f"</{opened}>" if opened else "") + f"<{tag}>"
            opened = tag
        html += escape(text) if text else f'<em class="{"c" if in_loss else ""}">∎</em>\n'
    html += f"</{opened}>" if opened else ""
    if left := example.tokens - example.shown:
        html += f" <em>… {both(f'{left:,} more tokens', f'还有 {left:,} 个 token')}</em>"
    return html


def _origin(facts: Facts) -> str:
    run = facts.manifest
    stack = run.get("stack") or {}
    versions = ", ".join(f"{name} {value}" for name, value in stack.items() if name not in ("name", "lock_sha256"))
    base, data = run.get("base") or {}, run.get("data") or {}
    rows = [
        *facts.size,
        ("precision", run.get("types", run.get("precision", ""))),
        ("seed", str(run.get("seed", ""))),
        ("base", f"{base['path']} (SHA-256 {base['sha256'][:16]}…)" if base else ""),
        ("data (SHA-256)", str(data.get("sha256", ""))),
        ("code", run.get("git") or ""),
        ("versions", f"{stack.get('name', '')}: {versions}"),
    ]
    whole = json.dumps(run, indent=2, ensure_ascii=False)
    return (
        f"<section><h2>{both('Reproduce')}</h2><h3>{both('The command that repeats this run')}</h3>"
        f'<button class="copy">{both("copy")}</button><pre class="text">{escape(facts.command)}</pre>'
        f"<h3>{both('Manifest')}</h3><table>{_rows(rows)}</table>"
        f'<details><summary>{both("all of run.json")}</summary><pre class="text">{escape(whole)}</pre></details></section>'
    )


def _rows(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<tr><th>{both(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs if value)


def _spread(lines: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The first, the last and evenly spaced others, at most `limit`."""
    if len(lines) <= limit:
        return lines
    return [lines[round(i * (len(lines) - 1) / (limit - 1))] for i in range(limit)]


def _at(step: int) -> str:
    return both(f"step {step:,}", f"第 {step:,} 步")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _count(value: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,}"
