"""The data of the charts, whose size does not depend on the length of the run."""

import math
from typing import Any

import numpy as np

from rwkv.train.callbacks.curve import Curve, Series
from rwkv.train.callbacks.page.texts import pair

POINTS = 400  # maximum number of points of a line
_SMOOTH = 20  # the moving mean is over 1 / _SMOOTH of the run


def charts(curve: Curve, memory: dict[str, float]) -> dict[str, Any]:
    """The charts by name. `memory`: predicted and available bytes per device (0: unknown)."""
    marks = [
        {"y": size / 1e9, "name": pair(name), "color": color}
        for name, color in (("predicted", "amber"), ("available", "red"))
        if (size := memory.get(name, 0.0)) and _near(size, curve.memory)
    ]
    return {
        "loss": _loss(curve),
        "speed": _single("tokens per second", curve.speed, "violet", zero=True),
        "memory": {**_single("measured", curve.memory, "green", 1 / 1e9, zero=True), "marks": marks},
        "rate": _single("Learning rate", _rates(curve.loss), "amber", zero=True),
        "norm": _single("Gradient norm", curve.norm, "blue"),
        **{name: _preference(curve, name) for name in ("reward_margin", "reward_accuracy") if curve.preferences},
    }


def thin(series: Series, most: int = POINTS) -> dict[str, list[float]]:
    """At most `most` averages of a series, by merging neighbours: x (the last step), y, low,
    high.
    """
    group = max(1, -(-len(series) // most))
    starts = range(0, len(series), group)
    counts, means = np.array(series.counts, dtype=np.float64), np.array(series.means)
    sums = counts * means
    return {
        "x": [series.steps[min(i + group, len(series)) - 1] for i in starts],
        "y": [_round(sums[i : i + group].sum() / counts[i : i + group].sum()) for i in starts],
        "low": [_round(min(series.lows[i : i + group])) for i in starts],
        "high": [_round(max(series.highs[i : i + group])) for i in starts],
    }


def _loss(curve: Curve) -> dict[str, Any]:
    steps, validation = thin(curve.loss), thin(curve.validation)
    smooth = _moving_mean(steps)
    lines: list[dict[str, Any]] = [{"name": pair("loss of a step"), "color": "blue", "width": 1.2, **steps}]
    if len(steps["x"]) < 2 * _SMOOTH:
        lines[0] |= {"width": 2, "dots": True}
    else:
        lines[0]["faint"] = True
        lines.append({"name": pair("moving mean"), "color": "blue", "width": 2.4, **smooth})
    if not any(high > low for low, high in zip(steps["low"], steps["high"], strict=True)):
        lines[0] = {key: value for key, value in lines[0].items() if key not in ("low", "high")}
    dots = len(validation["x"]) <= 60
    shown = {key: validation[key] for key in ("x", "y")}
    lines.append({"name": pair("validation loss"), "color": "green", "width": 2, "dots": dots, **shown})
    found: dict[str, Any] = {"lines": lines, "empty": pair("no step yet")}
    if curve.best:
        found |= {"best": [curve.best[0], _round(curve.best[1])], "bestName": _best_name(curve.best)}
    return found | _cut(curve)


def _best_name(best: tuple[int, float]) -> list[str]:
    step, loss = best
    return [
        f"lowest validation loss: {loss:.3f}, step {step:,}",
        f"最低验证 loss：{loss:.3f}，第 {step:,} 步",
    ]


def _cut(curve: Curve) -> dict[str, Any]:
    """The range of the loss axis, and a note, if the first or single losses are far above the
    others.
    """
    found = curve.usual_range()
    if found is None:
        return {}
    highest = max(curve.loss.highs)
    note = [f"cut off: up to {highest:.3g}", f"图外最高 {highest:.3g}"]
    return {"range": [_round(x) for x in found], "note": note}


def _single(name: str, series: Series, color: str, scale: float = 1.0, zero: bool = False) -> dict[str, Any]:
    found = thin(series)
    line = {"name": pair(name), "color": color, "x": found["x"], "y": [_round(y * scale) for y in found["y"]]}
    return {"lines": [line], "zero": zero, "empty": pair("no step yet")}


def _preference(curve: Curve, name: str) -> dict[str, Any]:
    """A metric of DPO, in training and of the validation."""
    lines = []
    for series, title, color in ((name, "training", "blue"), (f"val_{name}", "validation", "green")):
        found = thin(curve.preferences.get(series, Series()))
        lines.append({"name": pair(title), "color": color, "x": found["x"], "y": found["y"]})
    return {"lines": lines, "zero": name == "reward_accuracy", "empty": pair("no step yet")}


def _rates(loss: Series) -> Series:
    """The learning rates as a series."""
    found = Series(loss.capacity)
    for step, rate in zip(loss.steps, loss.rates, strict=True):
        found.add(step, rate)
    return found


def _moving_mean(steps: dict[str, list[float]]) -> dict[str, list[float]]:
    width = max(1, len(steps["x"]) // _SMOOTH)
    sums = np.concatenate([[0.0], np.cumsum(steps["y"])])
    means = (sums[width:] - sums[:-width]) / width
    return {"x": steps["x"][width - 1 :], "y": [_round(y) for y in means]}


def _near(size: float, measured: Series) -> bool:
    """Whether a mark is near enough to the measured memory to be shown in the same chart."""
    return not measured.highs or size < 4 * max(measured.highs)


def _round(value: float) -> float:
    """Five significant digits, to keep the page small."""
    return float(f"{value:.5g}") if math.isfinite(value) else 0.0
