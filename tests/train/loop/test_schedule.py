"""Learning rates and weight decay at single steps, computed by hand from upstream's formulas."""

import math

import pytest

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train.loop import schedule
from rwkv.train.loop.schedule import learning_rate, steps_per_epoch, tokens_per_step, total_steps, weight_decay


def config(**flags) -> TrainConfig:
    return TrainConfig(
        **{
            "epoch_steps": 10,
            "epoch_count": 10,
            "lr_init": 1e-3,
            "lr_final": 1e-5,
            "warmup_steps": 0,
            "ctx_len": 8,
            "micro_bsz": 2,
            **flags,
        }
    )


def test_exponential_decay():
    c = config()
    assert learning_rate(c, 49) == pytest.approx(1e-4)  # q = 50/100: the geometric mean
    assert learning_rate(c, 99) == pytest.approx(1e-5)
    assert learning_rate(c, 500) == pytest.approx(1e-5)


def test_default_warmup_offset():
    # q = (s + 1 + 1) / (total + 1)
    assert learning_rate(config(warmup_steps=-1), 49) == pytest.approx(1e-3 * 0.01 ** (51 / 101))


def test_linear_and_constant_schedule():
    assert learning_rate(config(lr_final=0.0), 49) == pytest.approx(5e-4)
    assert learning_rate(config(lr_final=1e-3), 49) == 1e-3


@pytest.mark.parametrize(("version", "first"), [("4", 2e-4), ("6", 1e-5), ("", 1e-5)])
def test_warmup(version, first):
    c = config(warmup_steps=20, lr_final=1e-3, version=version)
    assert [learning_rate(c, s) for s in (0, 10, 20)] == pytest.approx([first, (first + 1e-3) / 2, 1e-3])
    first_step = config(warmup_steps=20, version=version)
    assert learning_rate(first_step, 0) == pytest.approx(first)  # q is clamped to 0


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_warmup_of_later_versions(version):
    c = config(warmup_steps=20, lr_final=1e-3, version=version)
    assert [learning_rate(c, s) for s in (0, 10, 20)] == pytest.approx([1e-5, 5.05e-4, 1e-3])


def test_edecay_delays_decay():
    c = config(my_pile_edecay=5)
    assert learning_rate(c, 40) == 1e-3
    assert learning_rate(c, 74) == pytest.approx(1e-4)  # 25 of 50 steps


def test_epoch_begin_continues_decay():
    assert learning_rate(config(epoch_begin=3), 19) == learning_rate(config(), 49)


def test_cosine_over_tokens():
    c = config(my_exit_tokens=1600)  # 100 steps of 16 tokens
    assert learning_rate(c, 50) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(c, 100) == pytest.approx(1e-5)
    assert learning_rate(config(my_exit_tokens=-1600), 49) == pytest.approx(
        (1e-4 + 1e-3 * (0.505 + 0.495 * math.cos(math.pi * 0.49))) / 2  # mean with the exponential
    )


def test_default_warmup_offset_of_cosine():
    q = (50 * 16 + 16) / (1600 + 16)
    assert learning_rate(config(my_exit_tokens=1600, warmup_steps=-1), 50) == pytest.approx(
        1e-3 * (0.505 + 0.495 * math.cos(math.pi * q))
    )


def test_accumulation_keeps_schedule():
    # upstream divides optimizer steps by batches: with k = 2 its decay ends at the geometric mean
    c = config(accumulate_grad_batches=2)
    assert (steps_per_epoch(c), total_steps(c), tokens_per_step(c)) == (5, 50, 32)
    assert learning_rate(c, 24) == pytest.approx(1e-4)
    assert learning_rate(c, 49) == pytest.approx(1e-5)


def test_total_steps():
    assert total_steps(config()) == 100
    assert total_steps(config(epoch_begin=4)) == 60
    assert total_steps(config(max_steps=7)) == 7
    assert total_steps(config(my_exit_tokens=100)) == 7  # 6.25 steps of 16 tokens
    assert total_steps(config(my_exit_tokens=1600, epoch_begin=9)) == 10
    assert total_steps(config(epoch_begin=10)) == 0


