"""Recorded curves have bounded size, and their statistics match those of all values."""

import math
import random

import pytest

from rwkv.train.callbacks.curve import Curve, Series


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 12345])
def test_series_is_bounded_and_exact(count):
    draw = random.Random(count)
    values = [draw.gauss(3, 1) for _ in range(count)]
    series = Series(capacity=8)
    for step, value in enumerate(values, 1):
        series.add(step, value, rate=step / 10)
        assert len(series) <= 8
    assert sum(series.counts) == count
    assert series.steps[-1] == count
    begin = 0
    for i, end in enumerate(series.steps):
        part = values[begin:end]
        assert series.counts[i] == len(part)
        assert series.means[i] == pytest.approx(sum(part) / len(part))
        assert (series.lows[i], series.highs[i], series.rates[i]) == (min(part), max(part), end / 10)
        begin = end
    assert len(set(series.counts[:-1])) <= 1  # all averages except the last cover the same number of values


def test_tail_average():
    series = Series(capacity=64)
    for step in range(1, 51):
        series.add(step, float(step))
    assert series.tail(0.1) == pytest.approx((46 + 47 + 48 + 49 + 50) / 5)
    assert series.tail(0.0) == 50
    for step in range(51, 10001):
        series.add(step, float(step))
    assert series.tail(0.1) == pytest.approx(9500.5, rel=0.02)
    assert math.isnan(Series().tail(0.1))


def test_curve_statistics():
    curve = Curve()
    assert math.isnan(curve.first_loss)
    losses, validation = [None, 4.0, 3.0, None, 2.0], {2: 5.0, 3: 1.5, 5: 2.5}
    for step, loss in enumerate(losses, 1):
        line = {"step": step, "loss": loss, "lr": 1e-4} | ({"val_loss": validation[step]} if step in validation else {})
        curve.add(line, epoch=(step - 1) // 3)
        if step == 3:
            assert curve.epoch_mean() == 3.5  # a step without a finite loss is omitted
        if step == 4:
            assert math.isnan(curve.epoch_mean())
    assert (curve.first_loss, curve.best, curve.val_loss, curve.last, curve.count) == (4.0, (3, 1.5), 2.5, 5, 5)
    assert curve.loss.steps == [2, 3, 5]
