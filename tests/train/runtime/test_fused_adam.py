"""Clipping within the step of torch's fused Adam, on a CPU (fused_adam_on_cpu.py)."""

import math

import pytest
import torch

from rwkv.config import TrainConfig
from rwkv.train.fit import fit
from rwkv.train.loop import optimizer
from rwkv.train.runtime import fused_adam
from tests.train import fused_adam_on_cpu
from tests.train.small_runs import SMALL, lines

SHAPES = [(7,), (3, 70), (1,)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    fused_adam_on_cpu.use_on_cpu(monkeypatch)


def trained(limit: float, within: bool, decay: float = 0.0, skip: bool = False, poison: float | None = None):
    """Norms, weights and moments of three steps with clipping within the step or before it; one
    element of the last step's gradient is `poison`.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [{"params": parameters[:2], "weight_decay": decay}, {"params": parameters[2:], "weight_decay": 0.0}]
    opt, norms = fused_adam.adam(groups, decay > 0, True, False, **OPTIONS), []
    for step in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        if poison is not None and step == 2:
            parameters[0].grad[3] = poison
        before = [(p.grad.clone(), p.grad._version) for p in parameters]
        if within:
            norms.append(fused_adam.set_clip(opt, limit))
            for p, (old, version) in zip(parameters, before, strict=True):
                assert p.grad._version == version  # not written, even with the same values
                assert torch.equal(p.grad, old) or poison is not None
        else:
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if skip:
            optimizer.skip_step_unless_finite(opt, parameters, norms[-1])
        opt.step()
    state = [opt.state[p][key] for p in parameters for key in ("step", "exp_avg", "exp_avg_sq")]
    return torch.stack(norms), [*(p.detach() for p in parameters), *state]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("limit", [0.5, 1e6, math.inf])
def test_clip_equals_clip_grad_norm(limit, decay, skip):
    norms, expected = trained(limit, False, decay, skip)
    same, found = trained(limit, True, decay, skip)
    assert float(norms.min()) > 10  # 218 elements of variance 1: a limit of 0.5 is active
    assert torch.equal(same, norms)
    for ours, theirs in zip(found, expected, strict=True):
        if limit == 0.5:
            # A gradient divided by a rounded quotient, or multiplied by a rounded reciprocal: up to
            # 4 roundings, 2⁻²⁴ each, and twice that in its square. Adam adds its own roundings.
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-8)
        else:
            assert torch.equal(ours, theirs)


def test_clip_is_active():
    for ours, unclipped in zip(trained(0.5, True)[1][-9:], trained(math.inf, True)[1][-9:], strict=True):
        assert ours.numel() == 1 or not torch.allclose(ours, unclipped, rtol=0.5)


@pytest.mark.parametrize("limit", [0.5, math.inf])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_clip_non_finite(poison, limit):
    norms, expected = trained(limit, False, poison=poison)
    same, found = trained(limit, True, poison=poison)
    assert not math.isfinite(norms[2])
    assert torch.equal(same.isnan(), norms.isnan())
    for ours, theirs in zip(found, expected, strict=True):
        # as in test_clip_equals_clip_grad_norm
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-8, equal_nan=True)
    skipped = trained(limit, True, skip=True, poison=poison)[1]
    assert all(torch.isfinite(x).all() for x in skipped)
    assert {float(x) for x in skipped[3::3]} == {2.0}  # steps


def test_run_clips_within_step(make_data, tmp_path, monkeypatch):
    """A run with the optimizer of GPUs takes the steps of one that clips before the step."""
    flags = SMALL | {"epoch_steps": 3, "epoch_count": 1, "grad_clip": 0.05, "data_file": make_data(500)}
    clip, set_clip = torch.nn.utils.clip_grad_norm_, fused_adam.set_clip
    runs, calls = [], []
    for name in ("before", "within"):

        def counted(*arguments, name=name):
            calls.append(name)
            if name == "within":
                return set_clip(*arguments)
            opt, limit = arguments
            return clip([p for group in opt.param_groups for p in group["params"]], limit)

        monkeypatch.setattr(fused_adam, "set_clip", counted)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", None)
        fit(TrainConfig(**flags, proj_dir=str(tmp_path / name)))
        runs.append(lines(tmp_path / name))
    assert calls == ["before"] * 3 + ["within"] * 3
    for one, other in zip(*runs, strict=True):
        assert one["grad_norm"] > 0.05  # clipping is active
        # equal in the first step; then roundings, as in test_clip_equals_clip_grad_norm
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