def test_weight_decay_schedule():
    assert weight_decay(config(), 5) == 0
    assert weight_decay(config(weight_decay=0.1), 70) == 0.1
    assert weight_decay(config(weight_decay=0.1, weight_decay_final=0.001), 49) == pytest.approx(0.01)
    # upstream crashes with a constant learning rate, as its q is undefined
    assert weight_decay(config(weight_decay=0.1, weight_decay_final=0.001, lr_final=1e-3), 99) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("name", "at_half"),
    [
        ("exp", 1e-4),  # the geometric mean
        ("linear", (1e-3 + 1e-5) / 2),
        ("cosine", (1e-3 + 1e-5) / 2),
        ("wsd", 1e-3),
        ("constant", 1e-3),
    ],
)
def test_named_schedules(name, at_half):
    c = config(lr_schedule=name)
    final = 1e-3 if name == "constant" else 1e-5
    assert [learning_rate(c, s) for s in (49, 99, 500)] == pytest.approx([at_half, final, final])
    rates = [learning_rate(c, s) for s in range(100)]
    assert rates == sorted(rates, reverse=True)
    warm = config(lr_schedule=name, warmup_steps=20, version="7")
    assert [learning_rate(warm, s) for s in (0, 10)] == pytest.approx([1e-5, 5.05e-4], rel=0.1)  # q hardly above 0
    assert learning_rate(warm, 99) == pytest.approx(final)


def test_cosine_of_epochs():
    q = 25 / 100
    expected = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * q)) / 2
    assert learning_rate(config(lr_schedule="cosine"), 24) == pytest.approx(expected)
    assert learning_rate(config(lr_schedule="cosine", lr_init=0.0), 49) == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [({}, 10), ({"lr_decay_fraction": 0.5}, 50), ({"lr_decay_steps": 20}, 20), ({"warmup_steps": 50}, 5)],
)
def test_wsd(flags, steps):
    c = config(lr_schedule="wsd", **flags)
    assert schedule.decay_steps(c) == steps
    rates = [learning_rate(c, s) for s in range(50, 100)]
    decay = [1e-3 + (1e-5 - 1e-3) * i / steps for i in range(1, steps + 1)]
    assert rates == pytest.approx([1e-3] * (50 - steps) + decay)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr_decay_steps": 5}, "are for --lr_schedule wsd"),
        ({"lr_schedule": "cosine", "my_exit_tokens": 9}, "its own cosine: omit one"),
        ({"lr_schedule": "exp", "lr_final": 0.0}, "must be greater than 0; or use --lr_schedule linear"),
        ({"lr_schedule": "wsd", "lr_decay_fraction": 0.0}, "greater than 0 and at most 1; it is 0.0"),
        ({"lr_schedule": "wsd", "lr_decay_steps": 101}, "is more than the 100 steps after warm-up"),
    ],
)
def test_schedules_that_do_not_work(flags, message):
    with pytest.raises(UserError, match=message):
        schedule.check(config(**flags))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "0.001 → 1e-05 (exponential)"),
        ({"lr_final": 0.0, "warmup_steps": 5}, "0.001 → 0 (linear, after 5 steps of warm-up)"),
        ({"lr_final": 1e-3}, "0.001 (constant)"),
        ({"lr_schedule": "constant"}, "0.001 (constant)"),
        ({"my_exit_tokens": 9}, "0.001 → 1e-05 (cosine)"),
        ({"lr_schedule": "cosine"}, "0.001 → 1e-05 (cosine)"),
        ({"lr_schedule": "wsd"}, "0.001 → 1e-05 (wsd, linear in the last 10 steps)"),
    ],
)
def test_description(flags, expected):
    assert schedule.describe(config(**flags)) == expected
